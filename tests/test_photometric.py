"""Photometric stereo: known surfaces are recovered, shadows are dropped and flagged, bad lights are refused."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError
from defectbook.data.foil import Foils, encode_normals, line_lights, pair_normals, shade
from defectbook.data.photometric import (
    decode_normals,
    gradient_image,
    gradients,
    light_inverse,
    normal_map,
    photometric_stereo,
    stereo_view,
)


def angle(a, b):
    return np.degrees(2 * np.arcsin(np.clip(np.linalg.norm(a - b, axis=-1) / 2, 0, 1)))


def ball(size=121):
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j].astype(np.float32)
    inside = x * x + y * y < 0.99
    return np.where(inside[..., None], np.dstack([x, y, np.sqrt(np.maximum(1 - x * x - y * y, 0))]), np.float32([0, 0, 1])), inside


@pytest.mark.parametrize("count", (4, 5, 8))
def test_sphere(count):
    normals, inside = ball()
    lights = line_lights(count)
    albedo = np.where(inside, 150, 90).astype(np.float32)
    captures = shade(normals, albedo, lights)
    found = photometric_stereo(captures, lights)
    assert angle(found.normals, normals)[found.reliable].max() < 0.1
    assert np.abs(found.albedo - albedo)[found.reliable].max() < 0.1
    assert found.reliable[inside].mean() > 0.6
    # Flagged exactly where a lamp does not reach.
    dark = (normals @ lights.T.astype(np.float32) < 1e-3).sum(-1)
    assert (found.shadows[dark > 0] > 0).all()


def test_eight_bit_sphere():
    normals, inside = ball()
    captures = np.rint(shade(normals, np.full(inside.shape, 230, np.float32), line_lights())).astype(np.uint8)
    found = photometric_stereo(captures, line_lights())
    assert angle(found.normals, normals)[found.reliable].max() < 1.5


def test_three_lights_solve_but_cannot_spare_one():
    normals, inside = ball()
    lights = line_lights(3, polar=40)
    found = photometric_stereo(shade(normals, np.full(inside.shape, 100, np.float32), lights), lights)
    assert (found.reliable == (found.shadows == 0)).all() and (~found.reliable).any()
    assert angle(found.normals, normals)[found.reliable].max() < 0.1


def test_shadows_cost_more_when_kept():
    normals, inside = ball()
    captures = shade(normals, np.full(inside.shape, 100, np.float32), line_lights())
    kept, dropped = photometric_stereo(captures, line_lights(), shadow=0), photometric_stereo(captures, line_lights())
    one = inside & (dropped.shadows == 1)
    assert angle(kept.normals, normals)[one].mean() > 3 and angle(dropped.normals, normals)[one].max() < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_the_foil_within_a_degree(seed):
    """Stated accuracy on simulated foils: median error below 1 degree, 99 % of the reliable pixels below 2.5 degrees."""
    foil = Foils(count=3, size=(320, 320), seed=seed).foil(seed)
    found = photometric_stereo(foil.captures, foil.lights)
    error = angle(found.normals, foil.normals)
    assert np.median(error) < 1 and np.quantile(error[found.reliable], 0.99) < 2.5
    assert np.median(error[foil.mask > 0]) < 1.5


def test_agrees_with_opposite_pairs():
    foil = Foils(count=1, size=(200, 200), seed=0).foil(0)
    found = photometric_stereo(foil.captures, foil.lights, shadow=0)
    assert angle(found.normals, pair_normals(foil.captures)).max() < 0.1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(3, 9))
def test_against_least_squares_pixel_by_pixel(seed, count):
    rng = np.random.default_rng(seed)
    lights = rng.normal(size=(count, 3))
    lights[:, 2] = np.abs(lights[:, 2]) + 0.5
    lights /= np.linalg.norm(lights, axis=1, keepdims=True)
    if np.linalg.svd(lights, compute_uv=False)[2] < 0.1:
        return
    captures = rng.uniform(1, 200, (count, 3, 4)).astype(np.float32)
    found = photometric_stereo(captures, lights, shadow=0)
    for y in range(3):
        for x in range(4):
            scaled = np.linalg.lstsq(lights, captures[:, y, x].astype(np.float64), rcond=None)[0]
            assert np.isclose(found.albedo[y, x], np.linalg.norm(scaled), rtol=1e-3, atol=1e-2)
            assert np.allclose(found.normals[y, x] * found.albedo[y, x], scaled, atol=2e-3 * np.abs(captures).max() / 0.1)


def test_lights_that_do_not_determine_a_normal():
    with pytest.raises(ParameterError, match="at least 3"):
        light_inverse(line_lights(2))
    with pytest.raises(ParameterError, match="plane"):
        light_inverse(np.array([[1, 0, 1], [-1, 0, 1], [0, 0, 1], [0.5, 0, 1]]))
    with pytest.raises(ParameterError):
        light_inverse(np.full((4, 3), np.nan))


def test_a_spare_light_that_does_not_help_is_not_used():
    """Three of four lamps in one plane: without the fourth, nothing is determined, so a shadow on it is flagged."""
    lights = np.array([[0.8, 0, 0.6], [-0.8, 0, 0.6], [0, 0, 1], [0, 0.8, 0.6]])
    captures = np.full((4, 1, 2), 100.0)
    captures[3, 0, 1] = 0
    found = photometric_stereo(captures, lights)
    assert found.reliable.tolist() == [[True, False]] and found.shadows.tolist() == [[0, 1]]


def test_mismatched_captures_and_black_pixels():
    with pytest.raises(DataError, match="4 lights"):
        photometric_stereo(np.zeros((3, 5, 5), np.uint8), line_lights())
    with pytest.raises(ParameterError, match="shadow"):
        photometric_stereo(np.zeros((4, 5, 5), np.uint8), line_lights(), shadow=1)
    black = photometric_stereo(np.zeros((4, 2, 2), np.uint8), line_lights())
    assert (black.normals == (0, 0, 1)).all() and (black.albedo == 0).all() and not black.reliable.any()


def test_gradients_and_pictures():
    tilted = np.float32([[[-0.6, 0, 0.8], [0, 0.6, 0.8], [0, 0, 1], [1, 0, 0]]])
    dx, dy = gradients(tilted)
    assert np.allclose(dx, [[0.75, 0, 0, -20]]) and np.allclose(dy, [[0, -0.75, 0, 0]])
    assert gradient_image(np.float32([[0, 0.5, -0.5, 9]])).tolist() == [[128, 255, 0, 255]]
    foil = Foils(count=1, size=(100, 100), seed=0).foil(0)
    assert angle(decode_normals(encode_normals(foil.normals)), foil.normals).max() < 0.6


def test_view_of_the_foils():
    plain, viewed = Foils(count=2, size=(128, 128), seed=0), Foils(count=2, size=(128, 128), seed=0, view=stereo_view())
    assert (viewed[1].image == normal_map(plain.foil(1).captures, line_lights())).all()

"""Losses against torch, a slow reference in NumPy and (where installed) segmentation-models-pytorch; gradients in double."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import ParameterError
from defectbook.models.losses import (
    LOSSES,
    binary_cross_entropy,
    cross_entropy,
    focal,
    make_loss,
    regression,
    regression_norm,
    soft_dice,
    weighted_cross_entropy,
)

OPTIONS = {"weighted_ce": {"weights": [0.2, 1.7]}}
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 6), st.integers(2, 6))


def draw(seed: int, shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (N, C, H, W), class indices, valid pixels, and class weights, in double."""
    rng = torch.Generator().manual_seed(seed)
    count, channels, height, width = shape
    classes = max(2, channels)
    logits = torch.randn(shape, generator=rng, dtype=torch.float64) * 3
    targets = torch.randint(0, classes, (count, height, width), generator=rng)
    valid = torch.rand((count, height, width), generator=rng) < 0.7
    return logits, targets, valid, torch.rand(classes, generator=rng, dtype=torch.float64) + 0.1


def probabilities(logits: torch.Tensor) -> np.ndarray:
    """(N, C, H, W) with C >= 2, by the textbook formula."""
    z = logits.numpy()
    if z.shape[1] == 1:
        p = 1 / (1 + np.exp(-z))
        return np.concatenate([1 - p, p], axis=1)
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def slow(name: str, logits, targets, valid, weights, gamma: float = 2.0) -> float:
    """Pixel by pixel."""
    p, above, below, pixels = probabilities(logits), 0.0, 0.0, 0
    for n, y, x in np.argwhere(valid.numpy()):
        t = int(targets[n, y, x])
        p_t, w = p[n, t, y, x], float(weights[t])
        above += w * -np.log(p_t) * ((1 - p_t) ** gamma if name == "focal" else 1)
        below, pixels = below + w, pixels + 1
    total = pixels if name == "focal" else below
    return above / total if total else 0.0


def slow_dice(logits, targets, valid, weights, smooth: float, background: bool, skip: bool) -> float:
    p, losses, shares = probabilities(logits), [], []
    keep = valid.numpy()
    for c in range(0 if background else 1, p.shape[1]):
        g = (targets.numpy() == c)[keep].astype(float)
        q = p[:, c][keep]
        if skip and not g.any():
            continue
        losses.append(1 - (2 * (q * g).sum() + smooth) / (q.sum() + g.sum() + smooth))
        shares.append(float(weights[c]))
    return float(np.average(losses, weights=shares)) if shares else 0.0


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), SHAPES)
def test_cross_entropy_and_focal_are_the_slow_ones(seed: int, shape) -> None:
    logits, targets, valid, weights = draw(seed, shape)
    for name, function in (("ce", cross_entropy), ("focal", focal)):
        assert np.isclose(function(logits, targets, weights=weights, valid=valid).item(), slow(name, logits, targets, valid, weights))
    assert focal(logits, targets, gamma=0.5, valid=valid).item() == pytest.approx(slow("focal", logits, targets, valid, torch.ones(9), 0.5))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), SHAPES, st.sampled_from([1e-6, 1.0, 10.0]), st.booleans(), st.booleans())
def test_soft_dice_is_the_slow_one(seed: int, shape, smooth: float, background: bool, skip: bool) -> None:
    logits, targets, valid, weights = draw(seed, shape)
    absent = "skip" if skip else "count"
    ours = soft_dice(logits, targets, weights=weights, valid=valid, smooth=smooth, background=background, absent=absent)
    assert np.isclose(ours.item(), slow_dice(logits, targets, valid, weights, smooth, background, skip))


def test_dice_of_each_image_is_the_mean_of_single_batches() -> None:
    logits, targets, valid, weights = draw(3, (3, 4, 5, 6))
    alone = [soft_dice(logits[i:i + 1], targets[i:i + 1], valid=valid[i:i + 1]) for i in range(3)]
    assert torch.isclose(soft_dice(logits, targets, valid=valid, each="image"), torch.stack(alone).mean())


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), SHAPES)
def test_torch_agrees(seed: int, shape) -> None:
    logits, targets, valid, weights = draw(seed, shape)
    pixels = F.one_hot(targets, max(2, shape[1])).movedim(-1, 1).double()
    if shape[1] > 1:
        assert torch.isclose(cross_entropy(logits, targets, weights=weights), F.cross_entropy(logits, targets, weights))
        averaged = F.cross_entropy(logits, targets, weights, reduction="none").mean()
        assert torch.isclose(cross_entropy(logits, targets, weights=weights, average="pixels"), averaged)
        ignored = torch.where(valid, targets, torch.full_like(targets, -100))
        if valid.any():
            assert torch.isclose(cross_entropy(logits, targets, valid=valid), F.cross_entropy(logits, ignored))
        expected = F.binary_cross_entropy_with_logits(logits, pixels, pos_weight=weights.view(-1, 1, 1))
        assert torch.isclose(binary_cross_entropy(logits, targets, weights=weights), expected)
    else:
        expected = F.binary_cross_entropy_with_logits(logits[:, 0], targets.double())
        assert torch.isclose(binary_cross_entropy(logits, targets), expected) and torch.isclose(cross_entropy(logits, targets), expected)
    soft = torch.sigmoid(logits.flip(0))  # targets between 0 and 1
    assert torch.isclose(binary_cross_entropy(logits, soft), F.binary_cross_entropy_with_logits(logits, soft))


def test_torchvisions_focal_agrees() -> None:
    ops = pytest.importorskip("torchvision.ops")
    logits, targets, _, _ = draw(1, (2, 1, 7, 9))
    expected = ops.sigmoid_focal_loss(logits[:, 0], targets.double(), alpha=0.75, gamma=2, reduction="mean")
    assert torch.isclose(focal(logits, targets, weights=[0.25, 0.75]), expected)


def test_segmentation_models_dice_agrees() -> None:
    peers = pytest.importorskip("segmentation_models_pytorch.losses")
    logits, targets, _, _ = draw(2, (3, 4, 8, 8))
    # Its Tversky form adds s to half the sums, so its 0.5 is our 1.
    expected = peers.DiceLoss("multiclass", smooth=0.5)(logits, targets)
    assert torch.isclose(soft_dice(logits, targets, background=True, absent="skip"), expected)
    one = logits[:, :1]
    expected = peers.DiceLoss("binary", smooth=0.5)(one, (targets > 0)[:, None].long())
    assert torch.isclose(soft_dice(one, (targets > 0).long()), expected)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(2, 7), st.integers(2, 7), st.booleans())
def test_regression_is_the_slow_one(seed: int, count: int, height: int, width: int, whole: bool) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(count, height, width)), rng.integers(0, 2, (count, height, width)).astype(float)
    keep = np.ones(a.shape, bool) if whole else rng.random(a.shape) < 0.7
    e = np.where(keep, a - b, 0)
    squares: dict[str, list[float]] = {"e": [], "h": [], "w": []}
    norms = []
    for n in range(count):
        here: dict[str, list[float]] = {"e": [], "h": [], "w": []}
        for y, x in np.ndindex(height, width):
            if keep[n, y, x]:
                here["e"].append(e[n, y, x] ** 2)
                if y + 1 < height and keep[n, y + 1, x]:
                    here["h"].append((e[n, y + 1, x] - e[n, y, x]) ** 2)
                if x + 1 < width and keep[n, y, x + 1]:
                    here["w"].append((e[n, y, x + 1] - e[n, y, x]) ** 2)
        root = {k: np.sqrt(sum(v)) for k, v in here.items()}
        pixels = max(1, keep[n].sum())
        norms.append((root["e"] / pixels + (root["h"] + root["w"]) / (2 * pixels)) / 2)
        squares = {k: v + here[k] for k, v in squares.items()}
    mean = {k: np.mean(v) if v else 0.0 for k, v in squares.items()}
    valid = None if whole else torch.from_numpy(keep)
    a, b = torch.from_numpy(a), torch.from_numpy(b)
    assert np.isclose(regression(a, b, valid=valid).item(), 0.5 * mean["e"] + 0.25 * mean["h"] + 0.25 * mean["w"])
    assert np.isclose(regression_norm(a, b, valid=valid).item(), np.mean(norms))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_in_double(name: str, channels: int) -> None:
    options = {"weights": [0.2, 1.7, 0.9][:max(2, channels)]} if name == "weighted_ce" else {}
    loss = make_loss(name, **options)
    logits, targets, valid, _ = draw(5, (2, channels, 4, 5))
    if loss.takes == "values":
        logits, targets = logits[:, 0], (targets > 0).double()
    assert torch.autograd.gradcheck(lambda z: loss.function(z, targets, valid=valid), logits.requires_grad_())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_stays_finite_for_the_certain(gamma: float) -> None:
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor([[-200.0], [-30.0], [30.0], [200.0]], dtype=dtype, requires_grad=True)
        value = focal(logits, torch.tensor([1, 1, 1, 1]), gamma=gamma)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(logits.grad).all()
        assert logits.grad[0] < -0.2 and abs(logits.grad[3]) < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_degenerate_batches(name: str) -> None:
    """All ignored gives 0 and moves nothing; NaN in ignored pixels has no effect; no foreground gives a finite gradient."""
    loss = make_loss(name, **OPTIONS.get(name, {}))
    logits, targets, valid, _ = draw(7, (2, 1, 6, 6))
    if loss.takes == "values":
        logits = logits[:, 0]
    clean = logits.clone().requires_grad_()
    value = loss.function(clean, targets, valid=valid)
    value.backward()
    dirty = torch.where(valid if logits.ndim == 3 else valid[:, None], logits, torch.full_like(logits, float("nan"))).requires_grad_()
    wrong = torch.where(valid, targets, torch.full_like(targets, 255))
    same = loss.function(dirty, wrong, valid=valid)
    same.backward()
    assert torch.equal(value, same) and torch.equal(clean.grad, dirty.grad)

    nothing = dirty.detach().clone().requires_grad_()
    zero = loss.function(nothing, wrong, valid=torch.zeros_like(valid))
    zero.backward()
    assert zero == 0 and (nothing.grad == 0).all()

    empty = logits.clone().requires_grad_()
    loss.function(empty, torch.zeros_like(targets)).backward()
    assert torch.isfinite(empty.grad).all()
    # A batch of normal images still pushes the largest answers down.
    assert empty.grad[logits == logits.max()].item() > 0


def test_a_perfect_map_has_a_zero_gradient() -> None:
    truth = torch.eye(6)[None]
    for function in (regression, regression_norm):
        prediction = truth.clone().requires_grad_()
        value = function(prediction, truth)
        value.backward()
        assert value == 0 and (prediction.grad == 0).all()


def test_skipping_an_absent_class() -> None:
    logits, targets = torch.randn(1, 3, 5, 5), torch.zeros(1, 5, 5, dtype=torch.long)
    assert soft_dice(logits, targets, absent="skip") == 0 and soft_dice(logits, targets) > 0.5


def test_half_precision_and_single_pixels() -> None:
    logits = torch.tensor([[1.0, -1.0]])
    assert torch.isclose(cross_entropy(logits, torch.tensor([0])), -torch.log_softmax(logits, 1)[0, 0])
    assert torch.isfinite(soft_dice(torch.randn(1, 1, 4, 4, dtype=torch.bfloat16), torch.zeros(1, 4, 4, dtype=torch.long)))


def test_nonsense_is_refused() -> None:
    logits, targets, valid, _ = draw(0, (2, 3, 4, 5))
    refused = [
        (lambda: cross_entropy(logits, targets[:, :3]), r"targets of shape \(2, 3, 5\) for logits of shape \(2, 3, 4, 5\)"),
        (lambda: cross_entropy(logits, targets + 1), "targets hold classes 1 to 3, but the logits have 3"),
        (lambda: cross_entropy(logits, targets, valid=valid[:1]), r"valid of shape \(1, 4, 5\)"),
        (lambda: binary_cross_entropy(logits, targets, valid=valid[:1]), r"valid of shape \(1, 4, 5\)"),
        (lambda: cross_entropy(logits, targets, weights=[1, 2]), "class weights .* for 3 classes"),
        (lambda: cross_entropy(logits, targets, weights=[1, -2, 1]), "none negative"),
        (lambda: cross_entropy(logits, targets, average="pixel"), "did you mean 'pixels'"),
        (lambda: weighted_cross_entropy(logits, targets, weights=None), "without weights"),
        (lambda: binary_cross_entropy(logits, logits), "needs them in 0..1"),
        (lambda: binary_cross_entropy(logits, targets, weights=[1, 2]), "2 weights for 3 channels"),
        (lambda: focal(logits, targets, gamma=-1), "gamma=-1"),
        (lambda: soft_dice(logits, targets, smooth=0), "smooth=0"),
        (lambda: soft_dice(logits, targets, absent="skipp"), "did you mean 'skip'"),
        (lambda: soft_dice(logits, targets, each="class"), "unknown each"),
        (lambda: regression(logits, targets), r"predictions of shape \(2, 3, 4, 5\)"),
        (lambda: regression_norm(logits[:, 0], targets, valid=valid[:1]), "valid of shape"),
        (lambda: make_loss("softdice"), "did you mean 'soft_dice'"),
        (lambda: make_loss("soft_dice", smoth=1), "did you mean 'smooth'"),
        (lambda: make_loss("weighted_ce"), "needs weights"),
    ]
    for attempt, message in refused:
        with pytest.raises(ParameterError, match=message):
            attempt()

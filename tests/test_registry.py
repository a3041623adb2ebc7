"""Names lead to methods, slips to one line."""

import numpy as np
import pytest

from defectbook.core import ParameterError, Sample
from defectbook.practice.registry import DETECTORS, SEGMENTERS, describe_methods, make_detector, make_segmenter
from defectbook.practice.saved_detectors import load_detector

RNG = np.random.default_rng(0)
NORMAL = [Sample(np.clip(120 + 20 * np.sin(np.arange(64) / 5)[:, None, None] + RNG.normal(0, 3, (64, 64, 3)), 0, 255).astype(np.uint8),
                 name=f"{i:02d}") for i in range(12)]
TINY = {"backbone": "efficientnet_lite0", "image_size": 64}
REFINEMENT = {**TINY, "iterations": 1, "batch_size": 2, "pool_size": 4, "width": 4}
PNI = {**TINY, "pool": 3, "ratio": 0.1, "words": 8, "neighbourhood": 3, "reduced": 4, "depth": 1, "width": 8, "epochs": 1, "mlp_batch": 64}
NETWORK = {"image_size": 16, "encoder": (2, 4), "epochs": 1, "batch_size": 4}
SMALL = {
    "patchcore": {**TINY, "ratio": 0.1}, "pni": PNI, "pni_refined": {**PNI, "refinement": REFINEMENT},
    "pni_ensemble": {**{name: value for name, value in PNI.items() if name != "backbone"}, "backbones": ["efficientnet_lite0"],
                     "refinement": REFINEMENT},
    "ae": NETWORK, "ssim_ae": {**NETWORK, "image_size": 32}, "memae": {**NETWORK, "items": 4}, "pae": NETWORK, "paedid": NETWORK,
    "rpca": {"image_size": 16, "columns": 6}, "outlier_pursuit": {"image_size": 16, "columns": 6},
    "rasl": {"image_size": 24, "columns": 4, "inset": 2, "steps": 2}, "ssd": {"image_size": 16, "knots": 4},
}


@pytest.mark.filterwarnings("ignore:.*(low rank|not of low|did not converge|still moving).*")
@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_fits_predicts_and_comes_back(name: str, tmp_path) -> None:
    detector = make_detector(name, **SMALL[name]).fit(NORMAL)
    prediction = detector.predict(NORMAL[:3])
    assert [m.shape for m in prediction.maps] == [(64, 64)] * 3 and np.isfinite(prediction.scores).all()
    detector.save(tmp_path / "model")
    again = load_detector(tmp_path / "model").predict(NORMAL[:3])
    np.testing.assert_allclose(again.scores, prediction.scores, rtol=1e-5)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_every_segmenter_is_made_unfitted(name: str) -> None:
    segmenter = make_segmenter(name, **({"weights": None} if name.startswith("unet") else {}))
    assert not segmenter.is_fitted and segmenter.label


def test_options_reach_the_method() -> None:
    assert make_detector("outlier_pursuit").parameters["joint"] is True
    assert make_detector("paedid", weight=1e-5, alpha=0.1).parameters["weight"] == 1e-5
    refined = make_detector("pni_refined", **SMALL["pni_refined"], seed=7)
    assert refined.parameters["seed"] == refined.detector.parameters["seed"] == 7
    assert make_segmenter("siamese", loss="ce").parameters["loss"] == "ce"


@pytest.mark.parametrize(("make", "name", "options", "words"), [
    (make_detector, "patch_core", {}, "did you mean 'patchcore'"),
    (make_detector, "unet", {}, "unknown detector 'unet'"),
    (make_detector, "patchcore", {"imagesize": 3}, "no option 'imagesize'.*methods/40_patchcore"),
    (make_detector, "pae", {"weight": 1}, "no option 'weight'"),
    (make_detector, "pni_refined", {"refinement": {"speed": 1}, **TINY}, "no option 'speed'"),
    (make_segmenter, "pross", {}, "did you mean 'pros'"),
    (make_segmenter, "unet", {"network": "siamese"}, "no option 'network'"),
])
def test_slips_are_one_line(make, name: str, options: dict, words: str) -> None:
    with pytest.raises(ParameterError, match=words) as caught:
        make(name, **options)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_swallowed() -> None:
    with pytest.raises(ParameterError, match="residual|absolute"):
        make_detector("ae", residual="cubic")


def test_the_description_names_chapters_that_exist() -> None:
    from conftest import ROOT

    table = describe_methods()
    assert len(table) == len(DETECTORS) + len(SEGMENTERS) and table.title.is_unique
    assert all((ROOT / "nbs" / f"{chapter}.ipynb").is_file() for chapter in table.chapter)

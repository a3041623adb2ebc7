"""PNI: the veto against the dense formula, terms against PatchCore, kills, seeds, files, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, Sample, WeightsError
from defectbook.methods import pni as module
from defectbook.methods.patchcore import PatchCore
from defectbook.methods.pni import PNI, VARIANTS, allowed_distances, allowed_distances_dense, word_probability
from defectbook.models.memory import MemoryBank

TINY = {"backbone": "efficientnet_lite0", "image_size": 64, "pool": 3, "sigma": 2.0, "ratio": 0.2, "words": 16, "neighbourhood": 3, "reduced": 8,
        "depth": 1, "width": 16, "epochs": 3, "mlp_batch": 64, "device": "cpu"}


def pictures(count: int, seed: int = 0, label: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    stripes = 120 + 80 * np.sin(np.arange(64) / 5)[:, None, None]
    return [Sample(np.clip(stripes + rng.normal(0, 12, (64, 64, 3)), 0, 255).astype(np.uint8), label=label, name=f"{seed}-{i}") for i in range(count)]


@pytest.fixture(scope="module")
def fitted() -> PNI:
    return PNI(**TINY).fit(pictures(8))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 12), st.floats(0, 0.6), st.integers(1, 8), st.integers(0, 10**6))
def test_veto_search_is_the_dense_formula(items: int, queries: int, words: int, tau: float, widen: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bank = MemoryBank(rng.normal(size=(items, 4)))
    asked = rng.normal(size=(queries, 4)).astype(np.float32)
    probable, of = rng.dirichlet(np.full(words, 0.3), queries).astype(np.float32), rng.integers(0, words, items)
    fast = allowed_distances(asked, bank, lambda rows, found: word_probability([probable], rows, of[found]) > tau, widen=widen)
    np.testing.assert_allclose(fast, allowed_distances_dense(asked, bank.features, probable, of, tau), rtol=1e-4, atol=1e-4)


def test_score_is_equations_four_to_eight(fitted: PNI) -> None:
    (batch,) = fitted.patchcore.embeddings(pictures(1, 5))
    grid = batch.embeddings[0]
    tables = fitted.probabilities(grid)
    mean = (tables["neighbourhood"] + tables["position"]) / 2
    for detector, tau in ((fitted, 0.5 / 16), (fitted.using(tau="items"), 0.5 / len(fitted.patchcore.bank)), (fitted.using(tau=0.05), 0.05)):
        expected = allowed_distances_dense(grid.reshape(-1, grid.shape[-1]), fitted.patchcore.bank.features, mean, fitted.item_words, tau)
        np.testing.assert_allclose(detector.score(grid).ravel(), expected, rtol=1e-3)


def test_both_terms_together_veto_what_either_vetoes(fitted: PNI) -> None:
    (batch,) = fitted.patchcore.embeddings(pictures(1, 6))
    grid = batch.embeddings[0]
    both = fitted.using(combine="both", tau="calibrated").score(grid)
    for single in (fitted.using(True, False, tau="calibrated"), fitted.using(False, True, tau="calibrated")):
        assert (both >= single.score(grid) - 1e-5).all()


def test_where_no_item_pleases_both_terms_the_farther_counts(fitted: PNI) -> None:
    """Position allows word 0 only, the neighbourhood word 1 only: every score is the larger of the two terms' own."""
    (batch,) = fitted.patchcore.embeddings(pictures(1, 6))
    grid, detector = batch.embeddings[0], fitted.using(combine="both")
    certain = {term: np.tile(np.eye(16, dtype=np.float32)[word], (64, 1)) for word, term in enumerate(("position", "neighbourhood"))}
    detector.probabilities = lambda features: certain
    singles = []
    for word in (0, 1):
        items = detector.patchcore.bank.features[detector.item_words == word]
        singles.append(np.linalg.norm(grid.reshape(64, 1, -1) - items[None], axis=2).min(1))
    np.testing.assert_allclose(detector.score(grid).ravel(), np.maximum(*singles), rtol=1e-4)


def test_without_terms_it_is_patchcore(fitted: PNI) -> None:
    patchcore = PatchCore("efficientnet_lite0", image_size=64, ratio=0.2, sigma=2.0, device="cpu").fit(pictures(8))
    ours, theirs = fitted.using(False, False).predict(pictures(3, 1)), patchcore.predict(pictures(3, 1))
    np.testing.assert_array_equal(ours.scores, theirs.scores)
    for a, b in zip(ours.maps, theirs.maps, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_veto_never_lowers_a_score(fitted: PNI) -> None:
    (batch,) = fitted.patchcore.embeddings(pictures(1, 3))
    plain = fitted.using(False, False).score(batch.embeddings[0])
    for tau in ("words", "items", "calibrated", 0.2, 0.99):
        scores = fitted.using(tau=tau).score(batch.embeddings[0])
        assert np.isfinite(scores).all() and (scores >= plain - 1e-5).all()


def test_vocabulary_begins_the_bank_and_each_word_is_its_own(fitted: PNI) -> None:
    assert fitted.position.shape == (8, 8, 16)
    assert fitted.item_words[:16].tolist() == list(range(16))


def test_calibration_vetoes_the_asked_share_of_held_out_patches() -> None:
    detector = PNI(**TINY, vetoed=0.2, held_out=0.5).fit(pictures(12))
    fresh = [grid for batch in detector.patchcore.embeddings(pictures(12, 9)) for grid in batch.embeddings]
    calibrated, plain = detector.using(False, True, tau="calibrated"), detector.using(False, False)
    share = np.mean([calibrated.score(grid) > plain.score(grid) for grid in fresh])
    assert 0.05 < share < 0.4


def test_two_fits_with_one_seed_are_equal_and_another_seed_is_not(fitted: PNI) -> None:
    again, other = PNI(**TINY).fit(pictures(8)), PNI(**TINY, seed=1).fit(pictures(8))
    for a, b in zip(fitted.predict(pictures(3, 2)).maps, again.predict(pictures(3, 2)).maps, strict=True):
        np.testing.assert_array_equal(a, b)
    assert fitted.history == again.history != other.history


def test_saved_and_loaded_bit_for_bit(fitted: PNI, tmp_path: Path) -> None:
    fitted.save(tmp_path / "pni")
    loaded = PNI.load(tmp_path / "pni", device="cpu")
    assert loaded.parameters == fitted.parameters and loaded.taus == fitted.taus
    for terms in ((True, True), (True, False), (False, True), (False, False)):
        a, b = fitted.using(*terms).predict(pictures(2, 4)), loaded.using(*terms).predict(pictures(2, 4))
        np.testing.assert_array_equal(a.scores, b.scores)
        np.testing.assert_array_equal(a.maps, b.maps)
    with pytest.raises(ParameterError, match="exists already"):
        fitted.save(tmp_path / "pni")


def test_saved_without_reduction_and_without_network(tmp_path: Path) -> None:
    for number, change in enumerate(({"reduced": None}, {"terms": ["position"]})):
        detector = PNI(**(TINY | change)).fit(pictures(4))
        detector.save(tmp_path / str(number))
        np.testing.assert_array_equal(PNI.load(tmp_path / str(number)).predict(pictures(1, 7)).maps, detector.predict(pictures(1, 7)).maps)


def test_a_fit_that_is_stopped_goes_on(fitted: PNI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the second epoch, then called again: the same detector, and nothing is left behind."""
    from defectbook.models.training import Training

    finish, done = Training.finish_round, []

    def stop_after_two(self: Training, **losses: float) -> None:
        finish(self, **losses)
        done.append(self.rounds)
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "finish_round", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        PNI(**TINY).fit(pictures(8), checkpoint=tmp_path / "work")
    resumed = PNI(**TINY).fit(pictures(8), checkpoint=tmp_path / "work")
    assert done == [1, 2, 3] and resumed.history == fitted.history
    np.testing.assert_array_equal(resumed.predict(pictures(1, 8)).maps, fitted.predict(pictures(1, 8)).maps)
    assert not any((tmp_path / "work").rglob("*.safetensors"))


def test_a_checkpoint_of_other_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fit_neighbourhood", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        PNI(**TINY).fit(pictures(8), checkpoint=tmp_path / "work")
    with pytest.raises((DataError, WeightsError), match="other"):
        PNI(**TINY).fit(pictures(8, seed=3), checkpoint=tmp_path / "work")


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_run_and_say_what_they_are(variant: str) -> None:
    detector = PNI(**TINY, variant=variant).fit(pictures(4))
    prediction = detector.predict(pictures(2, 5))
    assert np.isfinite(prediction.scores).all() and prediction.maps[0].shape == (64, 64)
    assert detector.skip == (None if variant != "reference" else 5)
    assert {name: detector.parameters[name] for name in ("tau", "combine", "by_rank", "exponent")} == {
        name: VARIANTS[variant][name] for name in ("tau", "combine", "by_rank", "exponent")}


def test_parameters_are_json_and_build_the_same_detector() -> None:
    detector = PNI(**TINY, variant="reference", tau="calibrated")
    again = PNI(**json.loads(json.dumps(detector.parameters)))
    assert again.parameters == detector.parameters and again.choices == detector.choices


@pytest.mark.parametrize(("change", "message"), [
    ({"variant": "papr"}, "did you mean 'paper'"), ({"tau": "word"}, "did you mean 'words'"), ({"combine": "sum"}, "valid names"),
    ({"terms": ["neighbour"]}, "did you mean 'neighbourhood'"), ({"image_score": "max"}, "valid names"), ({"vetoed": 0.0}, "between 0 and 1"),
    ({"neighbourhood": 4}, "odd"), ({"temperature": 0.0}, "above 0"), ({"reduced": 4000}, "dimensions"), ({"held_out": 1.5}, "between 0 and 1"),
    ({"image_size": 8}, "smaller than the stride")])
def test_bad_parameters_are_named(change: dict, message: str) -> None:
    with pytest.raises((ParameterError, DataError), match=message):
        PNI(**(TINY | change)).fit(pictures(4))


def test_bad_images_are_named(fitted: PNI) -> None:
    with pytest.raises(DataError, match="no normal images"):
        PNI(**TINY).fit([])
    with pytest.raises(DataError, match="more normal images"):
        PNI(**TINY).fit(pictures(1))
    with pytest.raises(DataError, match="among the normal images"):
        PNI(**TINY).fit(pictures(2) + pictures(1, 1, label=1))
    with pytest.raises(ParameterError, match="call fit"):
        PNI(**TINY).predict(pictures(1))
    with pytest.raises(ParameterError, match="without its neighbourhood"):
        PNI(**(TINY | {"terms": ["position"]})).fit(pictures(4)).using()
    with pytest.raises(ParameterError, match="choice of scoring"):
        fitted.using(epochs=2)


def test_files_of_others_are_refused(fitted: PNI, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not a saved PNI"):
        PNI.load(tmp_path)
    fitted.save(tmp_path / "pni")
    config = json.loads((tmp_path / "pni" / "patchcore" / "config.json").read_text())
    config["features"] = "efficientnet_lite1:2,3:0123456789abcdef"
    (tmp_path / "pni" / "patchcore" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="efficientnet_lite1:2,3:0123"):
        PNI.load(tmp_path / "pni")
    shutil.copytree(tmp_path / "pni" / "patchcore", tmp_path / "core")
    with pytest.raises(WeightsError, match="not a saved PNI"):
        PNI.load(tmp_path / "core")

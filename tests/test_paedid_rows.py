"""PAEDID's products and rows: splits that share no image, every method from fit to store, kills, pictures, and what is refused."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_trees import mvtec_tree as write_tree
from tiny_trees import tile_tree, write_image

from defectbook.core import DataError, ParameterError, Prediction, Sample
from defectbook.data.wood import read_wood
from defectbook.methods.paedid import PAEDID
from defectbook.metrics.pixel import dice, dice_oracle
from defectbook.metrics.published import published
from defectbook.models.autoencoder import latent_shape, split_held_out
from defectbook.models.priors import ENCODERS, AutoencoderPrior, PatchPrior
from defectbook.models.training import Training
from defectbook.practice.paedid_rows import (
    ALPHA,
    METHODS,
    PRINTED,
    SHOWN,
    SIZES,
    TITLES,
    Kitchen,
    Product,
    TunedRow,
    judge,
    mask_panels,
    mask_strip,
    may_show,
    memory_panels,
    open_product,
    run_tuned,
    shown_images,
    sizes_of,
)
from defectbook.practice.panels import GUTTER, UNKNOWN_COLOUR
from defectbook.practice.protocol import evaluate_fitted
from defectbook.practice.runs import RunStore
from defectbook.practice.thresholds import dice_each, tune

WOOD_SIZES = sizes_of("smoke", "wood_simulated")


@pytest.fixture(scope="module")
def wood() -> Product:
    return open_product("wood_simulated", WOOD_SIZES)


@pytest.fixture(scope="module")
def kitchen(wood, tmp_path_factory) -> Kitchen:
    return Kitchen(wood, WOOD_SIZES, RunStore(tmp_path_factory.mktemp("store")), device="cpu")


@pytest.fixture(scope="module")
def rows(kitchen, wood):
    """The stored run of each method by name, made when first asked for."""
    made = {}

    def ask(method: str):
        if method not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # ten images have no low rank, and three epochs no convergence
                (made[method],) = run_tuned("rows", [kitchen.row(method)], wood, kitchen.store, folds=2, preset="smoke")
        return made[method]

    return ask


class Bright:
    """Maps are grey values, larger is more anomalous; in real life nobody's method."""

    def __init__(self, sign: float = 1.0):
        self.sign = sign

    def predict(self, samples):
        maps = [(self.sign * sample.image.mean(2)).astype(np.float32) for sample in samples]
        return Prediction(maps, [found.max() for found in maps])


def bright_row(identity=None) -> TunedRow:
    return TunedRow("Bright", identity or {}, lambda: ({"up": Bright(), "down": Bright(-1)}, {"fit": 0.0}))


def assert_disjoint(product: Product) -> None:
    """No image twice, in name or in content; tuning images are cracked validation images."""
    dataset = product.dataset
    names = {split: [sample.name.removesuffix(" cracked") for sample in samples] for split, samples in dataset.splits.items()}
    together = [name for part in names.values() for name in part]
    assert len(set(together)) == len(together)
    tuning = [sample.name.removesuffix(" cracked") for sample in product.tuning]
    assert len(set(tuning)) == len(tuning) and set(tuning) <= set(names["validation"])
    assert all(sample.label and sample.mask.any() and sample.name.endswith("cracked") for sample in product.tuning)
    contents = [{sample.image.tobytes() for sample in samples} for samples in dataset.splits.values()]
    assert not (contents[0] & contents[1] or contents[0] & contents[2] or contents[1] & contents[2])
    assert not any(sample.label for sample in [*dataset.train, *dataset.validation])


def assert_cracked(product: Product, tests: int) -> None:
    labels = [sample.label for sample in product.dataset.test]
    assert sum(labels) == tests and len(labels) == 2 * tests and product.dataset.name.endswith("_simulated_cracks") and product.dataset.simulated
    assert all(sample.mask.any() == bool(sample.label) for sample in product.dataset.test)
    tuned, tested = ({sample.mask.tobytes() for sample in part if sample.label} for part in (product.tuning, product.dataset.test))
    assert not tuned & tested, "other images, other cracks"


# sizes

def test_the_papers_sizes():
    """128 px; latent 32x32x128 and 8x8x81; alpha 3 %; both lambdas; 800 + 100 images to train on; 1,000 cells to learn from."""
    wood, cells = sizes_of("paper", "wood_simulated"), sizes_of("paper", "elpv")
    assert (wood["side"], ALPHA) == (128, 0.03) and {1e-5, 6e-4} <= set(wood["weights"]) and {1e-5, 6e-4} <= set(cells["weights"])
    assert latent_shape(ENCODERS[wood["encoder"]], 128) == (32, 32, 128) and latent_shape(ENCODERS[cells["encoder"]], 128) == (8, 8, 81)
    held_out = wood["training"]["held_out"]
    assert [len(part) for part in split_held_out(900, held_out, 0)] == [800, 100]
    product = open_product("wood_simulated", wood)
    assert [len(part) for part in product.dataset.splits.values()] == [900, 100, 200] and len(product.tuning) == 100
    assert set(PRINTED) <= set(METHODS) and set(PRINTED.values()) <= set(published("PAEDID").row)


def test_the_papers_cells():
    pytest.importorskip("elpv_dataset")
    cells = sizes_of("paper", "elpv")
    product = open_product("elpv", cells)
    assert [len(part) for part in product.dataset.splits.values()] == [1125, 183, 200] and len(product.tuning) == 100
    assert len(split_held_out(1125, cells["training"]["held_out"], 0)[0]) == 1000
    assert sum(sample.label for sample in product.dataset.test) == 100
    assert len({sample.name.removesuffix(" cracked") for sample in product.dataset.samples}) == 1508, "all functional cells"


def test_the_papers_btad_by_number(tmp_path):
    """Product 1 is folder 03, product 2 is folder 02: as many images as published, of other sizes."""
    image, mask = np.full((6, 8, 3), 128, np.uint8), np.full((6, 8), 255, np.uint8)
    for category, suffix, counts in (("03", ".bmp", (1000, 400, 41)), ("02", ".png", (399, 30, 200))):
        for part, count in zip(("train/ok", "test/ok", "test/ko"), counts, strict=True):
            for i in range(count):
                write_image(tmp_path / category / part / f"{i:04}{suffix}", image)
        for i in range(counts[2]):
            write_image(tmp_path / category / "ground_truth" / "ko" / f"{i:04}.png", mask)
    sizes = sizes_of("paper", "btad")
    one, two = (open_product("btad", sizes, category, root=tmp_path) for category in ("03", "02"))
    assert [len(part) for part in one.dataset.splits.values()] == [900, 100, 200] and len(one.tuning) == 100
    assert [len(part) for part in two.dataset.splits.values()] == [359, 40, 30] and len(two.tuning) == 40
    assert "cracks were grown on 15 normal test images" in two.dataset.summary(), "half of thirty"
    real = open_product("btad", sizes, "02", "real", tmp_path)
    assert len(real.dataset.test) == 230 and real.dataset.name == "btad"


@pytest.mark.parametrize("preset", SIZES)
@pytest.mark.parametrize("product", ["elpv", "wood_simulated", "magnetic_tile", "btad"])
def test_every_preset_has_every_size(preset, product):
    sizes = sizes_of(preset, product)
    assert {*SIZES["smoke"], "channels"} == set(sizes) and sizes["channels"] == ("rgb" if product in ("wood_simulated", "btad") else "grey")
    prior = PatchPrior(sizes["encoder"], ALPHA, device="cpu", **sizes["training"])
    latent_shape(prior.widths, sizes["side"])
    assert json.loads(json.dumps(sizes))["side"] == sizes["side"] and set(sizes["columns"]) == {"RPCA", "RASL"}
    assert sizes["folds"] <= sizes["tuning"] and sizes["weights"] == tuple(sorted(sizes["weights"]))


# products

def test_wood(wood):
    assert_disjoint(wood)
    assert_cracked(wood, 4)
    assert [len(part) for part in wood.dataset.splits.values()] == [10, 6, 8] and wood.dataset.test[0].image.shape == (32, 32, 3)
    again, other = open_product("wood_simulated", WOOD_SIZES), open_product("wood_simulated", WOOD_SIZES, seed=1)
    assert again.dataset.fingerprint() == wood.dataset.fingerprint() != other.dataset.fingerprint()
    assert [sample.image.tobytes() for sample in again.tuning] == [sample.image.tobytes() for sample in wood.tuning]


@pytest.mark.parametrize("truth", ["simulated", "real"])
def test_elpv(elpv_tree, truth):
    product = open_product("elpv", sizes_of("smoke"), truth=truth, root=elpv_tree)
    assert_disjoint(product)
    assert [len(part) for part in product.dataset.splits.values()] == [10, 6, 8]
    if truth == "simulated":
        assert_cracked(product, 4)
    else:
        assert {sample.mask_source for sample in product.dataset.test} == {None} and len({s.label for s in product.dataset.test}) == 2


@pytest.mark.parametrize("truth", ["simulated", "real"])
def test_generated_tiles(tmp_path, truth):
    sizes = {**sizes_of("smoke", "magnetic_tile"), "at_most": {"train": 12, "validation": 6, "test": 12}, "tests": 3}
    product = open_product("magnetic_tile", sizes, truth=truth, root=tile_tree(tmp_path, tiles=10))
    assert_disjoint(product)
    tiles = [{sample.name.split("_num_")[1][:2] for sample in part} for part in (product.dataset.train, product.dataset.validation)]
    assert not tiles[0] & tiles[1], "exposures of one tile lie together"
    if truth == "simulated":
        assert_cracked(product, 3)
    else:
        assert all(sample.mask.any() for sample in product.dataset.test if sample.label) and not product.dataset.simulated


def test_real_tiles(data_root):
    """The real set, where it is; the first images of validation would all be of the dark exposures."""
    if not (data_root / "MagneticTile").is_dir():
        pytest.skip(f"{data_root} holds no MagneticTile: the real tiles were not opened")
    product = open_product("magnetic_tile", sizes_of("smoke", "magnetic_tile"))
    assert_disjoint(product)
    assert_cracked(product, 4)


@pytest.mark.parametrize("category, suffix, mask", [("02", ".png", "{}.png"), ("03", ".bmp", "{}.bmp")])
def test_btad(tmp_path, category, suffix, mask):
    root = write_tree(tmp_path, category, "ok", suffix, "ko", mask, good=20)
    cracked = open_product("btad", WOOD_SIZES, category, root=root)
    assert_disjoint(cracked)
    assert_cracked(cracked, 1)  # two sound test images: one cracked, one left
    real = open_product("btad", WOOD_SIZES, category, "real", root)
    assert_disjoint(real)
    assert [len(part) for part in real.dataset.splits.values()] == [10, 2, 5] and sum(s.mask.any() for s in real.dataset.test) == 3
    assert {sample.image.shape for sample in real.dataset.samples} == {(32, 32, 3)} and {s.mask.shape for s in real.dataset.test} == {(32, 32)}


def test_a_folder_with_masks(tmp_path):
    product = open_product("folder", sizes_of("smoke", "folder"), "discs", "real", write_tree(tmp_path, good=30))
    assert_disjoint(product)
    assert [len(part) for part in product.dataset.splits.values()] == [10, 3, 5] and sum(s.label for s in product.dataset.test) == 3


def test_tuning_images_lie_evenly_over_validation():
    names = [sample.name for sample in open_product("wood_simulated", {**WOOD_SIZES, "tuning": 3}).tuning]
    assert names == [f"validation_{i:04d} cracked" for i in (1, 3, 5)]


def test_products_that_cannot_be_opened_are_named(tmp_path):
    with pytest.raises(ParameterError, match="did you mean 'real'"):
        open_product("wood_simulated", WOOD_SIZES, truth="reel")
    with pytest.raises(DataError, match="did you mean 'elpv'"):
        open_product("elpw", WOOD_SIZES)
    with pytest.raises(ParameterError, match="did you mean 'small'"):
        sizes_of("smal")
    root = write_tree(tmp_path, good=20)
    for path in (root / "discs" / "test" / "good").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="0 normal ones"):
        open_product("folder", WOOD_SIZES, "discs", root=root)
    with pytest.raises(DataError, match="did you mean 'discs'"):
        open_product("folder", WOOD_SIZES, "disks", root=root)


# rows

@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_fitted_tuned_judged_and_stored(rows, wood, method):
    run = rows(method)
    images, tuning, figures = run.table("images"), run.table("tuning"), set(run.metrics.metric)
    assert {"image_auroc", "pixel_auroc", "aupro", "dice", "dice_oracle", "dice_rescaled", "dice_rescaled_oracle", "false_alarm_area",
            "false_alarm_area_rescaled", "tuned_dice", "tuned_threshold", "tuned_dice_rescaled"} <= figures
    assert not figures & {"tuned_weight"} or method in ("RPCA", "RASL", "PAEDID", "PAEDID, all patches")
    for end in ("", "_rescaled"):
        assert 0 <= run.value(f"dice{end}") <= run.value(f"dice{end}_oracle" if end else "dice_oracle") + 1e-9
        assert 0 <= run.value(f"false_alarm_area{end}") <= 1
    assert list(images.columns) == ["name", "kind", "dice", "rescaled_dice", "share"] and set(images.kind) == {"crack"}
    assert images.name.tolist() == [sample.name for sample in wood.dataset.test if sample.label]
    assert images.dice.mean() == pytest.approx(run.value("dice"), abs=1e-5)
    assert tuning.groupby("candidate").images.sum().tolist() == [5] * tuning.candidate.nunique() and set(tuning.fold) == {0, 1}
    assert run.provenance["preset"] == "smoke" and {"fit", "tune", "predict"} <= set(run.provenance["seconds"])
    assert run.params["parameters"]["method"] == method and len(run.panels()) == (6 if method == "PAEDID" else 3)
    assert {"map_on_defect", "map_elsewhere"} <= figures


def test_a_second_call_reads_the_store(rows, kitchen, wood, capsys):
    first = [rows(method) for method in ("PAE", "PAEDID")]

    def fails():
        raise AssertionError("fitted again")

    again = run_tuned("rows", [replace(kitchen.row(method), make=fails) for method in ("PAE", "PAEDID")], wood, kitchen.store, folds=2)
    assert [run.folder for run in again] == [run.folder for run in first]
    assert f"dice {first[1].value('dice'):.4f}" in capsys.readouterr().out
    for change in ({"folds": 3}, {"seed": 1}):
        with pytest.raises(AssertionError, match="fitted again"):
            run_tuned("rows", [replace(kitchen.row("PAE"), make=fails)], wood, kitchen.store, **{"folds": 2, **change})


def test_low_rank_candidates_go_by_their_weight(kitchen):
    usual = {"RPCA": 1 / 32, "RASL": 1 / (32 - 2 * 4)}
    for method, weight in usual.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made, _ = kitchen.candidates(method)
        assert list(made) == [weight] and made[weight].parameters["weight"] == weight


def test_one_patch_autoencoder_serves_four_rows(rows, kitchen):
    for method in ("PAE", "AE", "PAEDID", "PAEDID, all patches"):
        rows(method)
    assert set(kitchen.fits) <= {"PAE", "SSIM AE", "MemAE"}
    prior = kitchen.candidates("PAE")[0][""].prior
    assert prior.parameters["alpha"] == ALPHA and prior.widths == WOOD_SIZES["encoder"]
    plain = kitchen.candidates("AE")[0][""].prior
    assert type(plain) is AutoencoderPrior and plain.network is prior.network
    for method, alpha in (("PAEDID", ALPHA), ("PAEDID, all patches", 1.0)):
        made, seconds = kitchen.candidates(method)
        assert list(made) == list(WOOD_SIZES["weights"]) and seconds == kitchen.candidates("PAE")[1]
        assert all(one.prior.memory is prior.memory and one.parameters["prior"]["alpha"] == alpha for one in made.values())
        assert [one.parameters["weight"] for one in made.values()] == list(made)


def test_the_threshold_comes_from_the_tuning_images(rows, kitchen, wood):
    run, (made, _) = rows("PAEDID"), kitchen.candidates("PAEDID")
    maps = {weight: detector.predict(wood.tuning).maps for weight, detector in made.items()}
    tuned = tune(maps, [sample.mask for sample in wood.tuning], 2)
    assert run.value("tuned_weight") == tuned.choice and run.value("tuned_threshold") == pytest.approx(tuned.threshold)
    found, truth = made[tuned.choice].predict(wood.dataset.test).maps, [sample.mask for sample in wood.dataset.test]
    assert run.value("dice") == pytest.approx(dice_each(found, truth, tuned.threshold).mean())
    assert run.value("dice_oracle") == pytest.approx(dice_oracle(found, truth, "images").value)


def test_a_killed_fit_goes_on(wood, rows, tmp_path, monkeypatch):
    """Killed after its first epoch: the fit folder holds a checkpoint, and the second call ends as if nothing had been."""
    finish, done, store = Training.finish_round, [], RunStore(tmp_path / "store")

    def stop_after_one(self, **losses):
        finish(self, **losses)
        done.append(self.rounds)
        if len(done) == 1:
            raise KeyboardInterrupt

    whole = rows("PAE")  # before the training is broken
    monkeypatch.setattr(Training, "finish_round", stop_after_one)
    kitchen = Kitchen(wood, WOOD_SIZES, store, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        run_tuned("rows", [kitchen.row("PAE")], wood, store, folds=2)
    (checkpoint,) = (store.path / ".fits").glob("*/checkpoint/training.json")
    assert len(json.loads(checkpoint.read_text())["history"]) == 1 and not store.runs()
    kitchen = Kitchen(wood, WOOD_SIZES, store, device="cpu")
    (resumed,) = run_tuned("rows", [kitchen.row("PAE")], wood, store, folds=2)
    assert done == [1, 2] and resumed.id == whole.id
    assert resumed.metrics.equals(whole.metrics)
    later = Kitchen(wood, WOOD_SIZES, store, device="cpu")
    later.candidates("PAEDID")
    assert done == [1, 2], "a third process reads the finished fit"
    later.forget()
    assert not list((store.path / ".fits").glob("*/fitted")) and store.runs()


def test_without_a_store_it_fits_as_well(wood):
    made, seconds = Kitchen(wood, WOOD_SIZES, device="cpu").candidates("PAE")
    assert made[""].is_fitted and seconds["fit"] > 0


def test_rows_tell_apart_what_decides_the_result(kitchen, wood):
    row = kitchen.row("PAEDID")
    assert row.identity["alpha"] == ALPHA and row.identity == json.loads(json.dumps(row.identity)) and "at_most" not in row.identity["sizes"]
    other = Kitchen(wood, {**WOOD_SIZES, "weights": (1e-4,)}, device="cpu").row("PAEDID")
    assert other.identity != row.identity


def test_unknown_methods_are_named_before_anything_is_fitted(kitchen):
    for ask in (kitchen.row, kitchen.candidates):
        with pytest.raises(ParameterError, match="did you mean 'PAEDID'"):
            ask("PEADID")


def test_patchcore_remembers_an_even_part(kitchen):
    (detector,) = kitchen.candidates("PatchCore")[0].values()
    patches = (WOOD_SIZES["patchcore"]["image_size"] // 8) ** 2
    assert len(detector.bank) == int(WOOD_SIZES["patchcore"]["ratio"] * WOOD_SIZES["patchcore_train"] * patches)


def test_sets_that_differ_in_their_test_share_their_fits(wood, kitchen):
    fewer = Product(replace(wood.dataset, name="other", test=wood.dataset.test[:2]), wood.tuning)
    assert Kitchen(fewer, WOOD_SIZES, kitchen.store, device="cpu").data == kitchen.data
    other = replace(wood.dataset, train=wood.dataset.train[:-1])
    assert Kitchen(Product(other, wood.tuning), WOOD_SIZES, kitchen.store, device="cpu").data != kitchen.data


def test_a_row_of_ones_own(wood, tmp_path):
    """PAEDID with a plugged-in prior that has no parameters and no memory."""
    class Mean:
        def reconstruct(self, images):
            return np.broadcast_to(images.mean((1, 2), keepdims=True), images.shape)

    row = TunedRow("my own", {"version": 1}, lambda: ({1e-3: PAEDID(Mean(), 1e-3, 32)}, {"fit": 0.0}))
    (run,) = run_tuned("mine", [row], wood, RunStore(tmp_path / "store"), folds=2)
    assert len(run.panels()) == 3 and run.value("tuned_weight") == 1e-3 and run.value("dice") <= run.value("dice_oracle") + 1e-9


def test_defects_that_the_size_has_erased_leave_image_figures(wood, tmp_path):
    empty = [Sample(s.image, np.zeros((32, 32), np.uint8), s.label, s.name) if s.label else s for s in wood.dataset.test]
    (run,) = run_tuned("rows", [bright_row()], replace(wood, dataset=replace(wood.dataset, test=empty)), RunStore(tmp_path / "store"), folds=2)
    assert "image_auroc" in set(run.metrics.metric) and not {"dice", "pixel_auroc"} & set(run.metrics.metric)


def test_two_rows_of_one_name_are_refused(wood, tmp_path):
    with pytest.raises(ParameterError, match="one name twice"):
        run_tuned("rows", [bright_row(), bright_row()], wood, RunStore(tmp_path / "store"), folds=2)


# judging and pictures

def test_judging_is_the_definitions(wood):
    run = evaluate_fitted(Bright(-1), wood.dataset, ("image_auroc", "dice_oracle"))
    figures, table = judge(run, -100.0, 0.5)
    tests = wood.dataset.test
    by_hand = [dice(found >= -100, sample.mask) for found, sample in zip(run.prediction.maps, tests, strict=True) if sample.label]
    assert table.dice.tolist() == pytest.approx(by_hand) and figures["dice"] == pytest.approx(np.mean(by_hand))
    assert table.share.tolist() == pytest.approx([sample.mask.mean() for sample in tests if sample.label])
    cracked = [(found, sample.mask) for found, sample in zip(run.prediction.maps, tests, strict=True) if sample.label]
    for name, inside in (("map_on_defect", True), ("map_elsewhere", False)):
        assert figures[name] == pytest.approx(np.concatenate([found[(mask > 0) == inside] for found, mask in cracked]).mean(), rel=1e-5)
    sound = [np.mean(found >= -100) for found, sample in zip(run.prediction.maps, tests, strict=True) if not sample.label]
    assert figures["false_alarm_area"] == pytest.approx(np.mean(sound))
    cracked = [sample for sample in tests if sample.label]
    without = replace(run, dataset=replace(wood.dataset, test=cracked), prediction=Bright(-1).predict(cracked))
    assert set(figures) - set(judge(without, -100.0, 0.5)[0]) == {"false_alarm_area", "false_alarm_area_rescaled"}


def test_image_truth_alone_gives_image_auroc_and_no_dice(elpv_tree, tmp_path):
    product = open_product("elpv", sizes_of("smoke"), truth="real", root=elpv_tree)
    (run,) = run_tuned("cells", [bright_row()], product, RunStore(tmp_path / "store"), folds=2)
    figures = set(run.metrics.metric)
    assert "image_auroc" in figures and not {name for name in figures if name.startswith(("dice", "pixel", "aupro", "false"))}
    assert run.table("images") is None and run.table("tuning") is not None and 0 < len(run.panels()) <= 3


def test_pictures_of_other_peoples_data_stay_out_of_the_store(tmp_path, wood):
    root = write_tree(tmp_path / "btad", "03", "ok", ".bmp", "ko", "{}.bmp", good=20)
    for truth in ("simulated", "real"):
        product = open_product("btad", WOOD_SIZES, "03", truth, root)
        (run,) = run_tuned("btad", [bright_row()], product, RunStore(tmp_path / "store"), folds=2)
        assert run.panels() == [] and not list(run.folder.rglob("*.webp")) and 0 <= run.value("dice") <= 1
    shown = {name: may_show(replace(product.dataset, name=name)) for name in (
        "wood_simulated", "wood_simulated_cracks", "elpv", "elpv_simulated_cracks", "btad", "btad_simulated_cracks", "magnetic_tile",
        "magnetic_tile_simulated_cracks", "mvtec", "folder")}
    assert [name for name, may in shown.items() if may] == ["wood_simulated", "wood_simulated_cracks", "elpv", "elpv_simulated_cracks"]


def test_all_rows_show_the_same_images(rows):
    one, two = rows("PAE").panels(), rows("PAEDID").panels()[:3]
    assert [panel.name for panel in one] == [panel.name for panel in two] and [panel.choice for panel in one] == list(SHOWN)
    width = len(TITLES) * one[0].strip.shape[0] + (len(TITLES) - 1) * GUTTER
    assert {panel.strip.shape for panel in one} == {(one[0].strip.shape[0], width, 3)} and all(panel.strip.dtype == np.uint8 for panel in one)


def test_shown_images_are_chosen_by_the_size_of_the_defect():
    def sample(pixels: int, label: int = 1, known: bool = True) -> Sample:
        mask = np.zeros((8, 8), np.uint8)
        mask.flat[:pixels] = 255
        return Sample(np.zeros((8, 8, 3), np.uint8), mask if known else None, label)

    samples = [sample(0, 0, False), *(sample(n) for n in (5, 40, 20, 1, 10)), sample(0, 1, False)]
    assert shown_images(samples) == {"large": 2, "middle": 5, "small": 1}
    assert shown_images(samples[:2]) == dict.fromkeys(SHOWN, 1)
    assert list(shown_images([sample(0, 1, False)] * 9).values()) == [0, 3, 6]
    assert shown_images([sample(0, 0, False)]) == {}


def test_a_strip_shows_what_it_says(wood):
    sample, size = wood.dataset.test[[s.label for s in wood.dataset.test].index(1)], 32
    strip = mask_strip(sample, None, 1.0 * sample.mask, 0.5, (0.0, 1.0), size)
    assert strip.shape == (size, 5 * size + 4 * GUTTER, 3) and strip.dtype == np.uint8
    tiles = [strip[:, k * (size + GUTTER):k * (size + GUTTER) + size] for k in range(5)]
    assert (tiles[0] == sample.image).all() and (tiles[1][..., 0] == 255 * (sample.mask > 0)).all() and (tiles[4] == tiles[1]).all()
    assert (tiles[2] == UNKNOWN_COLOUR).all(), "no background, no picture"
    background = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    shown = mask_strip(Sample(sample.image, None, 1), background, 1.0 * sample.mask, 0.5, (0.0, 1.0), size)
    assert (shown[:, size + GUTTER:2 * size + GUTTER] == UNKNOWN_COLOUR).all(), "no annotation, no mask"
    assert (shown[:, 2 * (size + GUTTER):3 * size + 2 * GUTTER, 1] == np.round(255 * background)).all()


def test_backgrounds_are_in_the_panels_where_a_method_has_them(kitchen, wood):
    fitted = kitchen.candidates("PAE")[0][""]
    run = evaluate_fitted(fitted, wood.dataset)
    for detector, known in ((fitted, True), (Bright(), False)):
        panels = mask_panels(detector, run, 0.1)
        side = panels[0].strip.shape[0]
        tile = panels[0].strip[:, 2 * (side + GUTTER):3 * side + 2 * GUTTER]
        assert (tile != UNKNOWN_COLOUR).any() == known


def test_memory_panels_show_what_was_replaced(kitchen, wood):
    detector = PAEDID(kitchen.candidates("PAE")[0][""].prior.using(0.25), 1e-3, 32, "rgb")
    run = evaluate_fitted(Bright(), wood.dataset)
    panels, chosen = memory_panels(detector, run, 64), [wood.dataset.test[i] for i in shown_images(wood.dataset.test).values()]
    found = detector.prior.retrieve(detector.read(chosen).images)
    assert [panel.name for panel in panels] == [sample.name for sample in chosen] and {panel.choice for panel in panels} == {"memory"}
    for panel, distances, replaced in zip(panels, found.distances, found.replaced, strict=True):
        assert panel.strip.shape == (64, 5 * 64 + 4 * GUTTER, 3) and panel.score == pytest.approx(distances.max())
        blocks = panel.strip[::8, 2 * (64 + GUTTER):3 * 64 + 2 * GUTTER:8, 0]  # 8 x 8 patches of 8 px
        assert (blocks == 255 * replaced).all() and replaced.mean() == pytest.approx(0.25, abs=0.02)
        assert (distances[replaced] >= panel.threshold - 1e-6).all()


@pytest.mark.parametrize("threshold", [-5.0, 0.0, 1e-6, 1e6])
@pytest.mark.filterwarnings("error")
def test_any_threshold_can_be_shown(wood, threshold):
    for detector in (Bright(), Bright(-1)):
        assert len(mask_panels(detector, evaluate_fitted(detector, wood.dataset), threshold)) == 3


# what is refused

def test_a_test_without_defects_or_tuning_without_images_is_named(wood, tmp_path):
    store = RunStore(tmp_path / "store")
    with pytest.raises(DataError, match="no test image has a defect"):
        run_tuned("rows", [bright_row()], open_product("wood_simulated", WOOD_SIZES, truth="real"), store, folds=2)
    with pytest.raises(DataError, match="5 tuning images for 6 folds"):
        run_tuned("rows", [bright_row()], wood, store, folds=6)
    with pytest.raises(DataError, match="0 tuning images"):
        run_tuned("rows", [bright_row()], replace(wood, tuning=[]), store, folds=2)
    assert not store.runs()


def test_only_normal_images_are_trained_on(wood, tmp_path):
    dataset = replace(wood.dataset, train=[*read_wood(train=2, validation=0, test=0, size=32).train, wood.tuning[0]])
    with pytest.raises(DataError, match="among the normal images"):
        Kitchen(replace(wood, dataset=dataset), WOOD_SIZES, RunStore(Path(tmp_path)), device="cpu").candidates("PAE")

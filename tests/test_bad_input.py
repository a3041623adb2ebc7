"""Bad input: one line that names file, value and remedy, exit code 2, no traceback, nothing half-written in the store."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from defectbook.core import DataError, ParameterError, Sample, StoreError, WeightsError
from defectbook.data.datasets import read_elpv, read_folder
from defectbook.data.sources import find_data, find_weights
from defectbook.methods.patchcore import PatchCore
from defectbook.models.features import Backbone, read_state
from defectbook.practice.cli import main
from defectbook.practice.runs import RunStore

SMOKE = ["-p", "preset=smoke", "-p", "device=cpu", "-p", "normal=6"]


def run(tmp_path: Path, capsys, *words: str) -> tuple[int, str]:
    """Exit code and standard error of `defectbook run patchcore_elpv` with a store in tmp_path."""
    code = main(["run", "patchcore_elpv", "--output", str(tmp_path / "executed"), "-p", f"store={tmp_path / 'store'}", *SMOKE, *words])
    return code, capsys.readouterr().err


def assert_refused(code: int, err: str, *words: str) -> None:
    own = [line for line in err.splitlines() if line.startswith("defectbook: ")]
    assert code == 2 and len(own) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in own[0], own[0]


def assert_store_is_empty(tmp_path: Path) -> None:
    assert not list((tmp_path / "store").rglob("*.*")) if (tmp_path / "store").exists() else True


def test_missing_data_root(tmp_path, capsys) -> None:
    code, err = run(tmp_path, capsys, "-p", f"data_root={tmp_path / 'nowhere'}")
    assert_refused(code, err, str(tmp_path / "nowhere"), "no such data folder", "defectbook[elpv]")
    assert_store_is_empty(tmp_path)


def test_truncated_image_in_the_set(tmp_path, capsys, elpv_tree) -> None:
    victim = sorted((elpv_tree / "images").iterdir())[-1]
    victim.write_bytes(victim.read_bytes()[:300])
    code, err = run(tmp_path, capsys, "-p", f"data_root={elpv_tree}")
    assert_refused(code, err, str(victim), "cannot be read as an image", "restore or remove")
    assert_store_is_empty(tmp_path)


def test_store_that_cannot_be_written(tmp_path, capsys, elpv_tree) -> None:
    (tmp_path / "store").write_text("a file where the store should be")
    code, err = run(tmp_path, capsys, "-p", f"data_root={elpv_tree}")
    assert_refused(code, err, str(tmp_path / "store"), "choose another output folder")
    assert (tmp_path / "store").read_text() == "a file where the store should be"


def test_unknown_experiment(capsys) -> None:
    assert_refused(main(["run", "pathcore_elpv"]), capsys.readouterr().err, "'pathcore_elpv'", "did you mean 'patchcore_elpv'?", "valid names are")


def test_unknown_parameter(tmp_path, capsys) -> None:
    assert_refused(*run(tmp_path, capsys, "-p", "sede=1"), "'sede'", "did you mean 'seed'?", "cell_type")


def test_parameter_of_the_wrong_type(tmp_path, capsys) -> None:
    assert_refused(*run(tmp_path, capsys, "-p", "seed=many"), "seed='many'", "expected int")


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ParameterError):
        main(["run", "pathcore_elpv", "--debug"])


def test_executed_notebooks_folder_that_cannot_be_made(tmp_path, capsys) -> None:
    (tmp_path / "taken").write_text("")
    code = main(["run", "patchcore_elpv", "--output", str(tmp_path / "taken" / "runs"), *SMOKE])
    assert_refused(code, capsys.readouterr().err, str(tmp_path / "taken" / "runs"), "choose another output folder")


def test_unknown_category(mvtec_tree) -> None:
    with pytest.raises(DataError, match="unknown category 'plat': did you mean 'plate'?"):
        read_folder(mvtec_tree, "plat")
    with pytest.raises(ParameterError, match="did you mean 'mono'"):
        read_elpv(category="momo")


def test_empty_normal_set(mvtec_tree) -> None:
    for path in (mvtec_tree / "plate" / "train" / "good").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"train/good: no normal images; put at least one"):
        read_folder(mvtec_tree, "plate")
    with pytest.raises(DataError, match="no normal images to fit"):
        PatchCore(image_size=64, device="cpu").fit([])


def test_too_few_normal_images(elpv_tree) -> None:
    with pytest.raises(DataError, match="100 normal images were asked for but only 24 are there"):
        read_elpv(elpv_tree, normal=90, validation=10)


def test_mask_of_another_size(mvtec_tree) -> None:
    victim = mvtec_tree / "plate" / "ground_truth" / "hole" / "001_mask.png"
    Image.new("L", (32, 32)).save(victim)
    with pytest.raises(DataError, match=r"001_mask.png: mask of 32x32 px for an image of 64x64 px .*; export both at one size"):
        read_folder(mvtec_tree, "plate")


def test_missing_mask(mvtec_tree) -> None:
    (mvtec_tree / "plate" / "ground_truth" / "hole" / "001_mask.png").unlink()
    with pytest.raises(DataError, match="no mask for .*hole/001.png; add it, or remove"):
        read_folder(mvtec_tree, "plate")


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "P", "LA"])
def test_other_image_modes_are_read_right(mode, mvtec_tree) -> None:
    """A grey, RGBA or 16-bit version of an image gives the same pixels as the RGB one."""
    path = mvtec_tree / "plate" / "train" / "good" / "000.png"
    before = Sample(path).image
    grey = Image.fromarray(before[..., 0])
    if mode == "I;16":
        Image.fromarray(before[..., 0].astype(np.uint16) * 257).save(path)
    else:
        grey.convert(mode).save(path)
    assert (Sample(path).image == before).all()
    assert len(read_folder(mvtec_tree, "plate").train) == 5


def test_weights_with_another_hash(tmp_path, monkeypatch) -> None:
    real = find_weights("efficientnet_lite0")
    wrong = tmp_path / real.name
    content = bytearray(real.read_bytes())
    content[len(content) // 2] ^= 1
    wrong.write_bytes(content)
    with pytest.raises(WeightsError, match=r"sha256 is [0-9a-f]{16}\.\.\., expected 579344248a93e230"):
        find_weights("efficientnet_lite0", wrong)
    monkeypatch.setenv("DEFECTBOOK_WEIGHTS", str(tmp_path))  # an explicit folder is not passed over in silence
    with pytest.raises(WeightsError, match="delete it and fetch it again"):
        Backbone("efficientnet_lite0")


def test_weights_that_are_no_weights(tmp_path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(WeightsError, match="w.pth: cannot be read as weights"):
        read_state(path)


def test_weights_that_would_run_code_are_refused(tmp_path) -> None:
    import pickle

    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    path = tmp_path / "trap.pth"
    path.write_bytes(pickle.dumps({"weight": Trap()}))
    with pytest.raises(WeightsError):
        read_state(path)
    assert not (tmp_path / "ran").exists()


def test_unknown_names() -> None:
    with pytest.raises(ParameterError, match="did you mean 'wide_resnet50_2'"):
        Backbone("wide_resnet50")
    with pytest.raises(ParameterError, match="layers"):
        Backbone("efficientnet_lite0", layers=(2, 9))
    with pytest.raises(ParameterError, match="coreset 'gredy': did you mean 'greedy'"):
        PatchCore(coreset="gredy")
    with pytest.raises(DataError, match="did you mean 'elpv'"):
        find_data("elpw")


def test_missing_data_names_the_places(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEFECTBOOK_DATA", str(tmp_path / "mine"))
    with pytest.raises(DataError) as caught:
        find_data("mvtec")
    for word in (str(tmp_path / "mine" / "mvtec"), "data/raw/mvtec", "https://www.mvtec.com"):
        assert word in str(caught.value)


def test_store_is_checked_before_the_work(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose another output folder"):
        RunStore(tmp_path / "file").check_writable()


def test_defects_among_the_normal_images(mvtec_tree) -> None:
    dataset = read_folder(mvtec_tree, "plate")
    with pytest.raises(DataError, match="test/hole/000: label 1 among the normal images"):
        PatchCore(image_size=64, device="cpu").fit([*dataset.train, *[s for s in dataset.test if s.label]])


def test_cuda_where_there_is_none() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ParameterError, match="sees no GPU; use device=cpu or auto"):
        PatchCore(device="cuda")
    with pytest.raises(ParameterError, match="is not a torch device"):
        PatchCore(device="gpu0")


def test_text_parameters_are_taken_as_typed() -> None:
    """1,4,12 would be a tuple to Python; an experiment that takes text gets text."""
    from defectbook.practice.cli import _assignments

    assert _assignments("pros_adapters", ["adapters=1,4,12", "epochs=50", "seed=3", "store=none"]) == {
        "adapters": "1,4,12", "epochs": "50", "seed": 3, "store": "none"}

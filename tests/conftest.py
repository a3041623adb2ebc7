"""What all tests share: quiet progress bars, tiny data sets, and the table of seconds a notebook."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ["DEFECTBOOK_PROGRESS"] = "0"
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK_SECONDS: dict[str, float] = {}
BUDGET = 15  # seconds a notebook at preset smoke, on two cores


@pytest.fixture
def data_root() -> Path:
    """The folder of the real data sets; skips, naming what is missing, where there is none."""
    if not os.environ.get("DEFECTBOOK_DATA"):
        pytest.skip("DEFECTBOOK_DATA is not set: the real data sets (DeepPCB, MagneticTile, mvtec_transistor_384) were not tested")
    return Path(os.environ["DEFECTBOOK_DATA"])


def noise(seed: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """A smooth grey texture, uint8 (h, w, 3)."""
    rng = np.random.default_rng(seed)
    small = rng.integers(90, 160, (size[0] // 8, size[1] // 8), np.uint8)
    return np.asarray(Image.fromarray(small).resize(size[::-1], Image.BILINEAR).convert("RGB"))


@pytest.fixture
def elpv_tree(tmp_path: Path) -> Path:
    """A generated folder in ELPV's layout: 24 functional and 6 defective mono cells of 64 px."""
    root = tmp_path / "elpv"
    (root / "images").mkdir(parents=True)
    rows = []
    for i in range(30):
        image = noise(i).copy()
        if i >= 24:
            image[20:40, 10:50] = 5
        Image.fromarray(image[..., 0]).save(root / "images" / f"cell{i:04}.png")
        rows.append(f"images/cell{i:04}.png  {1.0 if i >= 24 else 0.0}  mono")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def mvtec_tree(tmp_path: Path) -> Path:
    """A generated folder in MVTec layout with one category, `plate`: 6 + 2 good images, 2 of kind `hole` with masks."""
    root = tmp_path / "mvtec"
    for part, count in (("train/good", 6), ("test/good", 2), ("test/hole", 2)):
        (root / "plate" / part).mkdir(parents=True)
        for i in range(count):
            image = noise(len(part) + i).copy()
            if "hole" in part:
                image[24:40, 24:40] = 0
            Image.fromarray(image).save(root / "plate" / part / f"{i:03}.png")
    truth = root / "plate" / "ground_truth" / "hole"
    truth.mkdir(parents=True)
    mask = np.zeros((64, 64), np.uint8)
    mask[24:40, 24:40] = 255
    for i in range(2):
        Image.fromarray(mask).save(truth / f"{i:03}_mask.png")
    return root


def pytest_terminal_summary(terminalreporter) -> None:
    if NOTEBOOK_SECONDS:
        terminalreporter.section("seconds a notebook")
        for name, seconds in sorted(NOTEBOOK_SECONDS.items(), key=lambda item: -item[1]):
            terminalreporter.write_line(f"{seconds:6.1f}  {name}{'  over its budget' if seconds > BUDGET else ''}")
        terminalreporter.write_line(f"{sum(NOTEBOOK_SECONDS.values()):6.1f}  all {len(NOTEBOOK_SECONDS)}")

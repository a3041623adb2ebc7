"""Generated data sets in the layouts of the public ones: small enough for a test, right in every detail that a reader looks at."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def noise(seed: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 200, (*size, 3), np.uint8)


def spot(size: tuple[int, int] = (48, 64), value: int = 255, top: int = 10) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[top:top + 10, 20:40] = value
    return mask


def mvtec_tree(root: Path, category: str = "discs", normal: str = "good", suffix: str = ".png", defect: str = "dot",
               mask_name: str = "{}_mask.png", good: int = 6) -> Path:
    base = root / category
    for part, count in ((f"train/{normal}", good), (f"test/{normal}", 2), (f"test/{defect}", 3)):
        for i in range(count):
            write_image(base / part / f"{i:03}{suffix}", noise(i + 10 * len(part)))
    for i in range(3):
        write_image(base / "ground_truth" / defect / mask_name.format(f"{i:03}"), spot())
    return root


def btad_tree(root: Path) -> Path:
    """Product 01 and 03 are bmp, 02 is png, as in the published archive."""
    for category, suffix in (("01", ".bmp"), ("02", ".png"), ("03", ".bmp")):
        mvtec_tree(root, category, "ok", suffix, "ko", "{}.bmp" if category == "03" else "{}.png")
    return root


def visa_tree(root: Path, objects: tuple[str, ...] = ("candle", "pcb1")) -> Path:
    """Masks hold 1 and 2, one value for each kind of defect."""
    rows = []
    for name in objects:
        for i in range(8):
            path = f"{name}/Data/Images/Normal/{i:04}.JPG"
            Image.fromarray(noise(i)).save(_parent(root / path), format="JPEG")
            rows.append((name, "train" if i < 6 else "test", "normal", path, ""))
        for i in range(2):
            path, mask = f"{name}/Data/Images/Anomaly/{i:03}.JPG", f"{name}/Data/Masks/Anomaly/{i:03}.png"
            Image.fromarray(noise(50 + i)).save(_parent(root / path), format="JPEG")
            write_image(root / mask, spot(value=1 + i))
            rows.append((name, "test", "anomaly", path, mask))
    with open(_parent(root / "split_csv" / "1cls.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("object", "split", "label", "image", "mask"))
        writer.writerows(rows)
    return root


def deeppcb_tree(root: Path, pairs: int = 6) -> Path:
    """Traces with an open and a pin-hole; the first four pairs are for training. One board is RGB, as some published ones are."""
    lists: dict[str, list[str]] = {"trainval": [], "test": []}
    for i in range(pairs):
        group = f"{i % 2:05}"
        base = root / "PCBData" / f"group{group}"
        template = np.zeros((64, 64), np.uint8)
        template[28:36], template[50:60, 10:20] = 255, 255
        board = template.copy()
        board[28:36, 20:26] = 0
        board[53:56, 13:16] = 0
        stem = f"{group}{i:03}"
        write_image(base / group / f"{stem}_temp.jpg", template, quality=95)
        write_image(base / group / f"{stem}_test.jpg", np.repeat(board[..., None], 3, axis=2) if i == 0 else board, quality=95)
        (base / f"{group}_not").mkdir(exist_ok=True)
        (base / f"{group}_not" / f"{stem}.txt").write_text("16 24 30 40 1\n10 50 20 60 6\n")
        lists["trainval" if i < 4 else "test"].append(f"group{group}/{group}/{stem}.jpg group{group}/{group}_not/{stem}.txt")
    for name, lines in lists.items():
        (root / "PCBData" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def smooth(seed: int, size: tuple[int, int]) -> np.ndarray:
    """A soft random surface: its hash survives a change of exposure, and another seed's is far away."""
    coarse = np.random.default_rng(seed).integers(40, 200, (8, 8), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def tile_tree(root: Path, kinds: tuple[str, ...] = ("Blowhole", "Break", "Crack", "Fray", "Uneven", "Free"), tiles: int = 4,
              exposures: int = 3) -> Path:
    """`tiles` tiles of each kind under `exposures` exposures; masks are soft at the edge (90 is no defect, 180 is)."""
    for k, kind in enumerate(kinds):
        for tile in range(tiles):
            size = (64 + 2 * tile, 48)
            surface = smooth(100 * k + tile, size)
            for e in range(exposures):
                number = 10000 * (k + 1) + 1000 * tile + 20 * e
                stem = root / f"MT_{kind}" / "Imgs" / f"exp{e + 1}_num_{number}"
                write_image(stem.with_suffix(".jpg"), np.clip(surface * (0.7 + 0.15 * e), 0, 255).astype(np.uint8), quality=95)
                mask = np.zeros(size, np.uint8)
                if kind != "Free":
                    left = 2 + 4 * k
                    mask[10 + 5 * tile:22 + 5 * tile, left:left + 20] = 180
                    mask[9 + 5 * tile, left:left + 20] = 90
                write_image(stem.with_suffix(".png"), mask)
    return root


def elpv_tree(root: Path, cells: int = 12) -> Path:
    """Cells of both types; the last four are certainly defective, two are doubtful."""
    lines = []
    for i in range(cells):
        write_image(root / "images" / f"cell{i:04}.png", noise(i, (30, 30))[:, :, 0])
        probability = 1.0 if i >= cells - 4 else 0.3333333333333333 if i in (0, 1) else 0.0
        lines.append(f"images/cell{i:04}.png  {probability}     {'mono' if i % 2 else 'poly'}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def cut_short(path: Path, keep: float = 0.5) -> Path:
    """Cut a file in the middle, as a broken copy does."""
    content = path.read_bytes()
    path.write_bytes(content[:int(keep * len(content))])
    return path

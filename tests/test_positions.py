"""The memory by position against the obvious double loop: what is nearest, what is replaced, what is on a disk, what is refused."""

import errno
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, StoreError
from defectbook.models import positions
from defectbook.models.positions import PositionMemory, estimate_positions, replace_foreign


def cosines(stored: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Of one query and vectors (n, c), in float64; 0 where a vector has no length."""
    lengths = np.linalg.norm(stored, axis=1) * np.linalg.norm(asked)
    return np.divide(stored @ asked, lengths, out=np.zeros(len(stored)), where=lengths > 0)


def make_maps(kind: str, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=shape)
    if kind == "duplicates":
        maps = maps[rng.integers(0, 2, len(maps)) % max(1, len(maps))]
    if kind == "zeros":
        maps[rng.random(shape[:3]) < 0.4] = 0
    if kind == "integers":  # exact ties, opposite vectors, vectors of many lengths
        maps = rng.integers(-2, 3, shape)
    return maps.astype(np.float32)


def memory_of(maps: np.ndarray, **options) -> PositionMemory:
    return PositionMemory.build([maps], len(maps), maps.shape[1:], device="cpu", **options)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(["normal", "duplicates", "zeros", "integers"]), st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 5),
       st.integers(1, 4), st.integers(1, 4), st.integers(1, 9))
def test_the_nearest_is_that_of_the_double_loop(kind: str, seed: int, images: int, count: int, height: int, width: int, depth: int) -> None:
    stored, queries = make_maps(kind, seed, (images, height, width, depth)), make_maps(kind, seed + 1, (count, height, width, depth))
    memory = memory_of(stored)
    matched, distances, chosen = memory.retrieve(queries)
    assert matched.shape == queries.shape and distances.shape == chosen.shape == queries.shape[:3] and len(memory) == images
    assert (matched.dtype, distances.dtype, chosen.dtype) == (np.float32, np.float32, np.int64)
    for b, i, j in np.ndindex(*queries.shape[:3]):
        expected = cosines(stored[:, i, j].astype(np.float16).astype(np.float64), queries[b, i, j].astype(np.float64))
        assert distances[b, i, j] == pytest.approx(1 - expected.max(), abs=2e-6) and 0 <= distances[b, i, j] <= 2
        assert expected[chosen[b, i, j]] == pytest.approx(expected.max(), abs=2e-6)  # of near ties any
        assert (matched[b, i, j] == stored[chosen[b, i, j], i, j].astype(np.float16)).all()


def test_a_vector_finds_itself_and_only_at_its_own_position() -> None:
    maps = make_maps("normal", 0, (7, 3, 4, 6))
    matched, distances, chosen = memory_of(maps).retrieve(maps)
    assert (chosen == np.arange(7)[:, None, None]).all() and distances.max() < 1e-5 and (matched == maps.astype(np.float16)).all()
    moved = np.roll(maps, 1, axis=2)
    assert memory_of(maps).retrieve(moved)[1].min() > 1e-3


def test_zero_vectors_are_at_distance_one_from_all() -> None:
    maps = make_maps("normal", 1, (4, 2, 2, 5))
    assert (memory_of(maps).retrieve(np.zeros((1, 2, 2, 5), np.float32))[1] == 1).all()
    matched, distances, chosen = memory_of(np.zeros_like(maps)).retrieve(maps)
    assert (distances == 1).all() and not matched.any() and np.isfinite(distances).all()
    opposite = np.concatenate([-maps[:1], np.zeros_like(maps[:1])])  # nothing is nearer than the contrary
    assert (memory_of(opposite).retrieve(maps[:1])[2] == 1).all() and (memory_of(-maps[:1]).retrieve(maps[:1])[1] > 1.99).all()


def test_length_plays_no_part() -> None:
    stored, queries = make_maps("normal", 2, (20, 3, 3, 8)), make_maps("normal", 3, (4, 3, 3, 8))
    memory = memory_of(stored)
    matched, distances, chosen = memory.retrieve(queries)
    for factor in (2.0**-10, 2.0, 2.0**20):  # powers of two: the same bits
        scaled = memory.retrieve(queries * np.float32(factor))
        assert all((a == b).all() for a, b in zip(scaled, (matched, distances, chosen), strict=True))
    lengths = np.float32(2.0) ** np.random.default_rng(0).integers(-3, 4, (20, 3, 3, 1))
    _, scaled, others = memory_of(stored * lengths).retrieve(queries)
    assert (others == chosen).all() and np.abs(scaled - distances).max() < 1e-6


@pytest.mark.parametrize("block_mb", [1e-9, 1e-3, 0.01, 0.05])
def test_blocks_change_nothing(block_mb: float) -> None:
    """A matrix product of one position may round otherwise than one of many (it depends on the processor): distances to float32's accuracy."""
    memory, queries = memory_of(make_maps("normal", 4, (30, 5, 7, 16))), make_maps("normal", 5, (6, 5, 7, 16))
    whole, parts = memory.retrieve(queries), memory.retrieve(queries, block_mb)
    assert (whole[0] == parts[0]).all() and (whole[2] == parts[2]).all()
    assert np.abs(whole[1] - parts[1]).max() < 1e-6


def test_how_the_maps_arrive_changes_no_bit() -> None:
    maps = make_maps("normal", 6, (9, 3, 4, 5))
    whole = memory_of(maps).vectors
    assert whole.dtype == np.float16 and whole.shape == (3, 4, 9, 5) and (whole == maps.transpose(1, 2, 0, 3).astype(np.float16)).all()
    for cuts in ([2, 5], [1, 2, 3, 4, 5, 6, 7, 8], [0, 9]):
        parts = PositionMemory.build(iter(np.split(maps, cuts)), 9, (3, 4, 5), device="cpu")
        assert parts.vectors.tobytes() == whole.tobytes()


# On a disk

def test_on_a_disk_it_is_the_same_memory(tmp_path, capsys) -> None:
    maps, queries = make_maps("normal", 7, (40, 4, 4, 12)), make_maps("normal", 8, (5, 4, 4, 12))
    inside = memory_of(maps, limit_mb=1)
    assert capsys.readouterr().err == "" and not isinstance(inside.vectors, np.memmap)
    mapped = memory_of(maps, limit_mb=0, folder=tmp_path / "new")
    assert isinstance(mapped.vectors, np.memmap) and list((tmp_path / "new").iterdir()) == []  # the file has no name, so nothing is left
    assert all(a.tobytes() == b.tobytes() for a, b in zip(inside.retrieve(queries), mapped.retrieve(queries), strict=True))
    assert mapped.vectors.tobytes() == inside.vectors.tobytes() and (mapped.lengths == inside.lengths).all()
    assert mapped.extended(maps[:3]).vectors.tobytes() == inside.extended(maps[:3]).vectors.tobytes()


def test_the_estimate_is_what_the_arrays_take() -> None:
    memory = memory_of(make_maps("normal", 9, (11, 3, 5, 7)))
    assert memory.vectors.nbytes + memory.lengths.nbytes == estimate_positions((3, 5, 7), 11) == estimate_positions(memory.shape, len(memory))


def test_the_limit_is_the_estimates(tmp_path, capsys) -> None:
    maps = make_maps("normal", 10, (4, 2, 2, 3))
    limit = estimate_positions((2, 2, 3), 4) / 1e6
    assert not isinstance(memory_of(maps, limit_mb=limit).vectors, np.memmap) and not capsys.readouterr().err
    assert isinstance(memory_of(maps, limit_mb=limit - 1e-6, folder=tmp_path).vectors, np.memmap) and capsys.readouterr().err


def test_the_default_limit_is_half_of_the_free_memory(tmp_path, monkeypatch) -> None:
    maps = make_maps("normal", 10, (4, 2, 2, 3))
    size = estimate_positions((2, 2, 3), 4)
    for free, mapped in ((2 * size, False), (2 * size - 2, True)):
        monkeypatch.setattr(positions, "available_memory", lambda free=free: free)
        assert isinstance(memory_of(maps, folder=tmp_path).vectors, np.memmap) is mapped


def test_the_estimate_is_printed_before_anything_is_allocated(tmp_path, capsys, monkeypatch) -> None:
    events, open_file, allocate = [], tempfile.TemporaryFile, np.memmap

    def opens(*args, **options):
        events.append(("file", capsys.readouterr().err))
        return open_file(*args, **options)

    def maps_memory(*args, **options):
        events.append(("memory map", capsys.readouterr().err))
        return allocate(*args, **options)

    monkeypatch.setattr(positions.tempfile, "TemporaryFile", opens)
    monkeypatch.setattr(positions.np, "memmap", maps_memory)
    memory_of(np.zeros((500, 4, 4, 60), np.float32), limit_mb=0.5, folder=tmp_path)
    message = f"memory of 500 images at 4x4 positions of 60: 1 MB, above the limit of 0 MB; kept in a file in {tmp_path}\n"
    assert events == [("file", message), ("memory map", "")]


def test_a_full_disk_is_named_before_a_map_is_asked_for(tmp_path, monkeypatch) -> None:
    class Full:
        """A file on a disk that takes two rows."""

        def __init__(self, dir):
            self.file, self.rows = open_file(dir=dir), 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content) -> None:
            self.rows += 1
            if self.rows > 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(content)

    def never(*_, **__):
        raise AssertionError("allocated although the disk is full")

    def blocks():
        never()
        yield

    open_file = tempfile.TemporaryFile
    monkeypatch.setattr(positions.tempfile, "TemporaryFile", Full)
    monkeypatch.setattr(positions.np, "memmap", never)
    with pytest.raises(DataError, match=r"cannot hold 1 MB of vectors \(No space left on device\); give another folder") as caught:
        PositionMemory.build(blocks(), 500, (4, 4, 60), limit_mb=0, folder=tmp_path, device="cpu")
    assert str(caught.value).startswith(str(tmp_path)) and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        memory_of(make_maps("normal", 0, (2, 2, 2, 2)), limit_mb=0, folder=tmp_path / "file")


# More images, other images

def test_extended_by_what_comes_off_the_line() -> None:
    maps = make_maps("normal", 11, (9, 3, 3, 4))
    memory = memory_of(maps[:6])
    longer = memory.extended(maps[6:])
    assert len(memory) == 6 and len(longer) == 9 and longer.device == "cpu"
    assert longer.vectors.tobytes() == memory_of(maps).vectors.tobytes() and (longer.lengths == memory_of(maps).lengths).all()
    assert len(memory.extended(maps[:0])) == 6
    for wrong, message in ((maps[:, :2], "use images of one size"), (maps[0], "use images of one size"), (maps * np.inf, "float16")):
        with pytest.raises(DataError, match=message):
            memory.extended(wrong)


@pytest.mark.parametrize("limit_mb", [None, 0])
@pytest.mark.parametrize("blocks, message", [
    ([(5, 2, 2, 3)], "5 latent maps where 6 were announced"), ([], "0 latent maps where 6"),
    ([(4, 2, 2, 3), (3, 2, 2, 3)], "at least 7 latent maps where 6"),
    ([(3, 2, 2, 3), (3, 2, 3, 3)], r"maps of \(2, 3, 3\) for a memory of \(2, 2, 3\)"), ([(6, 2, 2, 4)], r"\(2, 2, 4\)"), ([(6, 12)], r"\(12,\)")])
def test_maps_that_do_not_fit_are_counted_and_named(tmp_path, limit_mb, blocks, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PositionMemory.build((np.zeros(shape, np.float32) for shape in blocks), 6, (2, 2, 3), limit_mb, tmp_path, "cpu")


@pytest.mark.parametrize("value", [65520, -7e4, 1e30, np.inf, np.nan])
def test_what_float16_cannot_hold_is_named(value: float) -> None:
    maps = make_maps("normal", 12, (3, 2, 2, 3))
    maps[1, 1, 0, 2] = value
    with pytest.raises(DataError, match="do not fit into float16; normalise the encoder's output"):
        memory_of(maps)
    maps[1, 1, 0, 2] = 65000
    assert np.isfinite(memory_of(maps).retrieve(maps)[1]).all() and memory_of(maps).retrieve(maps)[1].max() < 1e-5  # lengths in float32


@pytest.mark.parametrize("vectors", [np.zeros((2, 2, 3), np.float16), np.zeros((2, 2, 3, 4), np.float32), np.zeros((2, 2, 0, 4), np.float16),
                                     np.zeros((0, 2, 3, 4), np.float16)])
def test_vectors_of_another_kind_are_no_memory(vectors: np.ndarray) -> None:
    with pytest.raises(DataError, match="a memory by position holds float16"):
        PositionMemory(vectors, "cpu")


def test_queries_of_another_kind_are_refused() -> None:
    memory = memory_of(make_maps("normal", 13, (3, 2, 2, 4)))
    for shape in ((1, 2, 3, 4), (1, 2, 2, 5), (2, 2, 4)):
        with pytest.raises(DataError, match=r"asked of a memory of \(2, 2, 4\); use images of the size it was built with"):
            memory.retrieve(np.zeros(shape, np.float32))
    for value in (np.nan, np.inf):
        with pytest.raises(DataError, match="NaN or infinity"):
            memory.retrieve(np.full((1, 2, 2, 4), value, np.float32))
    with pytest.raises(DataError, match="NaN or infinity"):  # finite as it is, not in float32
        memory.retrieve(np.full((1, 2, 2, 4), 1e300))


# Replacing

@settings(max_examples=120, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 4), st.integers(1, 9), st.integers(1, 9), st.floats(0.001, 0.999))
def test_the_share_with_the_largest_distance_is_replaced(seed: int, count: int, height: int, width: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    maps, matched = rng.normal(size=(2, count, height, width, 3)).astype(np.float32)
    patches = height * width
    distances = np.array([rng.permutation(patches) for _ in range(count)]).reshape(count, height, width) / patches
    mended, replaced = replace_foreign(maps, matched, distances, alpha)
    assert mended.shape == maps.shape and replaced.shape == distances.shape and replaced.dtype == bool
    for image, chosen in zip(distances, replaced, strict=True):
        assert abs(chosen.sum() - alpha * patches) <= 1
        assert not chosen.any() or chosen.all() or image[chosen].min() > image[~chosen].max()
    assert (mended[replaced] == matched[replaced]).all() and (mended[~replaced] == maps[~replaced]).all()


def test_alpha_one_is_what_was_found_and_nothing_given_is_changed() -> None:
    maps, matched = np.random.default_rng(0).normal(size=(2, 2, 4, 4, 3)).astype(np.float32)
    before = maps.copy(), matched.copy()
    mended, replaced = replace_foreign(maps, matched, np.zeros((2, 4, 4)), 1)
    assert (mended == matched).all() and replaced.all()
    mended[:] = 0
    replace_foreign(maps, matched, np.arange(32.0).reshape(2, 4, 4), 0.5)[0][:] = 0
    assert (maps == before[0]).all() and (matched == before[1]).all()


def test_of_equal_distances_none_is_foreign_and_images_are_apart() -> None:
    maps, matched = np.random.default_rng(1).normal(size=(2, 2, 4, 4, 3)).astype(np.float32)
    assert not replace_foreign(maps, matched, np.full((2, 4, 4), 0.3, np.float32), 0.5)[1].any()
    distances = np.zeros((2, 4, 4), np.float32)
    distances[0], distances[1, 2, 3] = np.linspace(1, 2, 16).reshape(4, 4), 1e-6  # the first image's do not decide for the second
    replaced = replace_foreign(maps, matched, distances, 1 / 16)[1]
    assert replaced.sum(axis=(1, 2)).tolist() == [1, 1] and replaced[0, 3, 3] and replaced[1, 2, 3]


@pytest.mark.parametrize("alpha", [0, -0.1, 1.001, 3, np.nan, np.inf])
def test_no_share(alpha: float) -> None:
    with pytest.raises(ParameterError, match=r"is no share in \(0, 1\]"):
        replace_foreign(np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1)), alpha)

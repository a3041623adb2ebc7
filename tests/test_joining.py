"""Several categories as one data set."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from defectbook.core import DataError, ParameterError, Sample
from defectbook.data.datasets import Dataset
from defectbook.data.joining import join


def made(category: str, name: str = "set", classes: tuple[str, ...] = ("normal", "defect")) -> Dataset:
    def sample(number: int, label: int = 0) -> Sample:
        mask = np.eye(8, dtype=np.uint8) * label if label else None
        return Sample(np.full((8, 8, 3), number, np.uint8), mask, label, str(number), {"kind": "scratch" if label else "good"}, mask_threshold=None)

    return Dataset(name, category, Path("."), [sample(1), sample(2)], [sample(3)], [sample(4), sample(5, 1)], classes=classes, notes=["a note"])


def test_all_samples_once_with_names_of_their_own() -> None:
    joined = join([made("a"), made("b")])
    assert (joined.name, joined.category, len(joined.train), len(joined.validation), len(joined.test)) == ("set", "joined", 4, 2, 4)
    assert len({sample.name for sample in joined.samples}) == 10 and joined.notes == ["a: a note", "b: a note"]
    assert [sample.label for sample in joined.test] == [0, 1, 0, 1]
    assert joined.test[3].meta == {"kind": "b/scratch", "category": "b"} and joined.test[3].mask.sum() == 8
    assert joined.fingerprint() != join([made("b"), made("a")]).fingerprint()


def test_sets_of_several_names() -> None:
    joined = join([made("a", "one"), made("a", "two")])
    assert joined.name == "one+two" and joined.train[0].name == "one/a/1"


def test_simulated_only_if_all_are() -> None:
    real, simulated = made("a"), replace(made("b"), simulated=True)
    assert not join([real, simulated]).simulated and join([simulated, replace(made("c"), simulated=True)]).simulated


def test_what_cannot_be_joined_is_named() -> None:
    with pytest.raises(ParameterError, match="at least two"):
        join([made("a")])
    with pytest.raises(DataError, match="both called 'a'"):
        join([made("a"), made("a")])
    with pytest.raises(DataError, match="same classes"):
        join([made("a"), made("b", classes=("normal", "crack"))])

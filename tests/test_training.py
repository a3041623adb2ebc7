"""Training that is killed goes on to the same bytes."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from defectbook.core import DataError, WeightsError
from defectbook.models.training import Training, seeded_torch

SCRIPT = textwrap.dedent("""
    import os, signal, sys, torch
    from torch import nn
    from defectbook.models.training import Training, seeded_torch
    folder, rounds, kill = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    with seeded_torch(0, "weights"):
        model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    training = Training(model, torch.optim.Adam(model.parameters(), 1e-2), folder, {"task": 1})
    for number in range(training.rounds, rounds):
        with seeded_torch(0, f"round {number}"):
            for step in range(5):
                x = torch.randn(16, 3)
                loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
                training.optimiser.zero_grad(); loss.backward(); training.optimiser.step()
                if kill == f"{number}.{step}":
                    os.kill(os.getpid(), signal.SIGKILL)
        training.finish_round(held_out=loss.item())
    print(repr(training.history), [value.double().sum().item() for value in model.state_dict().values()])
""")


def run(folder: Path, kill: str = "never") -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", SCRIPT, str(folder), "5", kill], capture_output=True, text=True, env=environment)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_training_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "killed", "3.2")
    assert killed.returncode == -signal.SIGKILL
    resumed = run(tmp_path / "killed")
    assert resumed.stdout == whole.stdout and "held_out" in resumed.stdout


def net() -> tuple[nn.Module, torch.optim.Optimizer]:
    with seeded_torch(0):
        model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def test_best_round_is_restored() -> None:
    model, optimiser = net()
    training = Training(model, optimiser)
    for loss in (3.0, 1.0, 2.0):
        nn.init.constant_(model.weight, loss)
        training.finish_round(held_out=loss)
    assert (training.restore_best().weight == 1).all()


def test_a_state_between_two_writes_is_not_taken(tmp_path: Path) -> None:
    model, optimiser = net()
    Training(model, optimiser, tmp_path, {"a": 1}).finish_round(held_out=1.0)
    (tmp_path / "round00002.safetensors").write_bytes(b"half")  # killed before the note was replaced
    assert Training(*net(), tmp_path, {"a": 1}).rounds == 1


@pytest.mark.parametrize("damage", ["note", "tensors", "missing"])
def test_damaged_states_are_named(tmp_path: Path, damage: str) -> None:
    Training(*net(), tmp_path, {}).finish_round(held_out=1.0)
    target = tmp_path / ("training.json" if damage == "note" else "round00001.safetensors")
    target.unlink() if damage == "missing" else target.write_bytes(b"{")
    with pytest.raises(WeightsError, match="damaged"):
        Training(*net(), tmp_path, {})


def test_another_training_is_refused(tmp_path: Path) -> None:
    Training(*net(), tmp_path, {"seed": 0}).finish_round(held_out=1.0)
    with pytest.raises(WeightsError, match="other data or parameters"):
        Training(*net(), tmp_path, {"seed": 1})


def test_losses_that_are_not_finite_are_named() -> None:
    with pytest.raises(DataError, match="'train' is nan"):
        Training(*net()).finish_round(train=float("nan"), held_out=1.0)


def test_seeding_has_walls() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with seeded_torch(3, "a"):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeded_torch(3, "a"):
        assert torch.equal(torch.rand(2), inside)

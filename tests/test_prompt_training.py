"""The game of clicks: losses against plain loops, teachers, boxes, traces, and a training that can be killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import ParameterError, WeightsError, generator
from defectbook.data.scenes import Scene, draw_scene
from defectbook.metrics.clicking import Click, next_click
from defectbook.models.prompt_training import (
    Game,
    Lessons,
    SceneStream,
    answer_losses,
    best_click,
    click_traces,
    loose_boxes,
    step_loss,
    teaching_click,
    train_prompts,
)
from defectbook.models.sam_lite import SamLite, imagenet_lite

TINY = Lessons(rounds=2, steps=2, scenes=2, objects=2, clicks=2, side=128, held_out=1, half=False)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.integers(2, 6))
def test_losses_are_those_of_the_loop(seed: int, count: int, guesses: int, side: int) -> None:
    torch.manual_seed(seed)
    logits, estimates = 4 * torch.randn(count, guesses, side, side, dtype=torch.float64), torch.rand(count, guesses, dtype=torch.float64)
    truths = (torch.rand(count, side, side) > 0.6).to(torch.uint8)
    losses, errors, reached = answer_losses(logits, truths, estimates)
    for b in range(count):
        for m in range(guesses):
            p, t = logits[b, m].sigmoid().flatten(), truths[b].flatten().double()
            p_t = p * t + (1 - p) * (1 - t)
            weights = (1 - p_t) ** 2
            focal = float((weights * -p_t.log()).sum() / max(float(weights.sum()), 1e-3))
            dice = float(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
            answer = p > 0.5
            union = int((answer | (t > 0)).sum())
            iou = int((answer & (t > 0)).sum()) / max(1, union)
            assert float(losses[b, m]) == pytest.approx(0.5 * focal + dice, rel=1e-6)
            assert float(reached[b, m]) == pytest.approx(iou) and float(errors[b, m]) == pytest.approx((float(estimates[b, m]) - iou) ** 2, abs=1e-6)


def test_the_divisor_of_the_focal_loss_has_no_gradient() -> None:
    logits = torch.tensor([[[[2.0, -1.0]]]], requires_grad=True)
    truths = torch.tensor([[[1, 1]]], dtype=torch.uint8)
    loss = answer_losses(logits, truths, torch.zeros(1, 1))[0].sum()
    p = logits.detach().sigmoid().flatten().requires_grad_()
    weights = (1 - p) ** 2
    by_hand = 0.5 * (weights * -p.log()).sum() / float(weights.detach().sum()) + 1 - (2 * p.sum() + 1) / (p.sum() + 3)
    gradient = torch.autograd.grad(by_hand, p)[0] * p.detach() * (1 - p.detach())
    assert torch.allclose(torch.autograd.grad(loss, logits)[0].flatten(), gradient, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_the_teacher_clicks_on_errors_only(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, answer = (rng.random((12, 15)) > 0.7).astype(np.uint8), (rng.random((12, 15)) > 0.7).astype(np.uint8)
    click = teaching_click(truth, answer, rng)
    assert click is not None and truth[click.y, click.x] != answer[click.y, click.x] and click.positive == bool(truth[click.y, click.x])
    assert teaching_click(truth, truth, rng) is None


def test_the_teacher_is_not_always_the_same() -> None:
    truth = np.zeros((40, 40), np.uint8)
    truth[5:35, 5:35] = 1
    clicks = {teaching_click(truth, np.zeros_like(truth), generator(seed)) for seed in range(30)}
    assert len(clicks) > 20 and all(click.positive for click in clicks)
    assert best_click(truth, np.zeros_like(truth), []) == next_click(truth, np.zeros_like(truth))


def test_boxes_are_a_little_off_and_only_where_asked() -> None:
    truths = np.zeros((3, 64, 64), np.uint8)
    truths[:, 10:30, 20:60] = 1
    boxes = loose_boxes(truths, np.array([True, False, True]), generator(0)).numpy()
    assert np.isnan(boxes[1]).all() and np.isfinite(boxes[[0, 2]]).all()
    off = np.abs(boxes[[0, 2]] - (20, 10, 59, 29))
    assert (off <= np.array([4, 2, 4, 2]) + 1e-6).all() and off.max() > 0


@pytest.fixture(scope="module")
def model() -> SamLite:
    return imagenet_lite(128).eval()


def test_a_game_feeds_its_choice_back(model: SamLite) -> None:
    scene = draw_scene(0, 1, 128)
    game = Game(model, model.embed([scene.image]), torch.zeros(len(scene.masks), dtype=torch.long), scene.masks)
    with torch.no_grad():
        game.point(best_click)
        logits, estimates = game.answer()
        assert logits.shape == (len(scene.masks), 3, 128, 128) and estimates.shape == (len(scene.masks), 3)
        choice = torch.arange(len(scene.masks)) % 3
        game.keep(choice)
        assert (game.answers == (logits[torch.arange(len(choice)), choice] > 0).numpy()).all()
        game.point(lambda truth, answer, earlier: Click(0, 0, False))
        assert game.answer()[0].shape[1] == 1
    assert all(len(clicks) == 2 and clicks[1] == (0, 0, False) for clicks in game.clicks)


def test_traces_are_those_of_objects_played_alone(model: SamLite) -> None:
    scene = draw_scene(0, 2, 128)
    together = click_traces(model, [scene], 3)
    alone = [click_traces(model, [Scene(scene.image, scene.masks[i:i + 1], "x")], 3)[0] for i in range(len(scene.masks))]
    assert together.shape == (len(scene.masks), 3)
    # A pixel on the border may fall either way, and then the next click may lie elsewhere: only the first answers are compared.
    assert np.allclose(together[:, 0], np.array(alone)[:, 0], atol=0.02)
    with pytest.raises(ParameterError):
        click_traces(model, [], 3)


def test_an_object_that_is_right_is_left_alone() -> None:
    class Oracle(torch.nn.Module):
        """Answers with the truth: there is nothing to click after the first time."""

        def __init__(self, truth: np.ndarray):
            super().__init__()
            self.logits = torch.from_numpy(20.0 * truth - 10).float()[None, None]
            self.seen: list[int] = []

        def embed(self, images):
            return None

        def decode(self, embedding, prompts, rows, several):
            self.seen.append(int((prompts.labels >= 0).sum()))
            return self.logits.expand(1, 3 if several else 1, -1, -1), torch.ones(1, 3 if several else 1)

    truth = np.zeros((32, 32), np.uint8)
    truth[8:20, 8:20] = 1
    oracle = Oracle(truth)
    assert (click_traces(oracle, [Scene(np.zeros((32, 32, 3), np.uint8), truth[None], "x")], 4) == 1).all() and oracle.seen == [1, 1, 1, 1]


def test_the_stream_is_a_function_of_numbers() -> None:
    one, other = SceneStream(TINY, 10, 4), SceneStream(TINY, 12, 4)
    assert len(one) == 4 and (one[2][0] == other[0][0]).all() and (one[2][1] == other[0][1]).all()
    assert all(1 <= len(one[i][1]) <= TINY.objects for i in range(4))


def test_rates_warm_up_hold_and_fall() -> None:
    lessons = Lessons(rounds=10, steps=100, decay=0.4)
    rates = [lessons.rate(step) for step in range(1000)]
    assert rates[0] == 0.02 and rates[49] == rates[599] == 1 and rates[800] == pytest.approx(0.5, abs=0.01) and rates[-1] == 0.01
    assert all(a >= b for a, b in zip(rates[600:], rates[601:], strict=False))


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, begun, resumed = (imagenet_lite(128) for _ in range(3))
    notes = train_prompts(whole, TINY, workers=0).history
    assert train_prompts(begun, TINY, tmp_path, workers=0, until=1).rounds == 1
    again = train_prompts(resumed, TINY, tmp_path, workers=0)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert [note["held_out"] for note in again.history] == [note["held_out"] for note in notes] and not resumed.training
    assert any(not torch.equal(a, b) for a, b in zip(begun.state_dict().values(), resumed.state_dict().values(), strict=True))
    with pytest.raises(WeightsError, match="another folder"):
        train_prompts(imagenet_lite(128), Lessons(**{**vars(TINY), "seed": 1}), tmp_path, workers=0)


def test_a_frozen_encoder_stays(tmp_path: Path) -> None:
    model = imagenet_lite(128)
    before = {name: value.clone() for name, value in model.image_encoder.blocks.state_dict().items()}
    train_prompts(model, Lessons(**{**vars(TINY), "encoder_rate": 0.0, "rounds": 1}), workers=0)
    assert all(torch.equal(value, before[name]) for name, value in model.image_encoder.blocks.state_dict().items())
    assert not torch.equal(model.mask_decoder.iou_token.weight, imagenet_lite(128).mask_decoder.iou_token.weight)


def test_a_step_learns() -> None:
    """Twelve steps on one batch: the loss of that batch falls."""
    model = imagenet_lite(128).train()
    stream = SceneStream(TINY, 0, 2)
    batch = [stream[0], stream[1]]
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(12):
        loss, _, _ = step_loss(model, batch, TINY, generator(0, "same game"))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


@pytest.mark.parametrize("options", [{"rounds": 0}, {"clicks": 0}, {"learning_rate": 0.0}, {"encoder_rate": -1.0}, {"box_share": 1.5},
                                     {"decay": 2.0}])
def test_refused(options: dict) -> None:
    with pytest.raises(ParameterError, match=next(iter(options))):
        Lessons(**options)


SCRIPT = """
import sys
from defectbook.models.prompt_training import Lessons, train_prompts
from defectbook.models.sam_lite import imagenet_lite, save_lite
model = imagenet_lite(128)
train_prompts(model, Lessons(rounds=3, steps=2, scenes=2, objects=1, clicks=1, side=128, held_out=1, half=False), sys.argv[1], workers=0)
save_lite(model, sys.argv[2])
"""


@pytest.mark.slow
def test_sigkill_loses_a_round_at_most(tmp_path: Path) -> None:
    def run(name: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / name), str(tmp_path / f"{name}.safetensors")],
                                env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert run("whole").wait() == 0
    killed = run("killed")
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "training.json").exists():
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert run("killed").wait() == 0
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()

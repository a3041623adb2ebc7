"""Adaptation: every rule of the labels and of the loss, what is restored and what carries on, and the cheap step against the obvious one."""

import copy
import re
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from test_sam import toy_hq
from torch import Tensor

from defectbook.core import DataError, ParameterError, WeightsError
from defectbook.methods.adaptation import (
    CONFIGURATIONS,
    MORE_CONFIGURATIONS,
    PAPER,
    AdaptiveSam,
    Configuration,
    Rates,
    chosen_rates,
    click_mask,
    draw_lesson,
    eroded_mask,
    mask_quality,
    parse_configuration,
    play,
)
from defectbook.models.decoder_copies import UNKNOWN, DecoderCopy, label_loss, sparse_cross_entropy
from defectbook.models.sam import Embedding, PromptModel, Prompts, build_sam, toy_sam
from defectbook.models.sam_lite import SamLite

SIZE = (90, 120)
CLICKS = ((60, 40, True), (10, 80, False), (61, 44, True), (110, 5, False))
FULL = "CA=R RM=E CM"
MODELS = ("toy", "toy_hq", "sam_lite")


def model(name: str = "toy") -> PromptModel:
    return _model(name)


@cache
def _model(name: str) -> PromptModel:
    if name == "sam_lite":
        torch.manual_seed(0)
        return SamLite(64, 32).eval()
    return toy_hq() if name == "toy_hq" else toy_sam()


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def disc(radius: int = 25) -> np.ndarray:
    y, x = np.ogrid[:SIZE[0], :SIZE[1]]
    return (x - 60) ** 2 + (y - 40) ** 2 <= radius**2


def annotator(configuration: str = FULL, name: str = "toy", rate: float = 1e-4, **options) -> AdaptiveSam:
    return AdaptiveSam(model(name), configuration, rates=(rate,) * 3, **options)


def run(own: AdaptiveSam, clicks: Sequence = CLICKS, seed: int = 0, cls: str | None = None, mask: np.ndarray | None = None, finish: bool = True):
    """One object: its image, the clicks, and the mask that is accepted."""
    own.set_image(picture(seed), cls)
    for click in clicks:
        own.click(*click)
    return own.finish(mask) if finish else own.mask


def content(decoder: DecoderCopy) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in decoder.tensors().items()}


def weights_of(part: torch.nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in part.state_dict().items()}


# -- eq. 2 -----------------------------------------------------------------------------------------------------------------------
def loss_by_loops(logits: np.ndarray, labels: np.ndarray) -> float:
    total = 0.0
    for wanted in (1, 0):
        values = [np.log1p(np.exp(-z if wanted else z)) for z, label in zip(logits.ravel(), labels.ravel(), strict=True) if label == wanted]
        total += sum(values) / len(values) if values else 0.0
    return total


@given(arrays(np.float64, (4, 5), elements=st.floats(-8, 8)), arrays(np.int8, (4, 5), elements=st.integers(-1, 1)))
@settings(max_examples=60, deadline=None)
def test_the_loss_is_eq_2(logits: np.ndarray, labels: np.ndarray) -> None:
    if (labels < 0).all():
        with pytest.raises(DataError, match="no pixel has a label"):
            sparse_cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels))
    else:
        found = float(sparse_cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)))
        assert found == pytest.approx(loss_by_loops(logits, labels), abs=1e-9)


def test_object_and_background_weigh_the_same() -> None:
    logits = torch.zeros(10, requires_grad=True)
    labels = torch.tensor([1] + [0] * 8 + [UNKNOWN])
    (gradient,) = torch.autograd.grad(sparse_cross_entropy(logits, labels), logits)
    assert torch.allclose(gradient, torch.tensor([-0.5] + [0.5 / 8] * 8 + [0.0]))


def test_unlabelled_pixels_do_not_count() -> None:
    logits, labels = torch.randn(6, 7, generator=torch.Generator().manual_seed(1)), torch.full((6, 7), UNKNOWN)
    labels[0, :3], labels[4, 4] = 1, 0
    assert sparse_cross_entropy(logits, labels) == sparse_cross_entropy(torch.where(labels < 0, 1e6, logits), labels)


@pytest.mark.parametrize("size", [(90, 120), (40, 128), (128, 31), (300, 200)])
@pytest.mark.parametrize("everywhere", [False, True])
def test_the_loss_is_taken_at_the_images_pixels_and_padding_cannot_enter(size: tuple[int, int], everywhere: bool) -> None:
    sam, rng = model(), np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 2, size)) if everywhere else torch.full(size, UNKNOWN)
    if not everywhere:
        for y, x, label in ((0, 0, 1), (size[0] - 1, size[1] - 1, 0), (size[0] // 2, size[1] // 3, 1)):
            labels[y, x] = label
    logits = torch.from_numpy(rng.normal(size=(1, 1, *sam.mask_size)).astype(np.float32)).requires_grad_()
    loss = label_loss(sam, logits, labels)
    upscaled = sam.masks(logits, size)[0, 0].detach().numpy()
    assert float(loss.detach()) == pytest.approx(loss_by_loops(upscaled.astype(float), labels.numpy()), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, logits)
    # A logit just outside of the image still bends the last pixels inside, by interpolation; beyond it nothing does.
    last = F.max_pool2d(sam.inside([size]).float(), 3, 1, 1) == 0
    assert bool(last.any()) and not gradient[last].any() and gradient.any()
    assert label_loss(sam, torch.where(last, 1e6, logits), labels) == loss


# -- labels ----------------------------------------------------------------------------------------------------------------------
@given(arrays(np.bool_, st.tuples(st.integers(1, 24), st.integers(1, 24))), st.integers(0, 6))
@settings(max_examples=80, deadline=None)
def test_erosion_is_scipys(mask: np.ndarray, times: int) -> None:
    found = eroded_mask(mask, times)
    for side, label in ((mask, 1), (~mask, 0)):
        expected = ndimage.binary_erosion(side, iterations=times, border_value=1) if times else side
        assert ((found == label) == expected).all()


def test_thick_objects_survive_five_erosions_and_thin_ones_do_not() -> None:
    assert (eroded_mask(disc()) == 1).any() and (eroded_mask(disc()) == UNKNOWN).any()
    bar = np.zeros(SIZE, bool)
    bar[40:50, 10:110] = True  # ten rows: the border of the object is five deep from both sides
    assert not (eroded_mask(bar) == 1).any()
    assert (eroded_mask(np.pad(bar[:, :], ((0, 0), (0, 0))) | np.roll(bar, 1, 0)) == 1).any()  # eleven


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 8), st.booleans()), max_size=12))
@settings(max_examples=60, deadline=None)
def test_click_masks_hold_clicked_pixels_only(clicks: list) -> None:
    labels = click_mask(clicks, (9, 12))
    for (y, x), label in np.ndenumerate(labels):
        said = {positive for cx, cy, positive in clicks if (cx, cy) == (x, y)}
        assert label == (UNKNOWN if not said else 1 if True in said else 0)


# -- configurations --------------------------------------------------------------------------------------------------------------
def test_the_papers_rows() -> None:
    rows = [parse_configuration(text) for text in CONFIGURATIONS]
    table_4 = [("", "", False), ("R", "E", True), ("R", "", False), ("C", "", False),
               ("", "E", False), ("", "", True), ("R", "", True), ("R", "U", True)]
    assert [(row.clicks, row.mask, row.click_mask) for row in rows] == table_4
    assert "CA=R RM=E" in MORE_CONFIGURATIONS and all(str(parse_configuration(text)) == text for text in (*CONFIGURATIONS, *MORE_CONFIGURATIONS))


GATES = st.sampled_from([None, 0.0, 1.0, 0.85, 0.9, 1e-5, 0.123456])


@given(st.sampled_from(["", "R", "C"]), st.sampled_from(["", "U", "E"]), st.booleans(), GATES, st.randoms())
@settings(max_examples=60, deadline=None)
def test_configurations_parse_and_print_back(clicks: str, mask: str, click_mask: bool, gate: float | None, random) -> None:
    wanted = Configuration(clicks, mask, click_mask, gate if mask else None)
    words = str(wanted).split()
    random.shuffle(words)
    assert parse_configuration(" ".join(words)) == wanted == parse_configuration(wanted)
    assert wanted.learns == (str(wanted) != "none")


@pytest.mark.parametrize(("text", "message"), [
    ("", "empty configuration"), ("CA=X", "'CA=X' is none of"), ("ca=R", "is none of"), ("none CM", "or write none, alone"), ("RM", "is none of"),
    ("CA=R CA=C", "says CA twice"), ("CM CM", "says CM twice"), ("RM=E GATE=2", "number from 0 to 1"), ("RM=E GATE=.1.2", "number from 0 to 1"),
    ("CM GATE=0.5", "RM=U or RM=E to hold back")])
def test_bad_configurations_are_named_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(message)) as caught:
        parse_configuration(text)
    assert "\n" not in str(caught.value)


def test_rates_by_model_by_name_and_by_number() -> None:
    assert annotator().rates == Rates(1e-4, 1e-4, 1e-4)
    assert AdaptiveSam(model()).rates == PAPER == Rates(1e-6, 1e-6, 1e-6)
    assert AdaptiveSam(model("sam_lite")).rates == chosen_rates()["sam_lite"]
    assert AdaptiveSam(model(), rates={"RM": 2e-6}).rates == PAPER._replace(RM=2e-6)
    for wrong in ({"XX": 1e-6}, (1e-6,), (1.0, 0, 0), (-1e-6, 0, 0), 3, ("a", 0, 0)):
        with pytest.raises(ParameterError, match="rates"):
            AdaptiveSam(model(), rates=wrong)


# -- what changes and what does not ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_only_the_decoder_learns(name: str, configuration: str) -> None:
    sam = model(name)
    before = weights_of(sam)
    own = annotator(configuration, name)
    run(own, mask=disc())
    assert weights_of(sam) == before and all(parameter.grad is None for parameter in sam.parameters())
    decoder = own.decoder()
    assert decoder.model.image_encoder is sam.image_encoder and decoder.model.prompt_encoder is sam.prompt_encoder
    changed = {part.split(".")[0] for part, value in decoder.model.state_dict().items() if value.numpy().tobytes() != before[part]}
    assert not {"image_encoder", "prompt_encoder"} & changed
    assert ("mask_decoder" in changed) == (configuration not in ("none", "CA=R"))


def test_reset_restores_weights_and_optimiser_to_the_bit() -> None:
    own = annotator("CA=R RM=E")
    run(own, mask=disc())  # so that the optimiser has a state
    before = content(own.decoder())
    run(own, finish=False, seed=1)
    during = content(own.decoder())
    assert any(before[name] != during[name] for name in own.decoder().weights)
    assert any(before[name] != during[name] for name in before if name.endswith("exp_avg")) and any(
        before[name] != during[name] for name in before if name.endswith("step"))
    own.finish(np.zeros(SIZE, bool))  # teaches nothing
    assert content(own.decoder()) == before


def test_continual_carries_on() -> None:
    own, alone = annotator("CA=C"), annotator("CA=C")
    run(own)
    after = content(own.decoder())
    run(alone, finish=False)
    alone.adapt()  # the last click's step is taken too
    assert content(alone.decoder()) == after
    own.set_image(picture(1))
    assert content(own.decoder()) == after
    first = own.click(*CLICKS[0])
    steps = [int(value) for name, value in own.decoder().tensors().items() if name.endswith("mask_tokens.weight:step")]
    assert steps == [len(CLICKS)] and first.shape == SIZE


@pytest.mark.parametrize("configuration", [*CONFIGURATIONS, "CA=R RM=E"])
def test_the_step_may_wait_or_not(configuration: str) -> None:
    """Whether a click's step is taken when the mask has been shown or with the next click makes no difference."""
    waiting, eager = annotator(configuration), annotator(configuration)
    for seed in range(2):
        eager.set_image(picture(seed))
        for click in CLICKS:
            shown = eager.click(*click)
            eager.adapt()
        run(waiting, seed=seed, mask=disc())
        assert np.array_equal(waiting.mask, shown)
        eager.finish(disc())
    assert content(waiting.decoder()) == content(eager.decoder())


@pytest.mark.parametrize("configuration", [*CONFIGURATIONS, "CA=R RM=E"])
def test_undo_is_as_if_never_clicked(configuration: str) -> None:
    plain, undone = annotator(configuration), annotator(configuration)
    for seed in range(2):
        run(plain, CLICKS[:2], seed, finish=False)
        run(undone, CLICKS[:2], seed, finish=False)
        undone.click(*CLICKS[2])
        undone.adapt()
        undone.click(*CLICKS[3])
        undone.undo()
        mask = undone.undo()
        assert np.array_equal(mask, plain.mask) and undone.logits.tobytes() == plain.logits.tobytes() and undone.clicks == plain.clicks
        plain.finish(disc())
        undone.finish(disc())
        assert content(undone.decoder()) == content(plain.decoder())


def test_undo_of_everything() -> None:
    own = annotator("CA=R")
    own.set_image(picture())
    start = content(own.decoder())
    own.click(*CLICKS[0])
    own.adapt()
    assert own.undo() is None and own.undo() is None
    assert content(own.decoder()) == start and not own.mask.any() and not own.clicks


def test_an_unfinished_object_is_forgotten() -> None:
    own = annotator("CA=C")
    run(own)
    after = content(own.decoder())
    run(own, seed=1, finish=False)
    own.set_image(picture(2))
    assert content(own.decoder()) == after


# -- what an object teaches ------------------------------------------------------------------------------------------------------
def test_an_empty_mask_teaches_nothing_and_says_so() -> None:
    own = annotator("RM=E")
    own.set_image(picture())
    start = content(own.decoder())
    own.click(*CLICKS[0])
    assert not own.finish(np.zeros(SIZE, np.uint8)).any()
    assert content(own.decoder()) == start and own.note == "the result mask is empty: nothing was learnt"


def test_an_erosion_that_eats_the_mask_teaches_nothing_and_says_so() -> None:
    own = annotator("RM=E")
    own.set_image(picture())
    start = content(own.decoder())
    own.click(*CLICKS[0])
    own.finish(disc(4))
    assert content(own.decoder()) == start and own.note == "5 erosions eat the result mask: nothing was learnt"
    untreated = annotator("RM=U")
    run(untreated, mask=disc(4))
    assert content(untreated.decoder()) != start and untreated.note == ""


def test_merged_labels() -> None:
    clicked, pruned = click_mask(CLICKS, SIZE), eroded_mask(disc())
    lesson = draw_lesson(parse_configuration("RM=E CM"), disc(), CLICKS)
    assert np.array_equal(lesson.labels, np.where(clicked >= 0, clicked, pruned)) and lesson[1:] == ("RM", "")
    contradicting = draw_lesson(parse_configuration("RM=U CM"), ~disc(), CLICKS)  # every click says otherwise
    assert all(contradicting.labels[y, x] == positive for x, y, positive in CLICKS)
    assert (contradicting.labels == ~disc()).sum() == disc().size - len(CLICKS)


@pytest.mark.parametrize(("configuration", "mask", "clicks", "rate", "note"), [
    ("CM", np.zeros(SIZE, bool), CLICKS, "CM", ""),
    ("RM=E CM", np.zeros(SIZE, bool), CLICKS, "CM", "the result mask is empty: only the clicks taught"),
    ("RM=U CM", np.zeros(SIZE, bool), CLICKS, "CM", "the result mask is empty: only the clicks taught"),
    ("RM=E CM GATE=0.9", disc(), CLICKS, "CM", "the result mask's quality is 0.50, under 0.9: only the clicks taught"),
    ("RM=E CM", disc(4), CLICKS[1:2], "CM", "5 erosions eat the result mask: only the clicks taught")])
def test_a_mask_that_is_not_believed_leaves_the_clicks(configuration: str, mask: np.ndarray, clicks: tuple, rate: str, note: str) -> None:
    lesson = draw_lesson(parse_configuration(configuration), mask, clicks, quality=0.5)
    assert np.array_equal(lesson.labels, click_mask(clicks, SIZE)) and lesson[1:] == (rate, note)


def test_of_a_mask_that_is_eaten_the_background_is_left_if_clicks_say_what_the_object_is() -> None:
    lesson = draw_lesson(parse_configuration("RM=E CM"), disc(4), CLICKS)
    clicked = click_mask(CLICKS, SIZE)
    assert np.array_equal(lesson.labels, np.where(clicked >= 0, clicked, np.where(eroded_mask(disc(4)) == 0, 0, UNKNOWN)))
    assert lesson[1:] == ("RM", "5 erosions eat the result mask: its background and the clicks taught")


def test_finish_takes_one_step_on_the_lesson() -> None:
    own, other = annotator("RM=E CM"), DecoderCopy(model())
    run(own, finish=False)
    other.learn(own._answer._replace(version=-1), torch.from_numpy(draw_lesson(own.configuration, disc(), CLICKS).labels), 1e-4)
    own.finish(disc())
    assert content(own.decoder()) == content(other)


def test_a_mask_without_clicks_teaches_nothing() -> None:
    own = annotator(FULL)
    own.set_image(picture())
    assert own.finish(disc()).sum() == disc().sum() and own.note == "no click was made: nothing was learnt"


def test_the_gate_holds_doubtful_masks_back() -> None:
    own = annotator("RM=E GATE=1")
    run(own)
    assert "quality" in own.note and "nothing was learnt" in own.note
    run(own, mask=disc(), seed=1)  # a person's own mask is believed
    assert own.note == ""
    assert mask_quality(disc(), disc(), 0.8, [(60, 40, True), (0, 0, True)]) == pytest.approx(0.4)
    assert mask_quality(disc(), disc(), 1.3, [(60, 40, True)]) == 1 and mask_quality(disc(), disc(), -0.1, [(60, 40, True)]) == 0
    assert mask_quality(disc(), disc(9), 0.2, [(60, 40, True)]) == 1


def moved(**options) -> float:
    """How far the mask tokens went in the lesson of one result mask."""
    own = AdaptiveSam(model(), "RM=E", **options)
    run(own, mask=disc())
    gaps = own.decoder().weights["mask_decoder.mask_tokens.weight"] - model().mask_decoder.mask_tokens.weight
    return float(gaps.detach().abs().max())


def test_steps_and_rates_apart() -> None:
    one = moved(rates=(1e-2, 1e-4, 1e-2))
    assert one == pytest.approx(1e-4, rel=0.1)  # Adam's first step is as long as its rate
    assert moved(rates=(0, 1e-4, 0)) == one and moved(rates=(1e-4, 1e-7, 1e-4)) == pytest.approx(1e-7, rel=0.3)
    assert moved(rates=(1e-4, 1e-4, 1e-4), steps=3) > 2 * one


def test_the_erosion_is_a_parameter() -> None:
    own = annotator("RM=E", erosion=2)
    run(own, mask=disc(4))
    assert own.note == ""


# -- what is refused -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("place", [(-1, 0), (0, -1), (SIZE[1], 0), (0, SIZE[0]), (1.5, 2), (True, 2), ("3", 2), (float("nan"), 1)])
def test_clicks_outside_of_the_image_change_nothing(place: tuple) -> None:
    own = annotator("CA=C")
    run(own, CLICKS[:2], finish=False)
    before, clicks, mask = content(own.decoder()), list(own.clicks), own.mask
    with pytest.raises(ParameterError, match="give a whole number from 0 to"):
        own.click(*place)
    assert content(own.decoder()) == before and own.clicks == clicks and own.mask is mask
    own.click(np.int64(3), np.uint8(4))  # numpy's whole numbers are welcome


def test_calls_out_of_order_and_odd_arguments() -> None:
    own = annotator()
    for call in (lambda: own.click(1, 1), own.undo, own.finish, lambda: own.finish(disc())):
        with pytest.raises(ParameterError, match="call set_image first"):
            call()
    own.adapt()
    own.set_image(picture())
    with pytest.raises(ParameterError, match="click at least once"):
        own.finish()
    own.click(1, 1)
    for mask in (np.zeros((5, 5), bool), np.zeros(SIZE, np.float32), np.zeros((*SIZE, 1), bool)):
        with pytest.raises(DataError, match="a mask of shape"):
            own.finish(mask)
    assert own.finish().shape == SIZE
    with pytest.raises(ParameterError, match="call set_image first"):
        own.undo()
    with pytest.raises(ParameterError, match="an embedding of sizes"), torch.no_grad():
        own.set_image(picture(), embedding=model().embed([picture(0, (60, 60))]))
    for options, message in (({"classes": ()}, "at least one name"), ({"classes": ("a", "a")}, "each once"), ({"steps": 0}, "steps=0"),
                             ({"erosion": -1}, "erosion=-1")):
        with pytest.raises(ParameterError, match=message):
            annotator(**options)


def test_a_given_embedding_is_the_same_as_none() -> None:
    own, other = annotator(), annotator()
    with torch.no_grad():
        embedding = model().embed([picture()])
    run(own, finish=False)
    other.set_image(picture(), embedding=embedding)
    for click in CLICKS:
        other.click(*click)
    assert other.logits.tobytes() == own.logits.tobytes() and other.probabilities.min() >= 0 and other.probabilities.max() <= 1
    assert np.array_equal(other.mask, other.probabilities > 0.5)


# -- classes and state -----------------------------------------------------------------------------------------------------------
def test_classes_have_decoders_of_their_own() -> None:
    own, alone = annotator(classes=("scratch", "hole", "stain")), annotator(classes=("hole",))
    run(own, cls="scratch", mask=disc())
    run(own, cls="hole", seed=1, mask=disc())
    run(alone, seed=1, mask=disc())
    assert content(own.decoder("hole")) == content(alone.decoder("hole")) != content(own.decoder("scratch"))
    start = weights_of(model())
    never = own.decoder("stain")
    assert all(value.detach().numpy().tobytes() == start[name] for name, value in never.weights.items())
    for call in (lambda: own.set_image(picture(), "dent"), lambda: own.decoder("dent")):
        with pytest.raises(ParameterError, match="dent"):
            call()


def test_state_goes_through_a_file_and_on(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    own = annotator(classes=("a", "b", "never"))
    run(own, cls="a", mask=disc())
    run(own, cls="b", seed=1, mask=disc())
    save_file(own.state(), tmp_path / "state.safetensors")
    again = annotator(classes=("a", "b", "never"))
    again.load_state(load_file(tmp_path / "state.safetensors"))
    for one in (own, again):
        run(one, cls="a", seed=2, mask=disc())
        run(one, cls="never", seed=3, mask=disc())
    for cls in own.classes:
        assert content(again.decoder(cls)) == content(own.decoder(cls))


@pytest.mark.parametrize("configuration", ["CA=R", "CA=C", FULL])
def test_the_state_is_that_after_the_last_finished_object(configuration: str) -> None:
    own = annotator(configuration)
    run(own, mask=disc())
    before = {name: value.clone() for name, value in own.state().items()}
    run(own, seed=1, finish=False)
    own.adapt()
    assert all(torch.equal(value, before[name]) for name, value in own.state().items())


def test_states_that_do_not_fit_change_nothing() -> None:
    own = annotator(classes=("a",))
    run(own, mask=disc())
    state, before = own.state(), content(own.decoder())
    short = {name: value for name, value in state.items() if not name.endswith("iou_token.weight")}
    bent = state | {"a/mask_decoder.iou_token.weight": torch.zeros(3)}
    foreign, renamed = AdaptiveSam(model("sam_lite"), "CM").state(), {name.replace("a/", "b/", 1): value for name, value in state.items()}
    for other, message in ((short, "iou_token"), (bent, "iou_token"), ({}, "another model"), (foreign, "another model"), (renamed, "class 'b'")):
        with pytest.raises(WeightsError, match=message):
            own.load_state(other)
        assert content(own.decoder()) == before
    with pytest.raises(ParameterError, match="none has no state"):
        AdaptiveSam(model(), "none").load_state(state)


def test_without_adaptation_nothing_is_copied() -> None:
    own = annotator("none")
    run(own)
    assert own.decoder().model is model() and list(own.state()) == ["model"] and own.note == ""
    with pytest.raises(ParameterError, match="frozen"):
        own.decoder().learn(own.decoder().answer(model().embed([picture()]), Prompts.clicks([CLICKS])), torch.ones(SIZE), 1e-6)


# -- the cheap way against the obvious one ---------------------------------------------------------------------------------------
class Obvious:
    """The full method as the paper tells it: every loss from a forward pass of its own, plain Adam, whole copies of everything."""

    def __init__(self, sam: PromptModel, rate: float):
        self.sam = copy.deepcopy(sam).requires_grad_(False)
        self.learnt = [p for name, p in self.sam.named_parameters() if not name.startswith(("image_encoder", "prompt_encoder"))]
        for parameter in self.learnt:
            parameter.requires_grad_(True)
        self.adam = torch.optim.Adam(self.learnt, lr=rate, fused=False, foreach=False)

    def forward(self, embedding: Embedding, clicks: Sequence, earlier: Tensor | None) -> Tensor:
        logits, estimates = self.sam.decode(embedding, Prompts.clicks([clicks], earlier), several=earlier is None)
        return logits[:, [int(estimates[0].argmax())]]

    def step(self, logits: Tensor, labels: np.ndarray) -> None:
        upscaled, labels = self.sam.masks(logits, SIZE)[0, 0], torch.from_numpy(labels)
        sides = [F.binary_cross_entropy_with_logits(upscaled[labels == label], torch.full_like(upscaled[labels == label], label))
                 for label in (0, 1) if (labels == label).any()]
        self.adam.zero_grad()
        sum(sides).backward()
        self.adam.step()

    def object(self, image: np.ndarray, clicks: Sequence, result: np.ndarray) -> None:
        with torch.no_grad():
            embedding = self.sam.embed([image])
        weights, adam, earlier = copy.deepcopy(self.sam.state_dict()), copy.deepcopy(self.adam.state_dict()), None
        for count in range(1, len(clicks) + 1):
            before = earlier
            with torch.no_grad():
                earlier = self.forward(embedding, clicks[:count], before)
            self.step(self.forward(embedding, clicks[:count], before), click_mask(clicks[:count], SIZE))
        self.sam.load_state_dict(weights)
        self.adam.load_state_dict(adam)
        labels = np.full(SIZE, UNKNOWN)
        labels[ndimage.binary_erosion(~result, iterations=5, border_value=1)] = 0
        labels[ndimage.binary_erosion(result, iterations=5, border_value=1)] = 1
        for x, y, positive in clicks:
            labels[y, x] = positive
        self.step(self.forward(embedding, clicks, before), labels)


@pytest.mark.parametrize("name", MODELS)
def test_the_cheap_step_is_the_obvious_one(name: str) -> None:
    own, obvious = annotator(FULL, name, 1e-6), Obvious(model(name), 1e-6)
    for seed in range(2):
        run(own, seed=seed, mask=disc())
        obvious.object(picture(seed), CLICKS, disc())
    start = dict(model(name).named_parameters())
    pairs = [(own.decoder().weights[key], p, start[key]) for key, p in obvious.sam.named_parameters() if key in own.decoder().weights]
    assert len(pairs) == len(obvious.learnt) and any(not torch.equal(slow, before) for _, slow, before in pairs)
    gaps = torch.cat([(cheap - slow).detach().abs().flatten() for cheap, slow, _ in pairs])
    moments = [obvious.adam.state.get(p, {}).get("exp_avg_sq", torch.zeros_like(p)) for _, p, _ in pairs]
    sizes = torch.cat([moment.sqrt().flatten() for moment in moments])
    # Where a gradient is zero but for rounding (keys' biases before a softmax), Adam makes full steps of it, in any direction.
    noise = sizes < 1e-7
    assert gaps[~noise].max() <= 1e-6 and gaps.max() <= 4e-6 and 0 < noise.float().mean() < 0.6


@torch.no_grad()  # a caller who forbids gradients does not forbid learning
def test_mobile_sams_decoder_learns_too() -> None:
    own = DecoderCopy(build_sam("mobile"))
    main = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(0))
    embedding, labels = Embedding(main, (), ((40, 60),)), torch.full((40, 60), UNKNOWN)
    labels[4, 5] = 1
    prompts = Prompts.clicks([[(5, 4, True)]])
    answer = own.answer(embedding, prompts)
    before = own.learn(answer, labels, 1e-5)
    assert own.learn(answer, labels, 1e-5) < before  # the same guess, by a forward pass of its own


# -- games -----------------------------------------------------------------------------------------------------------------------
def test_a_game_stops_at_the_target_or_after_so_many_clicks() -> None:
    own = annotator("none")
    hopeless = play(own, picture(), disc(), clicks=4, target=1.0)
    assert len(hopeless) == 4 and all(0 <= click.iou < 1 for click in hopeless) and len(own.clicks) == 4
    assert len(play(own, picture(), disc(), clicks=4, target=hopeless[0].iou or 1e-9)) == 1
    assert own.clicks[0] == hopeless[0][:3] == (60, 40, True)  # the disc's centre, as `next_click` says

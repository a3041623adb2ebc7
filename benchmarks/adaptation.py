"""What a step of adaptation costs beside the answer that it corrects: one JSON object a line.

    python benchmarks/adaptation.py [--peers] [--quick]

The bar is 2.2 forwards for backward plus update, the aim 1.5; the paper's figures are 43.6 ms against 13.1 ms, 3.3 forwards. Ours is the step that
shares the forward pass of the answer, `floor_seconds` that forward pass (decoder and upscaling; the image is embedded before), the reference the
obvious step: the forward pass once more, the loss on upscaled logits, backward, plain Adam. All three alternately in one process and on one thread.
"agree" is the largest difference of weights, in learning rates, after one step of each from the same start. Random weights and embeddings cost what
trained ones cost. A copy's megabytes are those of its weights and of Adam's state. There is no peer to install; --peers changes nothing.
"""
import argparse
import copy

import numpy as np
import torch
from timing import alternate, report, seconds

from defectbook.core import generator
from defectbook.methods.adaptation import click_mask, eroded_mask
from defectbook.models.decoder_copies import DecoderCopy, sparse_cross_entropy
from defectbook.models.sam import Embedding, PromptModel, Prompts, build_sam, parameter_count
from defectbook.models.sam_lite import SamLite

RATE = 1e-6
CLICKS = [(0.5, 0.5, True), (0.1, 0.2, False), (0.7, 0.4, True)]  # shares of the image's side


def compare(model: PromptModel, embedding: Embedding, labels: np.ndarray, clicks: list, case: str, rounds: int, encoder: float | None) -> None:
    """One line: a step on `labels` after `clicks`."""
    own, plain = DecoderCopy(model), copy.deepcopy(model).requires_grad_(False)
    learnt = {name: p.requires_grad_(True) for name, p in plain.named_parameters() if name in own.weights}
    adam = torch.optim.Adam(learnt.values(), lr=RATE, fused=False, foreach=False)
    earlier = torch.randn(1, 1, *model.mask_size, generator=torch.Generator().manual_seed(0)) if len(clicks) > 1 else None
    prompts, known = Prompts.clicks([clicks], earlier), torch.from_numpy(labels)
    answers = []

    def forward() -> torch.Tensor:
        answers.append(own.answer(embedding, prompts))
        with torch.no_grad():
            return model.masks(answers[-1].logits, labels.shape)

    def step() -> float:
        return own.learn(answers.pop(), known, RATE)

    def obvious() -> None:
        logits, estimates = plain.decode(embedding, prompts, several=earlier is None)
        choice = int(estimates[0].argmax())
        adam.zero_grad()
        sparse_cross_entropy(plain.masks(logits[:, choice:choice + 1], labels.shape)[0, 0], known).backward()
        adam.step()

    forward(), step(), obvious()
    agree = max(float((own.weights[name] - p).detach().abs().max()) for name, p in learnt.items()) / RATE
    (floor, ours, reference), _ = alternate([forward, step, obvious], rounds)
    megabytes = sum(value.nelement() * value.element_size() for value in own.tensors().values()) / 2**20
    report(case, ours, reference, floor, round(agree, 4), over_forward=round(ours / floor, 3), paper_over_forward=round(43.6 / 13.1, 2),
           encoder_seconds=None if encoder is None else round(encoder, 4), decoder_parameters=sum(p.numel() for p in own.weights.values()),
           other_parameters=parameter_count(model) - sum(p.numel() for p in own.weights.values()), copy_megabytes=round(megabytes, 1))


def compare_all(model: PromptModel, embedding: Embedding, encoder: float | None, rounds: int) -> None:
    """After the first click, after three, and from a result mask."""
    height, width = embedding.sizes[0]
    clicks = [(int(x * width), int(y * height), positive) for x, y, positive in CLICKS]
    y, x = np.ogrid[:height, :width]
    disc = (x - width // 2) ** 2 + (y - height // 2) ** 2 < (height // 4) ** 2
    pruned = eroded_mask(disc)
    for name, chosen, labels in (("first click", clicks[:1], None), ("three clicks", clicks, None), ("eroded result mask", clicks, pruned)):
        labels = click_mask(chosen, (height, width)) if labels is None else labels
        compare(model, embedding, labels, chosen, f"{model.name} at {model.side} px, {name}", rounds, encoder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="accepted for uniformity; there is no peer")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and no ViT-B")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lite, image = SamLite(256).eval(), generator(0).integers(0, 255, (256, 256, 3), dtype="uint8")
    with torch.no_grad():
        taken, embedding = min((seconds(lite.embed, [image]) for _ in range(3)), key=lambda pair: pair[0])
    compare_all(lite, embedding, taken, 5 if quick else 20)
    if not quick:
        vit = build_sam("vit_b")
        compare_all(vit, Embedding(torch.randn(1, 256, 64, 64), (), ((1024, 1024),)), None, 5)

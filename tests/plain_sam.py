"""An annotator model that does not learn: sam_lite behind set_image, click, undo and finish."""

import numpy as np
import torch

from defectbook.core import ParameterError
from defectbook.models.sam import PromptModel, Prompts


class PlainSam:
    """The best of three masks after one click, the single mask after more, each time with the last logits."""

    def __init__(self, model: PromptModel):
        self.model, self.calls = model, []

    def set_image(self, image, cls=None, embedding=None):
        with torch.no_grad():
            self.embedding = embedding if embedding is not None else self.model.embed([image])
        self.size, self.clicks, self.answers = image.shape[:2], [], []
        self.calls.append(("set_image", self.size, cls))

    def click(self, x, y, positive=True):
        if not (0 <= x < self.size[1] and 0 <= y < self.size[0]):
            raise ParameterError(f"click ({x}, {y}) outside")
        self.clicks.append((x, y, positive))
        before = self.answers[-1] if self.answers else None
        with torch.no_grad():
            logits, estimates = self.model.decode(self.embedding, Prompts.clicks([self.clicks], before), several=before is None)
        self.answers.append(logits[:, [int(estimates.argmax())]])
        self.calls.append(("click", x, y, positive))
        return self._mask()

    def undo(self):
        self.clicks.pop(), self.answers.pop()
        self.calls.append(("undo",))
        return self._mask() if self.answers else None

    def finish(self, mask=None):
        self.calls.append(("finish", None if mask is None else int(np.count_nonzero(mask))))
        return self._mask() if mask is None else mask

    def _mask(self):
        return self.model.masks(self.answers[-1], self.size)[0, 0].numpy() > 0

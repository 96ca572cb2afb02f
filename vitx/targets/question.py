"""The protocol of `vitx.targets`: questions that a target can ask a model."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.given import Inputs
from vitx.models.prediction import forward
from vitx.targets.spot import Cells


class Answers(NamedTuple):
    """The score of each image, read from an output, and annotations for the picture."""

    scores: Tensor | None = None  # (B,); None if one token is asked about instead, see `Asked.cells`
    captions: Sequence[str] | None = None
    boxes: Tensor | None = None  # (B, 4), the boxes to draw: x0, y0, x1, y1 in pixels
    paired: bool = False  # each two successive images belong together
    grid: tuple[int, ...] | None = None  # (h, w), in which tokens were taken to lie; None if none were


class Asked(NamedTuple):
    """A question put to a model: how to run the model, and how to compute the score to explain.

    `forward` and `answers` are recorded on the tape, so the map explains a model that outputs the score. What
    else they need, such as the features of a text, is computed beforehand by `Question.put`.
    """

    images: Tensor  # (B, ...): the given images, perhaps repeated, or with others added
    answers: Callable[[Any], Answers] = lambda _: Answers()  # takes the output
    forward: Callable[[Any, Tensor, Inputs], Any] = forward  # takes the model, images, and other inputs
    cells: Cells | None = None  # from the shape of the map to the cell of each image's token to explain


class Prepared(NamedTuple):
    """The inputs of a model for pictures and a question, and the normalization of the pictures."""

    inputs: Mapping[str, Any]  # the arguments of forward, by name
    mean: Sequence[float]  # subtracted from each channel, in units of [0, 1]
    std: Sequence[float]  # the divisor of each channel after that


class Question:
    """A target with access to more than the logits: the model, the images and the whole output."""

    rows: str = ""  # name of the attribute with one row per image, or one for all; empty if none

    def prepare(self, model: nn.Module, images: Any) -> Prepared | None:
        """Prepare images together with the question; return None to prepare the images alone."""
        return None

    def parts(self, model: nn.Module, images: Tensor, inputs: Inputs) -> "tuple[Inputs, Sequence[Question]]":
        """Return the inputs and the questions that this one consists of, each of which has its own maps."""
        return inputs, [self]

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Put the question to a model in eval mode; raise a VitxError if it does not fit the images."""
        raise NotImplementedError

    def one_each(self) -> "Question":
        """Return this question with one map per image, as callbacks show it during training."""
        return self

    def of(self, images: slice) -> "Question":
        """Return this question for a slice of the images."""
        given = getattr(self, self.rows, None)
        if given is None or (isinstance(given, Tensor) and len(given) == 1):
            return self
        same = copy.copy(self)
        setattr(same, self.rows, given[images])
        return same

    def runs_inside(self, model: nn.Module) -> bool:
        """Return whether the question calls a part of the model instead of the model itself."""
        return False


def for_each(rows: Tensor, count: int, noun: str) -> Tensor:
    """Expand rows to one per image; raise a VitxError unless there is one row, or one per image."""
    if len(rows) not in (1, count):
        raise VitxError(f"{len(rows)} {noun} for {count} images: give one for each image")
    return rows.expand(count, *rows.shape[1:])

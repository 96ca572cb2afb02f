"""The protocol of `vitx.targets`: questions that a target may ask of a model."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.given import Inputs
from vitx.models.prediction import forward
from vitx.targets.spot import Cells


class Answers(NamedTuple):
    """What is read from an output: the score of each image, and what a picture shows beside it."""

    scores: Tensor | None = None  # (B,); None: it is that of one token, see `Asked.cells`
    captions: Sequence[str] | None = None
    boxes: Tensor | None = None  # (B, 4), the box that it draws: x0, y0, x1, y1 in pixels
    paired: bool = False  # two images each belong together


class Asked(NamedTuple):
    """A question that was put to a model: how to run it, and the score that is explained.

    `forward` and `answers` run on the tape, so that the map is that of a model that puts out the score. What
    they need beside the picture, as the features of a text, is computed before, by `Question.put`.
    """

    images: Tensor  # (B, ...): those that were given, one or several of each, or others beside them
    answers: Callable[[Any], Answers] = lambda _: Answers()  # from the output
    forward: Callable[[Any, Tensor, Inputs], Any] = forward  # of the model, images, and what else there is
    cells: Cells | None = None  # from the grid of the map to the cell of each image whose token is asked for


class Prepared(NamedTuple):
    """The inputs of a model for pictures and a question, and how the pictures were normalized."""

    inputs: Mapping[str, Any]  # what forward takes, by name
    mean: Sequence[float]  # what was subtracted from each channel, in units of [0, 1]
    std: Sequence[float]  # what each channel was then divided by


class Question:
    """A target that knows more than the logits: the model, the images and the whole output."""

    rows: str = ""  # the name of what has a row for each image, or one for all; empty: there is none

    def prepare(self, model: nn.Module, images: Any) -> Prepared | None:
        """Prepare images as the model takes them together with the question; None: as without one."""
        return None

    def parts(self, model: nn.Module, images: Tensor, inputs: Inputs) -> "tuple[Inputs, Sequence[Question]]":
        """Return the questions that this one consists of, each with maps of its own, and their inputs."""
        return inputs, [self]

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Put the question to a model in eval mode; raise a VitxError if it does not fit the images."""
        raise NotImplementedError

    def one_each(self) -> "Question":
        """Return the same with one map for each image, as a training shows it."""
        return self

    def of(self, images: slice) -> "Question":
        """Return the same of some of the images."""
        given = getattr(self, self.rows, None)
        if given is None or (isinstance(given, Tensor) and len(given) == 1):
            return self
        same = copy.copy(self)
        setattr(same, self.rows, given[images])
        return same

    def runs_inside(self, model: nn.Module) -> bool:
        """Return whether it calls a part of the model, and not the model itself."""
        return False


def for_each(rows: Tensor, count: int, noun: str) -> Tensor:
    """Return a row for each image, where there is one row, or as many as there are images."""
    if len(rows) not in (1, count):
        raise VitxError(f"{len(rows)} {noun} for {count} images: give one for each image")
    return rows.expand(count, *rows.shape[1:])

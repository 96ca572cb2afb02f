"""The end of a pass: runs the model on the tape, and reads the score that a target means."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.given import ALONE, Inputs
from vitx.models.prediction import Target, forward, read_logits, scores, target_classes
from vitx.tape.output import Score, logits_of, output_value, score_of
from vitx.tape.recorder import Recorder
from vitx.tape.spot import Spot, find_spot
from vitx.tape.tape import Tape
from vitx.tape.values import Value
from vitx.targets.objects import objects_of
from vitx.targets.outputs import described, main, mask_queries
from vitx.targets.question import Answers, Asked


@dataclass(frozen=True, eq=False)
class End:
    """Where a pass ended.

    Attributes:
        value: of the output that the score is computed from.
        output: that output, (B, ...): the logits, or the scores of a question.
        logits: what the model put out.
        classes: (B,), the class of each image; None where the target means none.
        has_score: whether there is a score.
        captions: what a picture says of each image; None: what was predicted.
        boxes: (B, 4), the box that it draws; None: none.
        paired: whether two images each belong together.
        objects: (B, Q), how sure each query of a detector is of an object; None: it is no detector.
        spot: the token that is asked for; None: it is asked for a score of the output.
    """

    value: Value
    output: Tensor
    logits: Tensor
    classes: Tensor | None
    has_score: bool
    target: Any = None
    captions: Sequence[str] | None = None
    boxes: Tensor | None = None
    paired: bool = False
    objects: Tensor | None = None
    spot: Spot | None = None

    def score(self, kind: torch.dtype) -> Score:
        """Differentiates the score by the output, or raises a VitxError if that cannot be done."""
        if self.spot is not None:
            return self.spot.score
        return score_of(self.value, self.total, self.output, kind)

    def check_grid(self, maps: Tensor) -> None:
        """Raises a VitxError unless the grid of maps, (B, h, w), is the one in which a token was named."""
        if self.spot is not None and tuple(maps.shape[1:]) != self.spot.grid:
            raise VitxError(
                f"the map has a grid of {tuple(maps.shape[1:])}, and the tokens of the last layer lie in one "
                f"of {self.spot.grid}: ask by a score of the features of that token"
            )

    def total(self, output: Tensor) -> Tensor:
        """Returns the sum of the scores of all images, from such an output."""
        if isinstance(self.target, Asked):
            return output.sum()
        return scores(self.target, output, self.classes).sum()

    def of_each(self, images: int) -> tuple[Tensor, Tensor | None, list[str] | None]:
        """Returns the logits, the classes and the captions of each image: of one prompt, all have its own.

        Raises:
            VitxError: They are of several prompts.
        """
        logits, classes, captions = self.logits.detach(), self.classes, self.captions
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if len(logits) not in (1, images):
            raise VitxError(
                f"the model put out {tuple(logits.shape)} for {images} pictures: explain one prompt at a time"
            )
        if len(logits) < images:
            logits = logits.expand(images, *logits.shape[1:])
            classes = None if classes is None else classes.expand(images)
            captions = None if captions is None else [*captions] * images
        return logits, classes, None if captions is None else [*captions]


def run(
    recorder: Recorder, model: nn.Module, images: Tensor, target: "Target | Asked", inputs: Inputs = ALONE
) -> End:
    """Runs the model on the tape, and finds the score.

    Raises:
        VitxError: As for `vitx.explain`.
    """
    if isinstance(target, Asked):
        return _answer(recorder, model, images, target, inputs)
    output = forward(model, images, inputs)
    if mask_queries(output) is not None:
        raise VitxError(described(output))
    logits = read_logits(output, images, recorder.made_last, inputs)
    value = output_value(recorder.tape, recorder.get(logits))
    if not callable(target):
        value, logits = logits_of(value, logits, recorder.squashed)
    classes = target_classes(target, logits)
    has_score = classes is not None or callable(target)
    objects = objects_of(output, model)
    return End(value, logits, logits, classes, has_score, target, objects=objects)


def _answer(recorder: Recorder, model: nn.Module, images: Tensor, asked: Asked, inputs: Inputs) -> End:
    output = asked.forward(model, images, inputs)
    if asked.score is None:
        return _unread(recorder, images, asked, output)
    score = asked.score(output)
    counts = (1, len(images)) if inputs.together else (len(images),)
    if not isinstance(score, Tensor) or score.ndim != 1 or len(score) not in counts:
        found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise VitxError(f"a target must give scores of shape ({len(images)},), found {found}")
    value = output_value(recorder.tape, recorder.get(score))
    logits = main(output)
    end = End(value, score, score if logits is None else logits, None, True, asked)
    if asked.answers is not None:
        answers = asked.answers(output)
    else:
        answers = Answers(None if asked.captions is None else asked.captions(score.detach()))
    return replace(end, **answers._asdict(), objects=objects_of(output, model))


def _unread(recorder: Recorder, images: Tensor, asked: Asked, output: Any) -> End:
    """Returns the end of a pass whose output is not asked for."""
    logits = main(output)
    logits = images.new_zeros(len(images), 0) if logits is None else logits
    value = recorder.get(logits) or recorder.tape.values[-1]
    answers = Answers(None) if asked.answers is None else asked.answers(output)
    return End(value, logits, logits, None, True, asked, **answers._asdict())


def located(end: End, tape: Tape, images: int, kind: torch.dtype) -> End:
    """Finds the token that a question asks for, once the pass is over; the end as it is if it asks for none.

    Raises:
        VitxError: There is no such token.
    """
    if not isinstance(end.target, Asked) or end.target.cells is None:
        return end
    spot = find_spot(tape, images, end.target.cells, kind)
    return replace(end, spot=spot, value=spot.score.value)

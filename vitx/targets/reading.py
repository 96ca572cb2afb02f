"""The end of a pass: runs the model on the tape, and reads the score that a target means."""

from dataclasses import dataclass, replace

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
from vitx.targets.question import NOTHING, Answers, Asked


@dataclass(frozen=True, eq=False)
class End:
    """The end of a pass.

    Attributes:
        value: of the output that the score is computed from.
        output: that output, (B, ...): the logits, or the scores of a question.
        logits: what the model put out.
        target: what was asked for.
        classes: (B,), the class of each image; None where the target means none.
        answers: what a picture says of each image; without captions, what was predicted.
        objects: (B, Q), how sure each query of a detector is of an object; None: it is no detector.
        spot: the token that is asked for; None: it is asked for a score of the output.
    """

    value: Value
    output: Tensor
    logits: Tensor
    target: "Target | Asked"
    classes: Tensor | None = None
    answers: Answers = NOTHING
    objects: Tensor | None = None
    spot: Spot | None = None

    @property
    def has_score(self) -> bool:
        """True if there is a score."""
        return self.classes is not None or isinstance(self.target, Asked) or callable(self.target)

    def score(self, kind: torch.dtype) -> Score:
        """Differentiate the score by the output, or raise a VitxError if that cannot be done."""
        if self.spot is not None:
            return self.spot.score
        return score_of(self.value, self.total, self.output, kind)

    def check_grid(self, maps: Tensor) -> None:
        """Raise a VitxError unless the grid of maps, (B, h, w), is the one in which a token was named."""
        if self.spot is not None and tuple(maps.shape[1:]) != self.spot.grid:
            raise VitxError(
                f"the map has a grid of {tuple(maps.shape[1:])}, and the tokens of the last layer lie in one "
                f"of {self.spot.grid}: ask by a score of the features of that token"
            )

    def total(self, output: Tensor) -> Tensor:
        """Return the sum of the scores of all images, from such an output."""
        if isinstance(self.target, Asked):
            return output.sum()
        return scores(self.target, output, self.classes).sum()

    def of_each(self, images: int) -> tuple[Tensor, Tensor | None, list[str] | None]:
        """Return the logits, the classes and the captions of each image: of one prompt, all have its own.

        Raises:
            VitxError: They are of several prompts.
        """
        logits, classes, captions = self.logits.detach(), self.classes, self.answers.captions
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
    """Run the model on the tape, and find the score.

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
    return End(value, logits, logits, target, classes, objects=objects_of(output, model))


def _answer(recorder: Recorder, model: nn.Module, images: Tensor, asked: Asked, inputs: Inputs) -> End:
    output = asked.forward(model, images, inputs)
    logits, objects = main(output), objects_of(output, model)
    if asked.score is None:  # the output is not asked for
        logits = images.new_zeros(len(images), 0) if logits is None else logits
        value = recorder.get(logits) or recorder.tape.values[-1]
        return End(value, logits, logits, asked, answers=asked.answers(output), objects=objects)
    score = asked.score(output)
    counts = (1, len(images)) if inputs.together else (len(images),)
    if not isinstance(score, Tensor) or score.ndim != 1 or len(score) not in counts:
        found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise VitxError(f"a target must give scores of shape ({len(images)},), found {found}")
    value = output_value(recorder.tape, recorder.get(score))
    logits = score if logits is None else logits
    return End(value, score, logits, asked, answers=asked.answers(output), objects=objects)


def located(end: End, tape: Tape, images: int, kind: torch.dtype) -> End:
    """Find the token that a question asks for, once the pass is over; the end as it is if it asks for none.

    Raises:
        VitxError: There is no such token.
    """
    if not isinstance(end.target, Asked) or end.target.cells is None:
        return end
    spot = find_spot(tape, images, end.target.cells, kind)
    return replace(end, spot=spot, value=spot.score.value)

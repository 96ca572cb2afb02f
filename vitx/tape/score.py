"""The end of a tape: the output of the model, and the score that is read from it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.tape.attention import Attention, Mixture, Scores
from vitx.tape.expanded import ratio
from vitx.tape.recorder import SQUASHING
from vitx.tape.tape import Tape
from vitx.tape.values import Value

NO_ATTENTION = (
    "no attention between tokens was found: vitx explains Vision Transformers whose attention is a softmax, "
    "or another function of scores, times the values"
)

# Steps that leave the elements unchanged, provided that they keep their number.
_FORMS = frozenset(("view", "select", "slice", "squeeze", "unsqueeze", "_to_copy", "alias", "clone"))


class Score(NamedTuple):
    """The value that a score is read from, (B, ...), its tensor, and the gradient with respect to it."""

    value: Value
    output: Tensor
    gradient: Tensor

    @property
    def start(self) -> Tensor:
        """Relevance that sums to 1 for each image, in proportion to |gradient|; even if that is 0."""
        size = self.gradient.abs()
        whole = size.flatten(1).sum(1).view(-1, *[1] * (size.ndim - 1)) if size.ndim > 1 else size
        return torch.where(whole > 0, ratio(size, whole), evenly(self.output))


def output_value(tape: Tape, value: Value | None) -> Value:
    """Return the value of the output, or raise a VitxError if no attention explains it."""
    if value is None:
        raise VitxError(
            "the model's output does not come from the image through any recorded operator: code outside of "
            "torch, or compiled in another process, cannot be followed"
        )
    read = {value}
    for step in reversed(tape.steps):
        if read.isdisjoint(step.outputs):
            continue
        if isinstance(step, Scores) and not step.contracts_channels():
            raise VitxError(
                f"the output comes from {step}, a product of two values that both depend on the "
                "image, with no softmax behind it (linear attention): no rule takes relevance through it"
            )
        if isinstance(step, Mixture) and any(a.value.made_from(step.outputs[0]) for a in tape.attentions):
            raise VitxError(
                f"the output comes from {step}, a product of attention weights that is used as a value, not "
                "as weights: no rule takes relevance through it"
            )
        read.update(step.inputs[:1] if isinstance(step, Attention) else step.inputs)
    if not any(isinstance(step, Attention) for step in tape.steps):
        unknown = ", ".join(dict.fromkeys(s.name for s in tape.steps if s.relevance is None))
        raise VitxError(
            NO_ATTENTION + (f" (operators of this model without a rule: {unknown})" if unknown else "")
        )
    if any(_lacks_sum(tape, attention) for attention in tape.attentions):
        raise VitxError(
            "exponentials of scores are multiplied by the values without a division by their sum before or "
            "right after: the share of its relevance that a token keeps is unknown"
        )
    return value


def _lacks_sum(tape: Tape, attention: Attention) -> bool:
    """Return whether weights are exponentials that are also added up, as if to divide by their sum later."""
    exponentials = attention.inputs[1]
    if exponentials.kind != "exp" or not attention.residuals or attention.divided:
        return False
    same = exponentials.rearranges
    read = (step for step in tape.steps if any(value.rearranges == same for value in step.inputs))
    return any(step is not attention and step.outputs[0].rearranges != same for step in read)


def evenly(output: Tensor) -> Tensor:
    """Return relevance that is equal for all outputs of an image and sums to 1."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    return torch.full((), 1 / output[0].numel(), dtype=dtype, device=output.device).expand(output.shape)


def logits_of(value: Value, output: Tensor, squashed: tuple[Tensor, Value] | None) -> tuple[Value, Tensor]:
    """Return the value and the tensor of the logits behind probabilities; any other output unchanged.

    `squashed` is the input of the last softmax or sigmoid of the pass.
    """
    end = value
    while (step := end.made_by) is not None and step.name in _FORMS and len(step.inputs) == 1:
        end = step.inputs[0]
    if step is None or squashed is None or step.name not in SQUASHING or step.inputs[0] is not squashed[1]:
        return value, output
    if [size for size in end.shape if size != 1] != [size for size in output.shape if size != 1]:
        return value, output  # only some of the logits
    by_image = step.name == "sigmoid" or step.outputs[0].dim == len(end.shape) - 1
    return (squashed[1], squashed[0].detach()) if by_image else (value, output)


def score_of(
    value: Value | None, total: Callable[[Tensor], Tensor], output: Tensor, kind: torch.dtype
) -> Score:
    """Differentiate the score with respect to an output, (B, ...); raise a VitxError if that is impossible.

    The score has the precision of the pass, even if the output has a higher one.
    """
    if value is None:
        raise VitxError("the score does not depend on the image")
    dtype = torch.promote_types(output.dtype, torch.float32)
    with torch.enable_grad():
        leaf = output.detach().to(dtype, copy=True).requires_grad_()
        score = total(leaf)
        if not score.requires_grad:
            raise VitxError(
                "the score does not depend on the output in a differentiable way: compute it from the "
                "model's output by torch functions, with gradients enabled"
            )
        (found,) = torch.autograd.grad(score, leaf)
    return Score(value, output.detach().to(kind), found.to(kind))

"""The attentions that are heads of one: all that one residual closes, if they have the same queries."""

from functools import cache, partial

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.tape.attention import Attention
from vitx.tape.expanded import ratio, summed
from vitx.tape.sums import Layer, Sum
from vitx.tape.tape import Tape
from vitx.tape.walk import marks, through, walk

_EXACT = 1e9  # relevance in float64 is exact to more digits than this


class Heads:
    """The attentions of a tape that are parallel heads."""

    def __init__(self, tape: Tape) -> None:
        # Each head of a layer asks for those of all.
        self._tokens_of_rows = cache(partial(tokens_of_rows, tape))
        self._tokens_of_keys = cache(partial(tokens_of_keys, tape))

    def tokens_of_rows(self, layer: Layer, attention: Attention) -> Tensor:
        """Return the number of the token that each row of an attention belongs to, (T, Q)."""
        return self._tokens_of_rows(layer)[attention]

    def beside(self, layer: Layer, attention: Attention) -> list[Attention]:
        """Return the heads parallel to an attention in its layer, itself among them.

        Raises:
            VitxError: It is unknown which attentions are heads of one.
        """
        if len(layer.attentions) == 1:
            return [attention]
        shape, own = attention.weights.shape, self.tokens_of_rows(layer, attention)
        found = []
        for other in layer.attentions:
            theirs = self.tokens_of_rows(layer, other)
            if other.weights.shape[3] == shape[3] and torch.equal(own, theirs):
                why = self._why_not(attention, other)
                found.append(other)
            else:
                why = "one attention inside a residual feeds another" if _feeds(attention, other) else ""
                if torch.isin(own[own > 0], theirs).any():
                    why = why or "parallel attentions have some, but not all, of their queries in common"
            if why:
                raise VitxError(f"{why}, so their heads cannot be fused: take {_instead(layer)}")
        return found

    def _why_not(self, attention: Attention, other: Attention) -> str:
        """Return why two attentions with the same queries are no heads of one, if they are none."""
        (_, asked), (_, asking) = attention.inputs, other.inputs
        if other is not attention and asking.base == asked.base and asked.kind in ("weights", "exp"):
            return "the same attention weights are applied to two parts of the values separately"
        if not torch.equal(self._tokens_of_keys(attention), self._tokens_of_keys(other)):
            return "parallel attentions have the same queries, but different keys"
        return ""


def _feeds(one: Attention, other: Attention) -> bool:
    return other.inputs[0].made_from(one.value) or one.inputs[0].made_from(other.value)


def check_alone(tape: Tape, pooling: Attention) -> None:
    """Raise a VitxError if it is unknown which of several matrices without a residual are heads of one.

    They may be attentions that pool the same tokens, or learned queries.
    """
    if pooling.layout.learned_queries:
        raise VitxError("heads of an attention cannot be told from learned queries: take head_fusion='mean'")
    for one in [one for one in tape.attentions if one is not pooling and not one.residuals]:
        alike = one.last_residual == pooling.last_residual
        apart = not (one.value.made_from(pooling.value) or pooling.value.made_from(one.value))
        if alike and apart:
            raise VitxError(
                "attentions beside each other pool the same tokens, and may be heads of one: take "
                "head_fusion='mean'"
            )


def _instead(layer: Layer) -> str:
    """Return the method to suggest if heads cannot be fused: if rows sum to 1, a residual keeps half."""
    normalized = all(one.weights.sums_to_1 for one in layer.attentions)
    return "rollout with head_fusion='mean' and no discard_ratio" if normalized else "evidence"


def tokens_of_rows(tape: Tape, layer: Layer) -> dict[Attention, Tensor]:
    """Return the number of the token of the sums that each row of A belongs to, (T, Q); 0 if none.

    The numbers are random. A row that belongs to several tokens has the mean of their numbers.
    """
    attentions = layer.attentions
    shapes = [one.weights.shape for one in attentions]
    zeros = [torch.zeros(2, images, rows, dtype=torch.float64, device="cpu") for images, _, rows, _ in shapes]
    given = dict(zip(attentions, zeros, strict=True))
    first = min(one.index for one in attentions)
    for number, residual in enumerate(sorted(layer.residuals, key=lambda one: one.index)):
        assert residual.stream is not None
        size, steps = residual.outputs[0].shape, range(first + 1, residual.index)
        axes = residual.branches[0].axes if residual.channels() else residual.stream.axes
        numbers = marks(size, axes if len(axes) == len(size) else ()) + number
        for row, r in enumerate((numbers, torch.ones_like(numbers))):
            starts = {term: part for term, part in residual.into_branches(r) if part is not None}
            found = walk(tape, starts, through, watched=[one.value for one in attentions], steps=steps)
            passed = found.arrived | found.passed
            for one in attentions:
                if one.value in passed:
                    given[one][row] += one.rows(passed[one.value])
    return {one: (ratio(*pair) * _EXACT).round().long() for one, pair in given.items()}


def tokens_of_keys(tape: Tape, attention: Attention) -> Tensor:
    """Return a number for each token of the last residual, or the image, by the keys that come from it."""
    numbers = attention.to_values(marks((attention.weights.shape[0], attention.weights.shape[3])))
    source = tape.values[attention.last_residual]
    step = source.made_by
    steps = range(0 if step is None else step.index + 1, attention.index)
    arrived = walk(tape, {attention.inputs[0]: numbers}, through, steps=steps).arrived.get(source)
    if arrived is None:
        return torch.zeros((), device="cpu")
    found = summed(arrived, step.channels()) if isinstance(step, Sum) else arrived
    return (found * _EXACT).round().long()

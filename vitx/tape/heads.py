"""The attentions that are heads of one: all that one residual closes, if they have the same queries."""

from collections.abc import Callable

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.tape.attention import Attention
from vitx.tape.expanded import ratio, summed
from vitx.tape.sums import Layer
from vitx.tape.tape import Tape
from vitx.tape.walk import marks, through, walk

_EXACT = 1e9  # relevance in float64 is exact to more digits than this


def heads_beside(
    layer: Layer, attention: Attention, tokens_of: Callable[[Layer, Attention], Tensor]
) -> list[Attention]:
    """Return the attentions of a layer that are parallel heads, with the same queries and keys."""
    if len(layer.attentions) == 1:
        return [attention]
    shape, asked, own = attention.weights.shape, attention.inputs[1], tokens_of(layer, attention)
    found = []
    for other in layer.attentions:
        if other is not attention and other.inputs[1].base == asked.base and asked.kind in ("weights", "exp"):
            raise VitxError(
                "the same attention weights are applied to two parts of the values separately, so the "
                f"gradient of A is unknown: take {_instead(layer)}"
            )
        theirs = tokens_of(layer, other)
        fed = other.inputs[0].made_from(attention.value) or attention.inputs[0].made_from(other.value)
        if other.weights.shape[3] == shape[3] and torch.equal(own, theirs):
            found.append(other)
        elif fed or torch.isin(own[own > 0], theirs).any():
            partly = "parallel attentions have some, but not all, of their queries in common"
            why = "one attention inside a residual feeds another" if fed else partly
            raise VitxError(f"{why}, so their heads cannot be fused: take {_instead(layer)}")
    return found


def check_alone(tape: Tape, pooling: Attention) -> None:
    """Raise a VitxError if attentions without a residual pool the same tokens: they may be heads of one."""
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


def tokens_of_rows(tape: Tape, layer: Layer, attention: Attention) -> Tensor:
    """Return the number of the token of the sums that each row of an attention belongs to, (T, Q); 0 if none.

    The numbers are random. A row that belongs to several tokens has the mean of their numbers.
    """
    shape = attention.weights.shape
    given = torch.zeros(2, shape[0], shape[2], dtype=torch.float64)
    for number, residual in enumerate(sorted(layer.residuals, key=lambda one: one.index)):
        assert residual.stream is not None
        size, steps = residual.outputs[0].shape, range(attention.index + 1, residual.index)
        axes = residual.branches[0].axes if residual.channels() else residual.stream.axes
        numbers = marks(size, axes if len(axes) == len(size) else ()) + number
        for row, r in zip(given, (numbers, torch.ones_like(numbers)), strict=True):
            starts = {term: part for term, part in residual.into_branches(r) if part is not None}
            arrived = walk(tape, starts, through, steps=steps).arrived.get(attention.value)
            row += 0 if arrived is None else summed(attention.arrived(arrived), [1, 3])
    return (ratio(given[0], given[1]) * _EXACT).round().long()

"""A residual around attention whose share depends on A: what each of its elements keeps.

The branch gets all of the relevance. Once A was read, what the rows of the attention keep goes to the stream,
at the elements of the sum that it arrived from.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.tape.attention import Attention, Layer
from vitx.tape.axes import channel_dims
from vitx.tape.expanded import over, scaled, summed
from vitx.tape.sums import Sum
from vitx.tape.tape import Tape
from vitx.tape.values import Value
from vitx.tape.walk import Sent, marks, through, walk


def into_branches(residual: Sum, r: Tensor) -> Sent:
    """Gives all of a sum's relevance to its branches; where these are padding, to the stream."""
    parts = residual.parts()
    shares = [parts.get(term, 0.0) for term in residual.inputs]
    return zip(residual.inputs, residual.back([r], shares), strict=True)


def to_stream(
    tape: Tape, residual: Sum, r: Tensor, attention: Attention, shares: Tensor
) -> Iterable[tuple[Value, Tensor]]:
    """Sends the share that each row of an attention keeps, (T, Q), to the stream, older than the attention.

    It is a share of the relevance of the residual, which went into its branches.
    """
    assert residual.stream is not None
    kept = residual.to_term(residual.stream, _kept(tape, residual, r, attention, shares))
    steps = range(attention.index, residual.index)  # what rearranges the stream
    return walk(tape, {residual.stream: kept}, through, steps=steps).arrived.items()


def _kept(tape: Tape, residual: Sum, r: Tensor, attention: Attention, shares: Tensor) -> Tensor:
    """Returns what each element of the sum keeps of its relevance."""
    alike = [dim for dim in _channels(residual) if r.stride(dim) == 0]
    sizes = [1 if dim in alike else size for dim, size in enumerate(r.shape)]
    with torch.enable_grad():
        ones = torch.ones(sizes, dtype=r.dtype, device=r.device, requires_grad=True)
        sent = into_branches(residual, ones.expand(r.shape))
        starts = {term: part for term, part in sent if part is not None}
        steps = range(attention.index + 1, residual.index)
        arrived = walk(tape, starts, through, steps=steps).arrived.get(attention.value)
        if arrived is None:
            return torch.zeros_like(r)
        rows = summed(attention.arrived(arrived), [1, 3])
        (found,) = torch.autograd.grad((rows * shares).sum(), ones, materialize_grads=True)
    return scaled(r, found * (ones.numel() / r.numel()))


def heads_beside(
    layer: Layer, attention: Attention, marked: Callable[[Layer, Attention], Tensor]
) -> list[Attention]:
    """Returns the attentions of a layer that are heads beside one another, of the same queries and keys."""
    if len(layer.attentions) == 1:
        return [attention]
    shape, asked, own = attention.weights.shape, attention.inputs[1], marked(layer, attention)
    found = []
    for other in layer.attentions:
        if other is not attention and other.inputs[1].base == asked.base and asked.kind == "weights":
            raise VitxError(
                "the same attention weights meet two parts of the values one by one, so the gradient of A "
                "cannot be told: take rollout with head_fusion='mean' and no discard_ratio"
            )
        theirs = marked(layer, other)
        alike = all(other.weights.shape[dim] == shape[dim] for dim in (0, 2, 3))
        if alike and torch.allclose(own, theirs, rtol=1e-3, atol=1e-9):
            found.append(other)
        elif ((own != 0) & (theirs != 0)).any():
            raise VitxError(
                "attentions beside each other have some of their queries in common, not all, so their heads "
                "cannot be fused: take rollout with head_fusion='mean' and no discard_ratio"
            )
    return found


def marked(tape: Tape, layer: Layer, attention: Attention) -> Tensor:
    """Returns what each token of the sums gets, at most 1, if the rows of an attention have marks."""
    weights = attention.weights
    rows = marks((weights.shape[0], weights.shape[2])).to(weights.device, weights.dtype)
    found = []
    for residual in layer.residuals:
        ones = rows.new_ones(residual.outputs[0].shape)
        found.append(summed(_kept(tape, residual, ones, attention, rows), _channels(residual)).flatten())
    whole = torch.cat(found)
    return over(whole, whole.amax())


def _channels(residual: Sum) -> list[int]:
    """Returns the dimensions that count channels: those of a branch, which weights put out."""
    branch, found = residual.branches[0], residual.outputs[0]
    return channel_dims((branch if branch.shape == found.shape else found).axes)

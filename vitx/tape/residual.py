"""A residual around attention whose share depends on A: what a token keeps, and where it comes back.

The branch gets all of the relevance, and the attention gives back, through its queries, what the token keeps.
That is right if a query comes from the token at which the attention puts out: what enters the branch comes
home if no token attends to any other. Elsewhere, as where windows share their queries or a convolution
follows, the share that each element keeps is computed at the sum.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.tape.attention import Attention, Layer
from vitx.tape.expanded import summed
from vitx.tape.sums import Sum
from vitx.tape.tape import Tape
from vitx.tape.values import Step, Value
from vitx.tape.walk import Sent, walk

_TOLERANCE = 1e-3


def returns(tape: Tape, residual: Sum) -> bool:
    """Returns whether what enters the branch comes back to the same token through the queries."""
    if residual.returns is None:
        residual.returns = _returns(tape, residual)
    return residual.returns


def _returns(tape: Tape, residual: Sum) -> bool:
    marks = _marks(residual)
    stream = residual.stream
    assert stream is not None
    ends = _ends(tape, residual)

    def send(step: Step, arrived: list[Tensor]) -> Sent:
        if isinstance(step, Attention) and step in residual.closes:
            rows = summed(step.arrived(arrived[0]), [1, 3])
            return [(step.inputs[1], step.to_rows(rows))]
        return through(step, arrived)

    straight = walk(
        tape, {stream: residual.to_term(stream, marks)}, send, ends=ends, steps=_steps(tape, residual, ends)
    )
    around = walk(tape, into_branches(residual, marks), send, ends=ends, steps=_steps(tape, residual, ends))
    for end in ends:
        here, there = straight.arrived.get(end), around.arrived.get(end)
        if here is None or there is None or not _same(end, here, there):
            return False
    return not any(value not in ends and bool(r.any()) for value, r in around.arrived.items())


def _same(value: Value, first: Tensor, second: Tensor) -> bool:
    channels = [dim for dim, part in enumerate(value.axes) if part and all(f.channels for f in part)]
    if not channels:
        channels = _constant_along(first)
    first, second = (r.sum(channels) if channels else r for r in (first, second))
    return torch.allclose(first, second, rtol=_TOLERANCE, atol=1e-9)


def _constant_along(r: Tensor) -> list[int]:
    return [dim for dim in range(r.ndim) if r.stride(dim) == 0]


def shares_kept(tape: Tape, residual: Sum, stays: Mapping[Attention, Tensor]) -> Tensor:
    """Returns what share of its relevance each element of the sum keeps.

    Args:
        tape: the pass.
        residual: the sum.
        stays: what share of its relevance each row of its attentions keeps, (T, Q).
    """
    ends = _ends(tape, residual)
    kept: list[Tensor] = []

    def send(step: Step, arrived: list[Tensor]) -> Sent:
        if isinstance(step, Attention) and step in stays:
            kept.append((summed(step.arrived(arrived[0]), [1, 3]) * stays[step]).sum())
            return []
        return through(step, arrived)

    with torch.enable_grad():
        like = next(iter(stays.values()))
        ones = torch.ones(residual.outputs[0].shape, dtype=like.dtype, device=like.device, requires_grad=True)
        walk(tape, into_branches(residual, ones), send, ends=ends, steps=_steps(tape, residual, ends))
        if not kept:
            return torch.zeros_like(ones, requires_grad=False)
        (found,) = torch.autograd.grad(torch.stack(kept).sum(), ones, allow_unused=True)
    return torch.zeros_like(ones) if found is None else found.detach()


def heads_beside(tape: Tape, layer: Layer, attention: Attention) -> list[Attention]:
    """Returns the attentions of a layer that are heads beside one another, with the same queries and keys."""
    shape = attention.weights.shape
    if len(layer.attentions) == 1:
        return [attention]
    residual = next(iter(attention.residuals))
    ends = _ends(tape, residual)
    own = _asking(tape, residual, attention, ends)
    found = []
    for other in layer.attentions:
        asked = attention.inputs[1]
        if other is not attention and other.inputs[1].base == asked.base and asked.kind == "weights":
            raise VitxError(
                "the same attention weights meet two parts of the values one by one, so the gradient of A "
                "cannot be told: take rollout with head_fusion='mean' and no discard_ratio"
            )
        theirs = own if other is attention else _asking(tape, residual, other, ends)
        alike = (other.weights.shape[0], *other.weights.shape[2:]) == (shape[0], *shape[2:])
        if alike and _all_same(ends, own, theirs):
            found.append(other)
        elif any(bool(((own[e] != 0) & (theirs[e] != 0)).any()) for e in ends if e in own and e in theirs):
            raise VitxError(
                "attentions beside each other have some of their queries in common, not all, so their heads "
                "cannot be fused: take rollout with head_fusion='mean' and no discard_ratio"
            )
    return found


def _asking(tape: Tape, residual: Sum, attention: Attention, ends: list[Value]) -> dict[Value, Tensor]:
    """Returns where the queries of an attention come from, each marked with a number of its own."""
    weights = attention.weights
    generator = torch.Generator().manual_seed(0)
    marks = torch.rand(weights.shape[0], weights.shape[2], generator=generator, dtype=torch.float64) + 0.5
    starts = {attention.inputs[1]: attention.to_rows(marks.to(weights.device, weights.dtype))}
    return walk(tape, starts, through, ends=ends, steps=_steps(tape, residual, ends)).arrived


def _all_same(ends: list[Value], first: dict[Value, Tensor], second: dict[Value, Tensor]) -> bool:
    pairs = [(end, first.get(end), second.get(end)) for end in ends]
    return all((a is None) == (b is None) for _, a, b in pairs) and all(
        _same(end, a, b) for end, a, b in pairs if a is not None and b is not None
    )


def through(step: Step, arrived: list[Tensor]) -> Sent:
    """Sends relevance through a step for which no method has a rule of its own."""
    if isinstance(step, Attention):
        return [(step.inputs[0], step.shared(arrived[0]))]
    return [] if step.relevance is None else zip(step.inputs, step.relevance(arrived), strict=False)


def into_branches(residual: Sum, r: Tensor) -> dict[Value, Tensor]:
    """Gives all of a sum's relevance to its branches; where these are padding, to the stream."""
    parts = residual.parts()
    shares = residual.apportion(r, [parts.get(term, 0.0) for term in residual.inputs])
    pairs = zip(residual.inputs, shares, strict=True)
    return {term: residual.to_term(term, share) for term, share in pairs if share is not None}


def _marks(residual: Sum) -> Tensor:
    """Gives each token of a sum a number of its own, the same for all its channels."""
    found = residual.outputs[0]
    like = next(iter(residual.closes)).weights
    branch = residual.branches[0]  # which weights put out: its channels are known
    axes = branch.axes if branch.shape == found.shape else found.axes
    channels = [d for d, part in enumerate(axes) if part and all(f.channels for f in part)]
    shape = [1 if d in channels else n for d, n in enumerate(found.shape)]
    generator = torch.Generator().manual_seed(0)
    marks = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    return marks.to(like.device, like.dtype).expand(found.shape)


def _ends(tape: Tape, residual: Sum) -> list[Value]:
    """Returns where stream and branches part: the stream, or the values that it is a rearrangement of."""
    stream = residual.stream
    assert stream is not None
    if all(term.above >> stream.number & 1 for term in residual.branches):
        return [stream]
    return [value for value in tape.values if stream.roots >> value.number & 1]


def _steps(tape: Tape, residual: Sum, ends: list[Value]) -> range:
    first = min((end.made_by.index + 1 for end in ends if end.made_by is not None), default=0)
    return range(first, residual.index)

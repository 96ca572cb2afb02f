"""Products that are summed, however they are written: attention, scores, and values times constants."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.attention import Scores
from vitx.tape.call import Call, rule, unknown
from vitx.tape.contraction import Contraction, Given, Operand, of_matmul
from vitx.tape.expanded import fitted, over, reshaped, scaled
from vitx.tape.rules.attention import attended
from vitx.tape.rules.products import WEIGHING
from vitx.tape.rules.sums import total
from vitx.tape.values import Value

LINEAR_ATTENTION = "a product of three live values with no softmax between (linear attention)"
ADDING = ("addmm", "baddbmm", "addmv", "addbmm")
OPERANDS = {
    **{"mm": ("self", "mat2"), "bmm": ("self", "mat2"), "mv": ("self", "vec"), "dot": ("self", "tensor")},
    **{"addmm": ("mat1", "mat2"), "addmv": ("mat", "vec")},
    **{"baddbmm": ("batch1", "batch2"), "addbmm": ("batch1", "batch2")},
}


@rule(*OPERANDS)
def matmul(call: Call) -> list[Value]:
    """Follows a matrix product, and what is added to it."""
    first, second = OPERANDS[call.name]
    left, right = call[first], call[second]
    alpha, beta = (1 if call[name] is None else call[name] for name in ("alpha", "beta"))
    added: Tensor | None = call["self"] if call.name in ADDING and beta else None
    of_added = call.value(added)
    operands = (left, call.value(left)), (right, call.value(right))
    live = [value for _, value in operands if value is not None]
    if not live:
        assert of_added is not None
        assert added is not None
        rest = call.out - beta * added if call.tape.accounts else 0
        return [total(call, [(of_added, beta), (rest, 1)])]
    contraction = of_matmul(*operands, call.out.shape, over_batch=call.name == "addbmm")
    constant = [] if added is None or of_added is not None else [(added, beta)]
    if len(live) == 1 and of_added is None:
        return [with_constants(call, contraction, operands, alpha, constant)]
    product = (
        torch.ops.aten.mv if right.ndim == 1 else torch.ops.aten.bmm if right.ndim == 3 else torch.ops.aten.mm
    )
    part = call if added is None else call.inner(product.default, left, right)
    found = contracted(part, contraction, operands)
    if added is None:
        return [found]
    return [total(call, [(added, beta), (found, alpha)])]


def contracted(call: Call, contraction: Contraction, pair: Sequence[Given], factor: float = 1.0) -> Value:
    """Follows a product that is summed, times a factor."""
    left, right = contraction.left, contraction.right
    if left.value is None or right.value is None:
        return with_constants(call, contraction, pair, factor)
    kinds = left.value.kind, right.value.kind
    weighing = [kind in WEIGHING for kind in kinds]
    if all(weighing):
        found = call.make(call.values, None)
        found.kind = "weights"
        return found
    if "scores" in kinds:
        return call.make(call.values, None, name=LINEAR_ATTENTION)
    if any(weighing):
        return attended(call, contraction, pair, factor, weights_first=weighing[0])
    return _scores(call, contraction, pair, factor)


def _scores(call: Call, contraction: Contraction, pair: Sequence[Given], factor: float) -> Value:
    """Follows q k^T: relevance is the query's, which is of the same tokens as the rows that have it."""
    operands = [contraction.left, contraction.right]
    values = [operand.value for operand in operands if operand.value is not None]
    others = [call.tape.keeper.keep(tensor) for tensor, _ in pair] if call.linearised else []

    def relevance(arrived: list[Tensor]) -> list[Tensor | None]:
        r = reshaped(arrived[0], contraction.aligned_out)
        own = [contraction.own(operand) for operand in operands]
        asking = next((n for n, dims in enumerate(own) if not any(_differs(r, d) for d in own[1 - n])), 0)
        share: list[Tensor | None] = [None, None]
        share[asking] = _evenly(r, operands[asking], contraction.summed)
        return share

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0].reshape(contraction.aligned_out) * (factor / 2)
        aligned = [other.tensor.reshape(o.shape) for other, o in zip(others, operands, strict=True)]
        return [_transposed(g, aligned[1 - n], operand) for n, operand in enumerate(operands)]

    found = call.make(values, relevance, gradient, kind=Scores)
    found.kind = "scores"
    return found


def _differs(r: Tensor, dim: int) -> bool:
    if r.shape[dim] == 1 or r.stride(dim) == 0:
        return False
    return not torch.allclose(r, r.narrow(dim, 0, 1), rtol=1e-4, atol=1e-12)


def _evenly(r: Tensor, operand: Operand, dims: Sequence[int]) -> Tensor:
    """Shares out what an output has evenly among what was summed for it, in the shape of an operand."""
    count = math.prod(operand.shape[dim] for dim in dims)
    share = scaled(fitted(r, [1 if d in dims else n for d, n in enumerate(operand.shape)]), 1 / count)
    return reshaped(share.expand(operand.shape), operand.size)


def _transposed(g: Tensor, other: Tensor, operand: Operand) -> Tensor:
    """Multiplies by the other operand, and sums over what this one lacks; both are aligned."""
    dims = list(range(g.ndim))
    kept = [dim for dim in dims if operand.shape[dim] > 1]
    found: Tensor = torch.einsum(g, dims, other.to(g.dtype), dims, kept)
    return found.reshape(operand.size)


def with_constants(
    call: Call,
    contraction: Contraction,
    pair: Sequence[Given],
    factor: float = 1.0,
    added: Sequence[tuple[Tensor, Any]] = (),
) -> Value:
    """Follows a live value times constants: evenly where these were learned, else in proportion to them.

    A constant may be added to the product, with a factor of its own.
    """
    on_left = contraction.left.value is not None
    live, constant = contraction.left, contraction.right
    if not on_left:
        live, constant = constant, live
    value, tape, tensor = live.value, call.tape, pair[on_left][0]
    assert value is not None
    fixed = call.tensors.is_fixed(tensor)
    if fixed and any(value.stacks(p) for p, dim in enumerate(live.places) if dim in contraction.summed):
        return unknown(call)[0]  # it may add up a residual
    matrix = call.learned(tensor)
    assert matrix is not None
    matrix = matrix.detach()
    weight = constant.aligned(matrix)
    own = [tape.constant(c * beta) for c, beta in added] if tape.accounts else []
    blind = [tape.constant(None)] if fixed else []  # what has no weight at all

    def whole(like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns how much each element counts, and how much of an output all of them."""
        size = weight.to(like).abs()
        if value.mass is not None:
            size = size * value.mass().to(like).expand(value.shape).reshape(live.shape)
        return size, size.sum(contraction.summed, keepdim=True)

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        r = reshaped(arrived[0], contraction.aligned_out)
        if not fixed:
            return [_evenly(r, live, contraction.summed)]
        size, total = whole(r)
        share = torch.where(total > 0, over(r, total), 0)
        return [_transposed(share, size, live), (r * (total == 0)).sum()]

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0]
        if contraction.of_matrices:  # which is faster
            across = matrix.mT.to(g.dtype)
            found = g @ across if on_left else across @ g
        else:
            found = _transposed(g.reshape(contraction.aligned_out), weight, live)
        return [found if factor == 1 else found * factor, *(fitted(arrived[0], o.shape) for o in own)]

    def axes(of: list[ax.Axes]) -> ax.Axes | None:
        inside = dict(zip(live.places, of[0], strict=True))
        sizes = contraction.aligned_out
        dims = [inside.get(d) or ax.dimension(sizes[d], not fixed) for d in contraction.kept]
        return tuple(dims) if len(dims) == len(contraction.out) else None

    found = call.make([value, *blind], relevance, gradient, sources=[value, *own], axes=axes)
    if fixed:
        like = torch.zeros((), dtype=call.out.dtype, device=call.out.device)
        found.mass = lambda: whole(like)[1].expand(contraction.aligned_out).reshape(contraction.out)
    else:
        found.fan = math.prod(live.shape[d] for d in contraction.summed), value.roots
        found.place = value.place
    if value.kind in ("scores", "weights"):
        _mix_heads(found, value, contraction, live, fixed)
    return found


def _mix_heads(found: Value, value: Value, contraction: Contraction, live: Operand, fixed: bool) -> None:
    """Says that weights over any dimension but that of the softmax leave scores and A what they are."""
    over = dict(zip(live.places, value.over or (), strict=False))
    apart = value.over is not None and not any(
        f.channels for d in contraction.summed for f in over.get(d, ())
    )
    if value.kind == "scores" or fixed or apart:
        found.kind, found.rounded = value.kind, True
        if apart and len(contraction.kept) == len(found.shape):
            sizes = contraction.aligned_out
            found.over = tuple(over.get(d) or ax.dimension(sizes[d], False) for d in contraction.kept)

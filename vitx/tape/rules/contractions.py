"""Products that are summed, however they are written: attention, scores, and values times constants.

Weights are computed from scores. Some scores are read directly: the masks of mask queries are scores of
queries and pixels, and a semantic segmentation is the mean of these masks, weighted by their classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.attention import Mixture, Scores
from vitx.tape.call import Call
from vitx.tape.contraction import Contraction, Given, Operand, across, of_matmul, of_sum, transposed
from vitx.tape.expanded import ratio, reshaped, scaled, shared, spread
from vitx.tape.registry import rule, unknown
from vitx.tape.rules.attention import attended, attends
from vitx.tape.rules.products import WEIGHING
from vitx.tape.rules.sums import total
from vitx.tape.rules.views import divided
from vitx.tape.terms import stream_of
from vitx.tape.values import Value, followed

LINEAR_ATTENTION = "a product of three live values with no softmax between (linear attention)"
OPERANDS = {
    **{"mm": ("self", "mat2"), "bmm": ("self", "mat2"), "mv": ("self", "vec"), "dot": ("self", "tensor")},
    **{"addmm": ("mat1", "mat2"), "addbmm": ("batch1", "batch2")},
}
_PRODUCTS = {1: torch.ops.aten.mv.default, 2: torch.ops.aten.mm.default, 3: torch.ops.aten.bmm.default}
MATRICES = ("mm", "bmm", "addmm", "addbmm", "linear")  # for these, matrix products are faster than einsum


@rule(*OPERANDS)
def matmul(call: Call) -> list[Value]:
    """Record a matrix product, and what is added to it."""
    left, right = (call[name] for name in OPERANDS[call.name])
    values = call.value(left), call.value(right)
    contraction = of_matmul((left, values[0]), (right, values[1]), over_batch=call.name == "addbmm")
    added, beta, alpha = call["self"], call["beta"], call["alpha"]
    if beta is None:
        return [contracted(call, contraction)]
    if call.value(added) is None and not call.tape.accounts and None in values:
        return [weighed(call, contraction, alpha)]  # most often a linear layer
    if any(values):
        product: Any = contracted(call.inner(_PRODUCTS[right.ndim], left, right), contraction)
    else:
        product, alpha = call.out - beta * added, 1
    return [total(call, [(added, beta)] * (beta != 0) + [(product, alpha)])]


def contracted(call: Call, contraction: Contraction, factor: float = 1.0) -> Value:
    """Record a product that is summed, times a factor."""
    left, right, _ = contraction
    if left.value is None or right.value is None:
        return weighed(call, contraction, factor)
    kinds = left.value.kind, right.value.kind
    first, second = (kind in WEIGHING for kind in kinds)
    if "scores" in kinds:
        return call.make(call.values, None, name=LINEAR_ATTENTION)
    if first != second:
        return attended(call, contraction, *((left, right) if first else (right, left)), factor)
    return paired(call, contraction, factor, weighing=first)


def weighed(call: Call, contraction: Contraction, factor: float = 1.0) -> Value:
    """Record a live value times constants: learned ones share relevance evenly, others by their size."""
    parts = [(replace(call, live=one.live), one) for one in contraction.apart()]
    (constant,) = (one.tensor for one in contraction[:2] if one.value is None)
    if parts and call.tensors.origin(constant) == "fixed":
        return unknown(call)[0]  # it may be the sum of a residual
    if parts:
        return total(call, [(_weighed(inner, one, factor), 1) for inner, one in parts])
    ((_, value),) = contraction.live
    width = call.tape.unlike.get(value.rearranges)
    if width in [contraction.left.shape[dim] for dim in contraction.summed]:
        return unknown(call)[0]  # joined channels that are unlike, in another order
    return _weighed(call, contraction, factor)


def _weighed(call: Call, contraction: Contraction, factor: float) -> Value:
    live, constant, dims = contraction
    on_left = live.value is not None
    if not on_left:
        live, constant = constant, live
    value, out, shape, size = live.value, contraction.out, live.shape, live.tensor.shape
    assert value is not None
    widens = any(own > 1 == size for own, size in zip(constant.shape, shape, strict=True))
    fixed = call.weighs(
        constant.tensor,
        lambda: ax.reshaped(value.axes, shape) or ax.tokens(shape),
        dims,
        contracts=True,
        widens=widens,
    )
    stacked, normalized = (ax.reshaped(axes or (), shape) or () for axes in (value.along, value.softmax_over))
    parts = value.parts if {*ax.channel_dims(stacked)} & {*dims} else None
    if parts and stream_of(parts) and all(part.shape == call.out.shape for part in parts):
        return total(call, [*zip(parts, (constant.tensor.detach() * factor).flatten(), strict=True)])
    if parts and (stream_of(parts) or (fixed and any(part.open for part in parts))):
        return unknown(call)[0]  # it may be the sum of a residual
    over = {*ax.channel_dims(normalized, some=True)}
    if not fixed and attends(call, value) and (not over or over & {*dims}):
        return unknown(call)[0]  # keys with constant values
    matrix = call.kept(constant.tensor) if fixed else call.learned(constant.tensor)
    aligned, matrices = constant.shape, call.name in MATRICES
    evenly = not fixed and value.mass is None
    without_weight = [] if evenly else [call.tape.constant(None)]

    def whole(like: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much each element counts, and how much all elements of an output count together."""
        each = like.new_ones((1,) * len(shape))
        if fixed:
            each = matrix.tensor.reshape(aligned).to(like).abs()
        if value.mass is not None:
            each = each * value.mass().to(like).expand(size).reshape(shape)
        counted = [shape[dim] if dim in dims else n for dim, n in enumerate(each.shape)]
        return each, each.expand(counted).sum(dims, keepdim=True)

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        r = reshaped(arrived[0], out)
        if evenly:
            return [reshaped(spread(r, shape, dims), size)]
        each, total = whole(r)
        share, rest = shared(r, total)
        return [transposed(share, each, shape, size), rest]

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0] if factor == 1 else arrived[0] * factor
        if matrices:
            other = matrix.tensor.mT
            return [(across(g, other) if on_left else other.to(g.dtype) @ g).reshape(size)]
        return [transposed(g.reshape(out), matrix.tensor.reshape(aligned), shape, size)]

    def through(axes: ax.Axes, channels: bool) -> ax.Axes | None:
        """Return the axes of the output: new dimensions count channels, or else tokens."""
        inside = enumerate(ax.reshaped(axes, shape) or ())
        parts = (() if d in dims else part or ax.dimension(out[d], channels) for d, part in inside)
        return ax.reshaped(tuple(parts), after)

    after, inputs = call.out.shape, [value, *without_weight]
    axes: Any = lambda of: through(of[0], not fixed)  # noqa: E731
    found = call.make(inputs, relevance, gradient, sources=[value], axes=axes, exact=True)
    if fixed:
        like = torch.zeros((), dtype=call.out.dtype, device=call.out.device)
        found.mass = lambda: whole(like)[1].expand(out).reshape(after)
    else:
        found.fan, found.tokens = (math.prod(shape[dim] for dim in dims), value.rearranges), value.tokens
    if value.kind in ("scores", "weights"):  # a sum over any dimension but that of the softmax mixes heads
        apart = value.softmax_over is not None and not over & {*dims}
        if value.kind == "scores" or fixed or apart:
            found.kind = value.kind
            found.softmax_over = through(value.softmax_over, False) if apart and value.softmax_over else None
    elif value.kind == "exp" and fixed and not widens:
        found.kind = "size"
    return found


@rule("sum", "mean")
def summed(call: Call) -> list[Value]:
    """Record a sum over dimensions: of a product, of a stack, or of anything else."""
    tensor, value, keepdim = call["self"], call.values[0], bool(call["keepdim"])
    dims = ax.dimensions(call["dim"], tensor.ndim)
    factor = 1 / math.prod(tensor.shape[dim] for dim in dims) if call.name == "mean" else 1.0
    if len(dims) == 1 and value.stacks(dims[0]):
        return [_of_stack(call, dims[0], factor)]
    factors = call.factors_of(tensor)
    if factors is not None and not _is_elementwise(factors, dims):
        return [contracted(call, of_sum(factors, tensor.ndim, dims), factor)]
    before, mass = value.shape, value.mass
    kept = [1 if dim in dims else size for dim, size in enumerate(before)]

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        r = reshaped(arrived[0], kept)
        if mass is None:
            return [spread(r, before, dims)]
        each = mass().to(r).expand(before)
        return [r * ratio(each, each.sum(dims, keepdim=True))]

    def axes(of: list[ax.Axes]) -> ax.Axes:
        parts = enumerate(of[0])
        return tuple(() if dim in dims else part for dim, part in parts if keepdim or dim not in dims)

    found = call.make(
        [value],
        relevance,
        lambda g: [scaled(reshaped(g[0], kept), factor).expand(before)],
        axes=axes,
    )
    if mass is not None:
        found.mass = lambda: mass().expand(before).sum(dims, keepdim=keepdim)
    else:
        found.reads = value.reads
        found.adds = value.adds * abs(value.times) * factor * math.prod(before[dim] for dim in dims)
    if value.kind == "exp":
        found.kind = "size"
    if value.kind in ("scores", "weights"):
        found.kind, found.softmax_over = value.kind, followed(found, value.softmax_over)
    return [found]


def _is_elementwise(factors: Sequence[Given], dims: Sequence[int]) -> bool:
    """Return whether a product compares no tokens: an activation, or a gate outside of the sum."""
    (first, one), (second, other) = factors
    if one is None or other is None or {one.kind, other.kind} != {None}:
        return False
    if first.shape == second.shape:
        return True
    return first.ndim == second.ndim and any(all(f.shape[dim] == 1 for dim in dims) for f in (first, second))


def _of_stack(call: Call, dim: int, factor: float) -> Value:
    """Record the sum of a stack as a sum of its parts."""
    tensor, aten = call["self"], torch.ops.aten
    function, given = (aten.split.Tensor, (1, dim)) if call["keepdim"] else (aten.unbind.int, (dim,))
    parts = call.inner(function, tensor, *given)
    parts.outs = function(tensor.detach(), *given)
    return total(call, [(part, factor) for part in divided(parts)])


def paired(call: Call, contraction: Contraction, factor: float, *, weighing: bool) -> Value:
    """Record q k^T, which is to become weights, or weights times weights; each operand gets half.

    Between weights, each half is divided among the elements in proportion to their absolute products.
    """
    operands, dims, out = contraction[:2], contraction.summed, contraction.out
    values = [one.value for one in operands if one.value is not None]
    shapes, sizes = [one.shape for one in operands], [one.tensor.shape for one in operands]
    kept = [call.tape.keeper.keep(one.tensor) for one in operands] if weighing or call.linearized else []

    def aligned(like: Tensor) -> list[Tensor]:
        return [one.tensor.reshape(shape).to(like) for one, shape in zip(kept, shapes, strict=True)]

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        half = scaled(reshaped(arrived[0], out), 0.5)
        if not weighing:
            pairs = zip(shapes, sizes, strict=True)
            return [reshaped(spread(half, shape, dims), size) for shape, size in pairs]
        each, every = [one.abs() for one in aligned(half)], list(range(len(out)))
        whole = torch.einsum(each[0], every, each[1], every, [dim for dim in every if dim not in dims])
        share = ratio(half, whole.reshape(out))
        parts = zip(each, each[::-1], shapes, sizes, strict=True)
        return [transposed(share, other, shape, n) * own.reshape(n) for own, other, shape, n in parts]

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0].reshape(out) * (factor / 2)
        return [transposed(g, *each) for each in zip(aligned(g)[::-1], shapes, sizes, strict=True)]

    def channels(of: Callable[[Value], ax.Axes | None]) -> list[set[int]]:
        pairs = zip(values, shapes, strict=True)
        return [{*ax.channel_dims(ax.reshaped(of(value) or (), shape) or ())} for value, shape in pairs]

    def axes_of_scores(of: list[ax.Axes]) -> ax.Axes | None:
        """Return the axes of the output: those of the operand that has a dimension, or of the first one."""
        first, second = (
            ax.reshaped(one, shape) or ax.tokens(shape) for one, shape in zip(of, shapes, strict=True)
        )
        parts = (() if d in dims else first[d] or second[d] for d in range(len(out)))
        return ax.reshaped(tuple(parts), after)

    after = call.out.shape
    kind: Any = partial(
        Scores, contracts_channels=lambda: all({*dims} <= one for one in channels(lambda value: value.axes))
    )
    if weighing and any({*dims} & one for one in channels(lambda value: value.softmax_over)):
        found = call.make(values, None)  # one of them may attend to the other
    else:
        axes = None if weighing else axes_of_scores
        found = call.make(values, relevance, gradient, kind=Mixture if weighing else kind, axes=axes)
    found.kind = "weights" if weighing else "scores" if _compares(operands, dims) else None
    return found


def _compares(operands: Sequence[Operand], dims: Sequence[int]) -> bool:
    """Return whether a product of two values compares tokens: it adds some up, or only one value has them."""
    axes = [ax.reshaped(one.value.axes, one.shape) if one.value else None for one in operands]
    for dim, sizes in enumerate(zip(*(one.shape for one in operands), strict=True)):
        mixed = dim in dims or min(sizes) == 1 < max(sizes)
        parts = [own[dim] for own, size in zip(axes, sizes, strict=True) if own and size > 1]
        if mixed and not all(factor.channels for part in parts for factor in part):
            return True
    return not all(axes)

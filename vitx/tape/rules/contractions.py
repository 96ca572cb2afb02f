"""Products that are summed, however they are written: attention, scores, and values times constants."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.call import Call, rule, unknown
from vitx.tape.contraction import Contraction, of_matmul, of_sum, transposed
from vitx.tape.expanded import fitted, over, reshaped, scaled, spread
from vitx.tape.rules.attention import attended
from vitx.tape.rules.products import WEIGHING
from vitx.tape.rules.scores import mixed, scores
from vitx.tape.rules.sums import total
from vitx.tape.rules.views import divided
from vitx.tape.values import Value, followed

LINEAR_ATTENTION = "a product of three live values with no softmax between (linear attention)"
OPERANDS = {
    **{"mm": ("self", "mat2"), "bmm": ("self", "mat2"), "mv": ("self", "vec"), "dot": ("self", "tensor")},
    **{"addmm": ("mat1", "mat2"), "addmv": ("mat", "vec")},
    **{"baddbmm": ("batch1", "batch2"), "addbmm": ("batch1", "batch2")},
}
MATRICES = ("mm", "bmm", "addmm", "baddbmm")  # which are faster than what is summed anyhow


@rule(*OPERANDS)
def matmul(call: Call) -> list[Value]:
    """Follows a matrix product, and what is added to it."""
    left, right = (call[name] for name in OPERANDS[call.name])
    operands = (left, call.value(left)), (right, call.value(right))
    contraction = of_matmul(*operands, over_batch=call.name == "addbmm")
    if not call.name.startswith(("add", "badd")):
        return [contracted(call, contraction)]
    alpha, beta = (1 if call[name] is None else call[name] for name in ("alpha", "beta"))
    added = (call["self"], beta)
    of_added = call.value(call["self"]) if beta else None
    live = [value for _, value in operands if value is not None]
    if len(live) == 1 and of_added is None:
        return [weighed(call, contraction, alpha, [added] if beta else [])]
    if not live:
        assert of_added is not None
        rest = call.out - beta * call["self"] if call.tape.accounts else 0
        return [total(call, [added, (rest, 1)])]
    aten = torch.ops.aten
    product = aten.mv if right.ndim == 1 else aten.bmm if right.ndim == 3 else aten.mm
    found = contracted(call.inner(product.default, left, right), contraction)
    return [total(call, [added, (found, alpha)] if beta else [(found, alpha)])]


def contracted(call: Call, contraction: Contraction, factor: float = 1.0) -> Value:
    """Follows a product that is summed, times a factor."""
    left, right, _ = contraction
    if left.value is None or right.value is None:
        return weighed(call, contraction, factor)
    weighing = [operand.value.kind in WEIGHING for operand in (left, right) if operand.value]
    if all(weighing):
        return mixed(call, contraction, factor)
    if "scores" in (left.value.kind, right.value.kind):
        return call.make(call.values, None, name=LINEAR_ATTENTION)
    if any(weighing):
        return attended(call, contraction, *((left, right) if weighing[0] else (right, left)), factor)
    return scores(call, contraction, [left.value, right.value], factor)


def weighed(
    call: Call, contraction: Contraction, factor: float = 1.0, added: Sequence[tuple[Tensor, Any]] = ()
) -> Value:
    """Follows a live value times constants: evenly where these were learned, else in proportion to them.

    Constants may be added to the product, with factors of their own.
    """
    live, constant, dims = contraction
    on_left = live.value is not None
    if not on_left:
        live, constant = constant, live
    value, tape, out = live.value, call.tape, contraction.out
    assert value is not None
    shape, size = live.shape, live.tensor.shape
    fixed = call.tensors.is_fixed(constant.tensor)
    stacked, normalized = (ax.reshaped(axes or (), shape) or () for axes in (value.along, value.over))
    if fixed and value.parts is not None and {*ax.channel_dims(stacked)} & {*dims}:
        return unknown(call)[0]  # it may add up a residual
    matrix = call.learned(constant.tensor)
    assert matrix is not None
    matrix = matrix.detach()
    weight, matrices = matrix.reshape(constant.shape), call.name in MATRICES
    own = [tape.constant(one * beta) for one, beta in added] if tape.accounts else []
    blind = [tape.constant(None)] if fixed else []  # what has no weight at all

    def whole(like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns how much each element counts, and how much of an output all of them."""
        each = weight.to(like).abs()
        if value.mass is not None:
            each = each * value.mass().to(like).expand(size).reshape(shape)
        counted = [shape[dim] if dim in dims else n for dim, n in enumerate(each.shape)]
        return each, each.expand(counted).sum(dims, keepdim=True)

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        r = reshaped(arrived[0], out)
        if not fixed:
            return [reshaped(spread(r, shape, dims), size)]
        each, total = whole(r)
        share = torch.where(total > 0, over(r, total), 0)
        return [transposed(share, each, shape, size), (r * (total == 0)).sum()]

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0]
        if matrices:
            across = matrix.mT.to(g.dtype)
            found = g @ across if on_left else across @ g
        else:
            found = transposed(g.reshape(out), weight, shape, size)
        return [found if factor == 1 else found * factor, *(fitted(g, one.shape) for one in own)]

    found = call.make(
        [value, *blind],
        relevance,
        gradient,
        sources=[value, *own],
        axes=lambda of: through(of[0], not fixed),
    )
    after = found.shape

    def through(axes: ax.Axes, channels: bool) -> ax.Axes | None:
        """Returns the axes of what comes out: new dimensions count channels, or tokens."""
        inside = enumerate(ax.reshaped(axes, shape) or ())
        parts = (() if d in dims else part or ax.dimension(out[d], channels) for d, part in inside)
        return ax.reshaped(tuple(parts), after)

    if fixed:
        like = torch.zeros((), dtype=call.out.dtype, device=call.out.device)
        found.mass = lambda: whole(like)[1].expand(out).reshape(after)
    else:
        found.fan, found.place = (math.prod(shape[dim] for dim in dims), value.roots), value.place
    if value.kind in ("scores", "weights"):  # weights over any dimension but that of the softmax mix heads
        apart = value.over is not None and not {*ax.channel_dims(normalized, some=True)} & {*dims}
        if value.kind == "scores" or fixed or apart:
            found.kind, found.rounded = value.kind, True
            found.over = through(value.over, False) if apart and value.over else None
    return found


@rule("quantized::linear_dynamic", "quantized::linear_dynamic_fp16", "quantized::linear_relu_dynamic")
def quantized(call: Call) -> list[Value]:
    """Follows a linear layer whose weights are whole numbers; what rounding adds is a constant."""
    x, of_x = call.live[0]
    half = "fp16" in call.name
    unpack: Any = torch.ops.quantized.linear_unpack_fp16 if half else torch.ops.quantized.linear_unpack
    weight = unpack(call["W_prepack"])[0]
    weight = (weight.dequantize() if weight.is_quantized else weight.float()).mT
    added = [(call.out - x @ weight, 1)] if call.tape.accounts else []
    wide = weight.view(*[1] * (x.ndim - 2), *weight.shape)
    return [weighed(call, of_matmul((x, of_x), (wide, None)), added=added)]


@rule("sum", "mean")
def summed(call: Call) -> list[Value]:
    """Follows a sum over dimensions: of a product, of a stack, or of anything else."""
    tensor, value, keepdim = call["self"], call.values[0], bool(call["keepdim"])
    dims = ax.dimensions(call["dim"], tensor.ndim)
    factor = 1 / math.prod(tensor.shape[dim] for dim in dims) if call.name == "mean" else 1.0
    if len(dims) == 1 and value.stacks(dims[0]):
        return [_of_stack(call, dims[0], factor)]
    factors = call.factors_of(tensor)
    if factors is not None:
        return [contracted(call, of_sum(factors, tensor.ndim, dims), factor)]
    before, mass = value.shape, value.mass
    kept = [1 if dim in dims else size for dim, size in enumerate(before)]

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        r = reshaped(arrived[0], kept)
        if mass is None:
            return [spread(r, before, dims)]
        each = mass().to(r).expand(before)
        return [r * over(each, each.sum(dims, keepdim=True))]

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
    if value.kind == "exp":
        found.total = value
    if value.kind in ("scores", "weights"):
        assert found.made_by is not None
        found.kind, found.over = value.kind, followed(found.made_by, value.over)
    return [found]


def _of_stack(call: Call, dim: int, factor: float) -> Value:
    """Follows the sum of a stack: a sum of its parts."""
    tensor, aten = call["self"], torch.ops.aten
    function, given = (aten.split.Tensor, (1, dim)) if call["keepdim"] else (aten.unbind.int, (dim,))
    parts = call.inner(function, tensor, *given)
    parts.outs = function(tensor.detach(), *given)
    return total(call, [(part, factor) for part in divided(parts)])

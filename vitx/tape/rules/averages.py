"""Sums of elements in fixed proportions: each one has an even share, or one in proportion to its weight."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.call import Call
from vitx.tape.contraction import of_sum
from vitx.tape.expanded import reshaped, scaled
from vitx.tape.registry import rule, unknown
from vitx.tape.rules.products import contracted
from vitx.tape.rules.shapes import AxesOf, stacked, taken_apart
from vitx.tape.rules.sums import total_of
from vitx.tape.values import Step, Value, counting, followed
from vitx.tape.vjp import Transpose


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "col2im")
@rule("adaptive_avg_pool1d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "cumsum")
@rule("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_bicubic2d", "index_add", "scatter_add")
@rule("scatter_reduce", "index_reduce", "segment_reduce", "trace", "grid_sampler_2d", "grid_sampler_3d")
@rule("_upsample_lanczos2d_aa", "mean_pool", "diff")
def averaged(call: Call) -> list[Value]:
    """Follows an operator that is linear, by its own backward pass: in proportion to what it adds up."""
    if call.name in ("scatter_reduce", "index_reduce") and call["reduce"] not in ("sum", "mean"):
        from vitx.tape.rules.shapes import picked

        return picked(call)
    if call.values[0].parts is not None and call.name == "cumsum":
        return unknown(call)  # it may add up a residual
    target = call["self"]
    source = next((call[name] for name in ("source", "src", "values") if call[name] is not None), None)
    if source is not None and call.value(target) is not None and call.value(source) is not None:
        placed = _placed(call, source)
        if placed is not None:
            return [total_of(call, [(call.values[0], 1), (placed, 1)])]
    tensors, shapes = [t for t, _ in call.live], [value.shape for value in call.values]
    transpose = Transpose(call, tensors, [None] * len(tensors))
    own = call.tape.constant(transpose.at_0(tensors) if call.tape.accounts and call.constants() else None)
    reals = [value.real for value in call.values]

    def relevance(arrived: list[Tensor]) -> list[Tensor | None]:
        r = arrived[0].contiguous()
        inside = [
            r.new_ones(()).expand(s) if p is None else p.to(r).expand(s)
            for p, s in zip(reals, shapes, strict=True)
        ]
        whole = transpose.linear(inside)
        under = whole.abs() > 1e-6  # not so a window that sees nothing but padding
        shares = transpose([torch.where(under, r / torch.where(under, whole, 1), 0)])
        seen = [s if s is None or p is None else s * p.to(r) for s, p in zip(shares, reals, strict=True)]
        return [*seen, r.masked_fill(under, 0).sum()]

    def gradient(arrived: list[Tensor]) -> list[Tensor | None]:
        return [*transpose(arrived), arrived[0] if own.constant is not None else None]

    return [call.make([*call.values, own], relevance, gradient, axes=_axes(call))]


def _placed(call: Call, source: Tensor) -> Value | None:
    """Returns the value of what is added to places of another one; None where several meet at a place."""
    value = call.value(source)
    assert value is not None
    transpose = Transpose(call, [source], [None])
    counts = transpose.linear([torch.ones_like(source)])
    if (
        call["include_self"] is False
        or call["reduce"] == "mean"
        or bool((counts.abs() > 0).sum() != source.numel())
    ):
        return None
    found = call.tape.value(call.out.shape, [value])
    scale = torch.where(counts == 0, 1, counts)
    call.tape.append(Step("zeros", [value], [found], lambda r: transpose([r[0] / scale]), transpose))
    found.roots, found.real = value.roots, (counts != 0).to(source.dtype)
    return found


def _axes(call: Call) -> AxesOf | None:
    shape = tuple(call.out.shape)
    if len(shape) == len(call.values[0].shape):
        return lambda of: ax.resized(of[0], shape)
    return None


@rule("sum", "mean")
def summed(call: Call) -> list[Value]:
    """Follows a sum over dimensions: of a stack, of products, or of anything else, evenly."""
    tensor = call["self"]
    value, ndim = call.values[0], tensor.ndim
    given = call["dim"]
    dims = (
        list(range(ndim)) if given in (None, [], ()) else [given] if isinstance(given, int) else list(given)
    )
    dims = sorted(dim % ndim for dim in dims) if ndim else []
    count = math.prod(tensor.shape[dim] for dim in dims)
    mean = call.name == "mean"
    if value.parts is not None and dims == [counting(value.along, len(value.parts))]:
        return [_of_stack(call, value, dims[0], bool(call["keepdim"]), 1 / count if mean else 1.0)]
    factors = call.factors_of(tensor)
    if factors is not None:
        found = contracted(
            call, of_sum(factors, tensor.shape, dims, call.out.shape), 1 / count if mean else 1.0
        )
        if found is not None:
            return [found]
    keepdim = bool(call["keepdim"])
    return [_evenly(call, value, dims, keepdim, count, mean)]


def _evenly(call: Call, value: Value, dims: Sequence[int], keepdim: bool, count: int, mean: bool) -> Value:
    before, real, mass = value.shape, value.real, value.mass

    def spread(r: Tensor, share: float) -> Tensor:
        if not keepdim:
            for dim in dims:
                r = r.unsqueeze(dim)
        return scaled(r, share).expand(before)

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        if real is None and mass is None:
            return [spread(arrived[0], 1 / count)]
        inside = arrived[0].new_ones(()) if real is None else real.to(arrived[0])
        inside = (inside if mass is None else inside * mass().to(arrived[0])).expand(before)
        whole = inside.sum(list(dims), keepdim=True)
        return [spread(arrived[0], 1.0) * (inside / torch.where(whole == 0, 1, whole))]

    def axes(of: list[ax.Axes]) -> ax.Axes:
        kept = [part if dim not in dims else () for dim, part in enumerate(of[0])]
        return tuple(part for dim, part in enumerate(kept) if keepdim or dim not in dims)

    found = call.make(
        [value],
        relevance,
        lambda g: [spread(g[0], 1 / count if mean else 1.0)],
        axes=axes,
    )
    if mass is not None:
        found.mass = lambda: mass().expand(before).sum(list(dims), keepdim=keepdim)
    if value.kind == "exp":
        found.total = value, list(dims)
    if value.kind in ("scores", "weights"):
        found.kind = value.kind
        if value.dim is not None and found.made_by is not None:
            found.dim = followed(found.made_by, value.dim)
    return found


def _of_stack(call: Call, value: Value, dim: int, keepdim: bool, factor: float) -> Value:
    """A sum of what was stacked is a sum of its parts."""
    tape, parts = call.tape, []
    shape = [n for d, n in enumerate(value.shape) if d != dim]
    assert value.parts is not None
    selected: list[Value] = []
    for origin in value.parts:
        part = tape.value(shape, [origin])
        taken_apart(part, origin)
        selected.append(part)
        parts.append((part, factor))

    def back(arrived: list[Tensor]) -> list[Tensor]:
        return [stacked(arrived, dim)]

    tape.append(Step("unbind", [value], selected, back, back))
    found = total_of(call, parts)
    if keepdim:
        whole = tape.value(call.out.shape, [found])
        whole.roots, whole.open, whole.sum = found.roots, found.open, None
        inner = found.shape

        def view(arrived: list[Tensor]) -> list[Tensor]:
            return [reshaped(arrived[0], inner)]

        tape.append(Step("unsqueeze", [found], [whole], view, view))
        return whole
    return found

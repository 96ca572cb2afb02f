"""Other operators that move elements or add them up: their own backward passes show which."""

import math
from dataclasses import replace
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.call import Call, Transpose
from vitx.tape.contraction import Given, of_matmul
from vitx.tape.expanded import refilled, shared
from vitx.tape.registry import rule, unknown
from vitx.tape.rules.contractions import weighed
from vitx.tape.rules.elementwise import gated
from vitx.tape.rules.sums import total
from vitx.tape.rules.views import same
from vitx.tape.sums import may_close
from vitx.tape.values import AxesOf, Value, followed

PADDED = ("reflection_pad", "replication_pad", "upsample_nearest", "_upsample_nearest_exact")
MOVING = """index gather index_select flip unfold diagonal as_strided repeat pixel_shuffle where take
pixel_unshuffle masked_select slice_scatter select_scatter diagonal_scatter as_strided_scatter index_put
scatter index_copy masked_scatter channel_shuffle rot90 repeat_interleave block_diag _index_put_impl
_unsafe_index _unsafe_index_put put select_backward _unsafe_masked_index""".split()  # noqa: SIM905
FILLING = ("tril", "triu", "masked_fill", "index_fill", "im2col", "scatter", "diag_embed", "fill_diagonal")
ADDING = """avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d
upsample_linear1d upsample_bilinear2d upsample_trilinear3d _upsample_bilinear2d_aa cumsum col2im index_add
scatter_add scatter_reduce index_reduce segment_reduce trace""".split()  # noqa: SIM905
PICKING = """max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d
fractional_max_pool2d sort topk mode kthvalue median nanmedian maximum minimum fmax fmin cummax
cummin""".split()  # noqa: SIM905
EXTREMES = ("amax", "amin", "max", "min", "aminmax")
_NONE = 1e-6  # a smaller part of a window counts as none


@rule(*MOVING, *FILLING, "constant_pad_nd", *(f"{name}{n}d" for name in PADDED for n in (1, 2, 3)))
def moved(call: Call) -> list[Value]:
    """Record a rearrangement: each element of the output is an element of an input, or a constant."""
    if call["accumulate"]:
        return added_up(call)
    first = call.values[0]
    if call.name == "constant_pad_nd" and not any(call["pad"]):
        return same(call)
    if len(call.live) == 1 and first.shape == call.out.shape:
        weighing, masks = first.kind in ("scores", "exp", "weights"), call.mask_sources()
        if weighing or any((one.base, one.shape) == (first.base, first.shape) for one in masks):
            return [_chosen(call, first, weighing)]
    fills = call.name in (*FILLING, "constant_pad_nd") or bool(call.constants())
    found = _linear(call, moves=True, fills=fills)
    assert found.made_by is not None
    found.made_by.chooses = bool(call.mask_sources())
    return [found]


def _chosen(call: Call, value: Value, weighing: bool) -> Value:
    """Record elements that stay in place or are overwritten: masked scores, or values chosen by themselves.

    Masked scores still belong to the query. A choice by the values themselves is a function of them, such as
    where(x > 0, x, 0).
    """
    tensor = call.live[0][0]
    transpose = Transpose(call, [tensor], [None])
    own = [call.tape.constant(transpose.at_0([tensor]))] if call.tape.accounts and not weighing else []

    def gradient(arrived: list[Tensor]) -> list[Tensor | None]:
        return [*transpose(arrived), *(arrived[0] for _ in own)]

    found = call.make([value], lambda r: [r[0]], gradient, sources=[value, *own], axes=lambda of: of[0])
    found.kind = value.kind
    if value.kind == "scores" and _is_relu(call, tensor):
        found.kind = "weights"
    if not weighing:
        found.base, found.proportional, found.parts, found.along = value.base, False, value.parts, value.along
    return found


def _is_relu(call: Call, scores: Tensor) -> bool:
    """Return whether scores are set to 0 where they are negative."""
    return bool(call.mask_sources()) and bool(torch.equal(call.out.detach(), scores.detach().clamp(min=0)))


@rule(*ADDING)
def added_up(call: Call) -> list[Value]:
    """Record a linear operator: relevance goes in proportion to what it adds up."""
    if call.name in ("scatter_reduce", "index_reduce") and call["reduce"] not in ("sum", "mean"):
        return picked(call)
    value = call.values[0]
    if (call.name == "cumsum" and value.parts) or may_close(value, call.out.shape):
        return unknown(call)  # it may be the sum of a residual
    source = next((call[name] for name in ("source", "src", "values") if call[name] is not None), None)
    if source is not None and call.value(call["self"]) is not None and call.value(source) is not None:
        placed = _placed(call, source)
        if placed is not None:
            return [total(call, [(call.values[0], 1), (placed, 1)])]
    return [_linear(call, moves=False, fills=bool(call.constants()))]


@rule("upsample_bicubic2d", "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa")
def interpolated(call: Call) -> list[Value]:
    """Record an interpolation with weights of both signs, as products with these weights."""
    tensor, value = call.live[0]
    for dim, scale in ((2, call["scales_h"]), (3, call["scales_w"])):
        before, after = tensor.shape[dim], call.out.shape[dim]
        each = torch.eye(before, dtype=tensor.dtype, device=tensor.device)[None, None]
        matrix = call.overload.function(each, [before, after], call["align_corners"], None, scale)
        matrix = matrix.mT if dim == 2 else matrix
        call.tensors.of(matrix).origin = "fixed"
        given: list[Given] = [(tensor.detach(), value), (matrix, None)]
        given = given[::-1] if dim == 2 else given
        made = given[0][0] @ given[1][0]
        inner = replace(call, live=[(tensor, value)], outs=[made])
        tensor, value = made, weighed(inner, of_matmul(*given))
    return [value]


@rule("grid_sampler_2d", "grid_sampler_3d")
def sampled(call: Call) -> list[Value]:
    """Record a sampling at some places, regardless of where these places come from."""
    tensor, value = call["input"], call.value(call["input"])
    if value is None:
        return unknown(call)
    return [_linear(replace(call, live=[(tensor, value)]), moves=False, fills=False)]


def _linear(call: Call, *, moves: bool, fills: bool) -> Value:
    """Record a linear operator, which moves elements or adds some up, and may fill in constants."""
    tensors, values, tape = [t for t, _ in call.live], call.values, call.tape
    transpose = Transpose(call, tensors, [None] * len(tensors))
    own = tape.constant(transpose.at_0(tensors) if tape.accounts and fills else None, call.out.shape)
    masses = [value.mass for value in values]

    def inside(like: Tensor, *, alike: bool = False) -> list[Tensor]:
        """Return how much each element counts."""
        counts = [like.new_ones(()) if mass is None or alike else mass().to(like) for mass in masses]
        return [one.expand(value.shape).contiguous() for one, value in zip(counts, values, strict=True)]

    def relevance(arrived: list[Tensor]) -> list[Tensor | None]:
        if moves and not fills:
            return [*transpose(arrived), None]
        r = arrived[0].contiguous()
        counts = inside(r, alike=moves)
        if moves and (channels := ax.channel_dims(found.axes)):
            r = refilled(r, (transpose.linear(counts) != 0).to(r), channels)
        whole = transpose.linear(counts)  # 0 where a window sees only padding
        share, unseen = shared(r, whole, _NONE)
        pairs = zip(transpose([share]), counts, strict=True)
        return [*(None if part is None else part * count for part, count in pairs), unseen]

    def gradient(arrived: list[Tensor]) -> list[Tensor | None]:
        return [*transpose(arrived), arrived[0] if fills else None]

    axes = _axes_of(call)
    if moves:
        by_place: AxesOf = lambda of: ax.by_place(of[0], lambda marks: transpose.run([marks])[0])  # noqa: E731
        axes = (axes or by_place) if len(values) == 1 else None
    found, like = call.make([*values, own], relevance, gradient, axes=axes), call.out.new_zeros(())
    if not moves:
        if fills:
            found.mass = lambda: (transpose.run(inside(like, alike=True))[0] != 0).to(like)
        return found
    found.rearranges = reduce(or_, (value.rearranges for value in values))
    if len({value.kind for value in values}) == 1:
        found.kind = values[0].kind
    if len(values) == 1:
        found.softmax_over = followed(found, values[0].softmax_over)
    if found.kind is None and (fills or any(mass is not None for mass in masses)):

        def mass() -> Tensor:
            reached = transpose.linear(inside(like, alike=True)) != 0
            return torch.where(reached, transpose.run(inside(like))[0], transpose.at_0(tensors) != 0)

        found.mass = mass
    return found


def _placed(call: Call, source: Tensor) -> Value | None:
    """Return the value of what is added to places of another; None if several elements meet at a place."""
    alone = replace(call, live=[(source, value) for one, value in call.live if one is source])
    counts = Transpose(alone, [source], [None]).linear([torch.ones_like(source)]) != 0
    if call["include_self"] is False or call["reduce"] == "mean" or counts.sum() != source.numel():
        return None
    found = _linear(alone, moves=False, fills=False)
    found.rearranges, found.mass = alone.values[0].rearranges, lambda: counts.to(source.dtype)
    return found


def _axes_of(call: Call) -> AxesOf | None:
    shape, before = tuple(call.out.shape), call.values[0].shape
    if call.name == "im2col":
        size = math.prod(call["kernel_size"])
        inside = (*ax.dimension(before[1], True), *ax.dimension(size, False))
        return lambda of: (of[0][0], inside, *ax.tokens(shape[2:]))
    if len(shape) == len(before) and call.name not in ("as_strided", "gather"):
        return lambda of: ax.resized(of[0], shape)
    return None


@rule(*PICKING, *EXTREMES)
def picked(call: Call) -> list[Value]:
    """Record an operator that picks elements by their values, such as a maximum or a sort.

    A maximum over dimensions may also serve as a size.
    """
    if call.name in ("maximum", "minimum", "fmax", "fmin") and len(call.live) == 1:
        return gated(call)  # a clamp by a constant
    tensors = [t for t, _ in call.live]
    points = [t.detach().clone() if call.overload.written else t for t in tensors]
    transpose = Transpose(call, tensors, points)
    found = call.make(call.values, transpose, transpose, axes=_axes_of(call))
    kinds = {value.kind for value in call.values}
    found.kind = "size" if call.name in EXTREMES else kinds.pop() if len(kinds) == 1 else None
    return [found]

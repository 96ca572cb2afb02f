"""Whatever else moves elements or adds some up: the operator's own backward pass says which."""

import torch
from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.call import RULES, Call, Transpose, rule, unknown
from vitx.tape.rules.sums import total
from vitx.tape.rules.views import same
from vitx.tape.values import AxesOf, Step, Value, followed

FILLING = ("tril", "triu", "masked_fill", "index_fill", "im2col", "scatter", "diag_embed", "fill_diagonal")
_NONE = 1e-6  # how much of a window counts as none


@rule("index", "gather", "index_select", "roll", "flip", "unfold", "diagonal", "as_strided")
@rule("repeat", "pixel_shuffle", "pixel_unshuffle", "masked_select")
@rule("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter", "index_put", "scatter")
@rule("index_copy", "masked_scatter", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "take")
@rule("replication_pad1d", "replication_pad2d", "replication_pad3d", "channel_shuffle", "rot90", "where")
@rule("repeat_interleave", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
@rule("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "block_diag")
@rule("_index_put_impl", "_unsafe_index", "_unsafe_index_put", "put", "masked_fill", *FILLING)
@rule("select_backward", "_unsafe_masked_index")
def moved(call: Call) -> list[Value]:
    """Follows a rearrangement: each element of the output is an element of an input, or a constant."""
    if call["accumulate"]:
        return averaged(call)
    first = call.values[0]
    if first.kind in ("scores", "exp", "weights") and first.shape == call.out.shape and len(call.live) == 1:
        return [_masked(call, first)]
    if len(call.live) == 1 and any(a.base == first.base and a.shape == first.shape for a in call.answers()):
        return [_chosen(call, first)]
    fills = call.name in FILLING or call.name == "constant_pad_nd" or bool(call.constants())
    return [_linear(call, moves=True, fills=fills)]


@rule("constant_pad_nd")
def padded(call: Call) -> list[Value]:
    """Follows a padding with a number, which is the model's own."""
    return moved(call) if any(call["pad"]) else same(call)


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "col2im")
@rule("adaptive_avg_pool1d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "cumsum")
@rule("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_bicubic2d", "index_add", "scatter_add")
@rule("scatter_reduce", "index_reduce", "segment_reduce", "trace", "grid_sampler_2d", "grid_sampler_3d")
@rule("_upsample_lanczos2d_aa")
def averaged(call: Call) -> list[Value]:
    """Follows an operator that is linear: in proportion to what it adds up."""
    if call.name in ("scatter_reduce", "index_reduce") and call["reduce"] not in ("sum", "mean"):
        return RULES["max"](call)
    if call.values[0].parts is not None and call.name == "cumsum":
        return unknown(call)  # it may add up a residual
    source = next((call[name] for name in ("source", "src", "values") if call[name] is not None), None)
    if source is not None and call.value(call["self"]) is not None and call.value(source) is not None:
        placed = _placed(call, source)
        if placed is not None:
            return [total(call, [(call.values[0], 1), (placed, 1)])]
    return [_linear(call, moves=False, fills=bool(call.constants()))]


def _linear(call: Call, *, moves: bool, fills: bool) -> Value:
    """Follows what is linear: it moves elements or adds some up, and may fill in constants."""
    tensors, values, tape = [t for t, _ in call.live], call.values, call.tape
    transpose = Transpose(call, tensors, [None] * len(tensors))
    own = tape.constant(transpose.at_0(tensors) if tape.accounts and fills else None, call.out.shape)
    masses = [value.mass for value in values]

    def inside(like: Tensor) -> list[Tensor]:
        return [
            (like.new_ones(()) if mass is None else mass().to(like)).expand(value.shape)
            for mass, value in zip(masses, values, strict=True)
        ]

    def relevance(arrived: list[Tensor]) -> list[Tensor | None]:
        r = arrived[0].contiguous()
        if moves:
            rest = r.masked_fill(transpose.reached(r), 0).sum() if fills else None
            return [*transpose(arrived), rest]
        whole = transpose.linear(inside(r))
        under = whole.abs() > _NONE  # not so a window that sees nothing but padding
        shares = transpose([torch.where(under, r / torch.where(under, whole, 1), 0)])
        seen = [
            s if s is None or mass is None else s * part
            for s, part, mass in zip(shares, inside(r), masses, strict=True)
        ]
        return [*seen, r.masked_fill(under, 0).sum()]

    def gradient(arrived: list[Tensor]) -> list[Tensor | None]:
        return [*transpose(arrived), arrived[0] if fills else None]

    axes = _axes_of(call)
    if moves:
        by_place: AxesOf = lambda of: ax.by_place(of[0], lambda marks: transpose.run([marks])[0])  # noqa: E731
        axes = (axes or by_place) if len(values) == 1 else None
    found = call.make([*values, own], relevance, gradient, axes=axes)
    if not moves:
        return found
    found.roots = 0
    for value in values:
        found.roots |= value.roots
    if len({value.kind for value in values}) == 1:
        found.kind = values[0].kind
    if len(values) == 1 and found.made_by is not None:
        found.over = followed(found.made_by, values[0].over)
    if found.kind is None and (fills or any(mass is not None for mass in masses)):
        like = call.out.new_zeros(())

        def mass() -> Tensor:
            return torch.where(
                transpose.reached(like), transpose.run(inside(like))[0], transpose.at_0(tensors) != 0
            )

        found.mass = mass
    return found


def _masked(call: Call, value: Value) -> Value:
    """Follows scores of which some are overwritten: what is asked for stays a matter of the query."""
    transpose = Transpose(call, [call.live[0][0]], [None]) if call.linearised else None
    found = call.make([value], lambda r: [r[0]], transpose, axes=lambda of: of[0])
    found.kind = value.kind
    return found


def _chosen(call: Call, value: Value) -> Value:
    """Follows a function of a value that is written as a choice by that very value, as where(x > 0, x, 0)."""
    tensor = call.live[0][0]
    transpose = Transpose(call, [tensor], [None])
    own = [call.tape.constant(transpose.at_0([tensor]))] if call.tape.accounts else []

    def gradient(arrived: list[Tensor]) -> list[Tensor | None]:
        return [*transpose(arrived), *(arrived[0] for _ in own)]

    found = call.make([value], lambda r: [r[0]], gradient, sources=[value, *own], axes=lambda of: of[0])
    found.base, found.proportional = value.base, False
    return found


def _placed(call: Call, source: Tensor) -> Value | None:
    """Returns the value of what is added to places of another one; None where several meet at a place."""
    value = call.value(source)
    assert value is not None
    transpose = Transpose(call, [source], [None])
    counts = transpose.linear([torch.ones_like(source)])
    several = bool((counts.abs() > 0).sum() != source.numel())
    if call["include_self"] is False or call["reduce"] == "mean" or several:
        return None
    found = call.tape.value(call.out.shape, [value])
    scale = torch.where(counts == 0, 1, counts)
    call.tape.append(Step("zeros", [value], [found], lambda r: transpose([r[0] / scale]), transpose))
    found.roots, found.mass = value.roots, lambda: (counts != 0).to(source.dtype)
    return found


def _axes_of(call: Call) -> AxesOf | None:
    name, shape, before = call.name, tuple(call.out.shape), call.values[0].shape
    if name == "im2col":
        size = call["kernel_size"]
        inside = (*ax.dimension(before[1], True), *ax.dimension(size[0] * size[1], False))
        return lambda of: (of[0][0], inside, *ax.tokens(shape[2:]))
    if len(shape) == len(before) and name != "as_strided":
        return lambda of: ax.resized(of[0], shape)
    return None


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "sort", "topk", "mode")
@rule("adaptive_max_pool2d", "adaptive_max_pool3d", "fractional_max_pool2d")
@rule("kthvalue", "median", "nanmedian", "maximum", "minimum", "fmax", "fmin", "cummax", "cummin")
@rule("amax", "amin", "max", "min", "aminmax")
def picked(call: Call) -> list[Value]:
    """Follows what picks elements by their values, as a maximum or a sort does.

    A maximum over dimensions picks, or says how large something is.
    """
    if call.name in ("maximum", "minimum", "fmax", "fmin") and len(call.live) == 1:
        return RULES["clamp"](call)  # by a constant
    tensors = [t for t, _ in call.live]
    points = [t.detach().clone() if call.overload.written else t for t in tensors]
    transpose = Transpose(call, tensors, points)
    found = call.make(call.values, transpose, transpose, axes=_axes_of(call))
    found.kind = "size" if call.name in ("amax", "amin", "max", "min", "aminmax") else None
    return [found]

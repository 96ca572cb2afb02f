"""Rearrangements: each element of the output is an element of an input, or a constant."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.axes import Axes
from vitx.tape.call import Call
from vitx.tape.expanded import core, fitted, reshaped
from vitx.tape.registry import RULES, rule, unknown
from vitx.tape.values import LAID_OUT, Value, after, counting, followed, marked
from vitx.tape.vjp import Transpose

IDENTITIES = (  # which change no element, and none of their places
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy", "clone", "alias"),
    *("alias_copy", "detach", "detach_copy", "_to_copy", "contiguous", "lift_fresh", "lift", "positive"),
    *("lift_fresh_copy", "dropout", "feature_dropout", "expand", "slice", "copy"),
)
TURNED = (*LAID_OUT, "permute", "transpose", "t", "unsqueeze", "squeeze")
AxesOf = Callable[[list[Axes]], Axes | None]


def carried(call: Call, found: Value, value: Value, number: int = 0) -> Value:
    """Tells a rearranged value what is still true of it; it is one of several outputs, or the only one."""
    found.roots, found.kind, found.total, found.fan = value.roots, value.kind, value.total, value.fan
    found.proportional = value.proportional
    if found.shape == value.shape and call.name in IDENTITIES:
        found.base, found.sum, found.via, found.real = value.base, value.sum, value.via, value.real
        found.place = value.place
    else:
        operation = call.name, number, *map(str, call.args[1:]), str(call.kwargs)
        found.base = call.tape.base(found, value, operation)
        found.place = call.tape.place(found, value.place, *operation)
    found.rounded = value.rounded
    step = found.made_by
    if value.dim is not None and step is not None:
        found.dim = followed(step, value.dim)
    if value.along is not None and step is not None and step.axes is not None:
        found.parts, found.along = value.parts, step.axes([value.along])
    return found


def _moved(call: Call, back: Callable[[Tensor], Tensor], axes: AxesOf) -> list[Value]:
    """Follows an operator on the shape of one value."""
    value = call.values[0]

    def into(arrived: list[Tensor]) -> list[Tensor]:
        return [back(arrived[0])]

    found = carried(call, call.make([value], into, into, axes=axes, exact=True), value)
    if value.sum is not None and found.sum is None and call.name in TURNED:
        found.sum, found.via = value.sum, after(back, value.via)
    if value.mass is not None:
        move, mass, before = Transpose(call, [call.live[0][0]], [None]), value.mass, value.shape
        found.mass = lambda: move.run([mass().expand(before).contiguous()])[0]
    if value.real is not None and found.real is None and call.out.shape == found.shape:
        found.real = Transpose(call, [call.live[0][0]], [None]).run(
            [value.real.expand(value.shape).contiguous()]
        )[0]
    return [found]


@rule(
    "view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy", "unsqueeze", "squeeze"
)
@rule("unsqueeze_copy", "squeeze_copy", "flatten", "unflatten")
def laid_out(call: Call) -> list[Value]:
    """Follows a reshape."""
    if isinstance(call["dtype"], torch.dtype):
        return unknown(call)  # bits read as another type
    before, after = call.values[0].shape, tuple(call.out.shape)
    return _moved(call, lambda r: reshaped(r, before), lambda of: ax.reshaped(of[0], after))


@rule("clone", "alias", "alias_copy", "detach", "detach_copy", "_to_copy", "contiguous", "lift_fresh", "lift")
@rule("lift_fresh_copy", "positive", "dropout", "feature_dropout", "_conj", "resolve_conj", "resolve_neg")
def same(call: Call) -> list[Value]:
    """Follows a copy, or a change of type, but not to whole numbers."""
    if not call.out.is_floating_point():
        return unknown(call)
    (found,) = _moved(call, lambda r: r, lambda of: of[0])
    found.rounded = call.values[0].rounded or call.out.dtype != call.live[0][0].dtype
    return [found]


@rule("copy")
def copied(call: Call) -> list[Value]:
    """Follows what is written over a tensor."""
    source = call["src"]
    value, shape = call.value(source), tuple(call.out.shape)
    if value is None:
        return [call.tape.constant(source.expand(shape) if call.tape.accounts else None, shape)]
    before = value.shape

    def back(arrived: list[Tensor]) -> list[Tensor]:
        return [fitted(arrived[0], before)]

    found = call.make([value], back, back, axes=lambda of: ax.broadcast(of[0], shape))
    found.above, found.open = value.above | (1 << value.number), value.open
    return [carried(call, found, value)]


@rule("zero", "fill")
def filled(call: Call) -> list[Value]:
    """Follows what is overwritten by a number."""
    return [call.tape.constant(call.out.clone() if call.tape.accounts else None, call.out.shape)]


@rule("permute", "permute_copy", "transpose", "transpose_copy", "t", "t_copy", "numpy_T", "mT", "movedim")
def permuted(call: Call) -> list[Value]:
    """Follows dimensions in another order."""
    ndim = call.out.ndim
    order = list(range(ndim))
    if call["dims"] is not None:
        order = [dim % ndim for dim in call["dims"]]
    elif call["dim0"] is not None:
        first, second = call["dim0"] % ndim, call["dim1"] % ndim
        order[first], order[second] = second, first
    else:
        order.reverse()
    back = [order.index(dim) for dim in range(ndim)]
    return _moved(call, lambda r: r.permute(back), lambda of: tuple(of[0][dim] for dim in order))


@rule("expand", "expand_copy", "broadcast_to")
def expanded(call: Call) -> list[Value]:
    """Follows copies along some dimensions."""
    before, after = call.values[0].shape, tuple(call.out.shape)
    return _moved(call, lambda r: fitted(r, before), lambda of: ax.broadcast(of[0], after))


def _into(part: Tensor, shape: Sequence[int], pick: Callable[[Tensor], Tensor], dim: int) -> Tensor:
    """Lays a part into zeros, expanded where it is, but not along the dimension that is cut."""
    inner = core(part)
    apart = part.ndim == len(shape)
    if apart and inner.shape[dim] != part.shape[dim]:
        inner = inner.expand([n if d != dim else part.shape[dim] for d, n in enumerate(inner.shape)])
    sizes = list(inner.shape)
    if apart:
        sizes[dim] = shape[dim]
    else:
        sizes.insert(dim, shape[dim])
    whole = part.new_zeros(sizes)
    pick(whole).copy_(inner)
    return whole.expand(tuple(shape))


@rule("slice", "slice_copy", "narrow", "narrow_copy")
def sliced(call: Call) -> list[Value]:
    """Follows a part along one dimension."""
    before, after, dim = call.values[0].shape, call.out.shape, call["dim"] % call.out.ndim
    start, end, step = call["start"], call["end"], call["step"] or 1
    if before == after:
        return same(call)

    def pick(whole: Tensor) -> Tensor:
        part: Tensor = torch.ops.aten.slice(whole, dim, start, end, step)
        return part

    return _moved(call, lambda r: _into(r, before, pick, dim), lambda of: ax.resized(of[0], after))


@rule("select", "select_copy")
def selected(call: Call) -> list[Value]:
    """Follows one place along one dimension."""
    before = call.values[0].shape
    dim, index, value = call["dim"] % len(before), call["index"], call.values[0]
    found = _moved(
        call,
        lambda r: _into(r, before, lambda whole: whole.select(dim, index), dim),
        lambda of: of[0][:dim] + of[0][dim + 1 :],
    )
    if value.parts is not None and counting(value.along, len(value.parts)) == dim:
        taken_apart(found[0], value.parts[index])
    return found


@rule("unbind", "unbind_copy")
def unbound(call: Call) -> list[Value]:
    """Follows all places along one dimension."""
    value = call.values[0]
    dim = call["dim"] % len(value.shape)

    def back(arrived: list[Tensor]) -> list[Tensor]:
        return [stacked(arrived, dim)]

    outs = call.make_all([value], back, back, axes=lambda of: of[0][:dim] + of[0][dim + 1 :])
    for number, out in enumerate(outs):
        carried(call, out, value, number)
        if value.parts is not None and counting(value.along, len(value.parts)) == dim:
            taken_apart(out, value.parts[number])
    return outs


def taken_apart(found: Value, part: Value) -> None:
    """Tells a value that was put together with others, and is alone again, where it came from."""
    found.roots, found.open, found.kind, found.parts = part.roots, part.open, part.kind, None
    found.above = part.above | 1 << part.number


@rule("split", "split_copy", "split_with_sizes", "split_with_sizes_copy", "unsafe_split", "chunk")
@rule("unsafe_split_with_sizes", "unsafe_chunk", "tensor_split")
def divided(call: Call) -> list[Value]:
    """Follows several parts along one dimension."""
    value = call.values[0]
    dim, after = call["dim"] % len(value.shape), call.out.shape

    def back(arrived: list[Tensor]) -> list[Tensor]:
        return [_joined(arrived, dim)]

    outs = call.make_all([value], back, back, axes=lambda of: ax.resized(of[0], after))
    for number, out in enumerate(outs):
        carried(call, out, value, number)
        if (
            value.parts is not None
            and len(value.parts) == len(outs)
            and value.along == marked(value.shape, dim, len(outs))
        ):
            taken_apart(out, value.parts[number])
    return outs


def stacked(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Stacks parts, expanded where all are."""
    return _joined([part.unsqueeze(dim) for part in parts], dim)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Puts parts one behind the other, expanded where all are."""
    inner = [core(part) for part in parts]
    sizes = [max(sizes) for sizes in zip(*(one.shape for one in inner), strict=True)]
    cores = [
        one.expand([part.shape[d] if d == dim else n for d, n in enumerate(sizes)])
        for one, part in zip(inner, parts, strict=True)
    ]
    whole = list(parts[0].shape)
    whole[dim] = sum(part.shape[dim] for part in parts)
    return torch.cat(cores, dim).expand(whole)


@rule("cat", "concat", "stack")
def joined(call: Call) -> list[Value]:
    """Follows several tensors that become one; what is not live among them is the model's own."""
    tensors: Sequence[Tensor] = call["tensors"]
    tensors = [t for t in tensors if t.ndim > 1 or t.numel()]  # cat takes an empty one of any shape
    stacks = call.name == "stack"
    dim = call["dim"] % call.out.ndim
    values = [call.value(t) for t in tensors]
    parts = [call.tape.constant(t) if v is None else v for t, v in zip(tensors, values, strict=True)]
    sizes = [1 if stacks else t.shape[dim] for t in tensors]

    def back(arrived: list[Tensor]) -> list[Tensor]:
        r = arrived[0]
        return list(r.unbind(dim)) if stacks else list(r.split(sizes, dim))

    found = call.make(parts, back, back, axes=lambda of: _joined_axes(parts, of, call_shape, dim, stacks))
    call_shape = tuple(found.shape)
    live = [value for value in values if value is not None]
    found.roots = 0
    for value in live:
        found.roots |= value.roots
    found.place = call.tape.place(found, call.name, dim, *(part.place for part in parts))
    kinds = {value.kind for value in live}
    if len(kinds) == 1:
        found.kind = kinds.pop()
        dims = {value.dim for value in live}
        if len(dims) == 1 and (old := dims.pop()) is not None:
            found.dim = old + 1 if stacks and old >= dim else old if stacks or old != dim else None
    if len(live) == len(parts) > 1 and len(set(sizes)) == 1:
        found.parts, found.along = live, marked(found.shape, dim, None if stacks else len(live))
    return [found]


def _joined_axes(parts: list[Value], of: list[Axes], shape: Sequence[int], dim: int, stacks: bool) -> Axes:
    """Parts made by weights from the same tokens are channels of them, as the heads of a list are."""
    live = [axes for axes, part in zip(of, parts, strict=True) if not part.is_constant]
    found = live[0]
    for other in live[1:]:
        found = ax.merged(found, other) if len(other) == len(found) else found
    if stacks:
        of_same_tokens = len({part.place for part in parts}) == 1
        return (*found[:dim], ax.dimension(shape[dim], of_same_tokens), *found[dim:])
    return ax.resized(found, shape)


@rule("constant_pad_nd")
def padded(call: Call) -> list[Value]:
    """Follows a padding with a number, which is the model's own."""
    value, pad, fill = call.values[0], call["pad"], call["value"] or 0
    before, ndim = value.shape, call.out.ndim
    sides = {ndim - 1 - n // 2: (pad[n], pad[n + 1]) for n in range(0, len(pad), 2) if pad[n] or pad[n + 1]}
    edge = None
    fill = fill if math.isfinite(fill) else 0  # as before a maximum
    if call.tape.accounts and fill:
        edge = torch.nn.functional.pad(torch.zeros_like(call["self"]), pad, value=fill)
    own = call.tape.constant(edge, call.out.shape)

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        whole = core(arrived[0])
        rest = whole.expand(
            [n if d in sides else whole.shape[d] for d, n in enumerate(arrived[0].shape)]
        ).clone()
        cut(rest).zero_()
        return [cut(arrived[0]), rest.sum() * (arrived[0].numel() // max(1, rest.numel()))]

    def cut(r: Tensor) -> Tensor:
        for dim, (left, right) in sides.items():
            if left < 0 or right < 0:
                r = torch.nn.functional.pad(r, [0, 0] * (ndim - 1 - dim) + [max(0, -left), max(0, -right)])
            r = r.narrow(dim, max(0, left), before[dim])
        return r

    found = call.make(
        [value, own],
        relevance,
        lambda arrived: [cut(arrived[0]), arrived[0] if fill else None],
        axes=lambda of: ax.resized(of[0], call_shape),
    )
    call_shape = tuple(found.shape)
    carried(call, found, value)
    if all(min(side) >= 0 for side in sides.values()) and value.kind is None:
        ones = torch.ones([n if dim in sides else 1 for dim, n in enumerate(before)], device=call.out.device)
        real = ones if value.real is None else value.real.expand(before) * ones
        found.real = torch.nn.functional.pad(
            real, [s if ndim - 1 - n // 2 in sides else 0 for n, s in enumerate(pad)]
        )
    return [found]


ANY = (
    *("index", "gather", "index_select", "roll", "flip", "unfold", "unfold_copy", "diagonal", "as_strided"),
    *("diagonal_copy", "as_strided_copy", "repeat", "pixel_shuffle", "pixel_unshuffle", "masked_select"),
    *("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter", "index_put", "scatter"),
    *("index_copy", "masked_scatter", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "take"),
    *("replication_pad1d", "replication_pad2d", "replication_pad3d", "channel_shuffle", "rot90", "where"),
    *("repeat_interleave", "tile", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "block_diag"),
    *("_index_put_impl", "_unsafe_index", "_unsafe_index_put", "put", "tril", "triu", "masked_fill"),
    *("index_fill", "im2col", "diag_embed", "native_channel_shuffle", "fill_diagonal", "select_backward"),
    *("_unsafe_masked_index", "atleast_2d", "cartesian_prod"),
)
FILLING = ("tril", "triu", "masked_fill", "index_fill", "im2col", "scatter", "diag_embed", "fill_diagonal")


@rule(*ANY)
def rearranged(call: Call) -> list[Value]:
    """Follows any other rearrangement, by its own backward pass."""
    if call["accumulate"]:
        return RULES["index_add"](call)
    first = call.values[0]
    if first.kind in ("scores", "exp", "weights") and first.shape == call.out.shape and len(call.live) == 1:
        return _masked(call, first)
    if len(call.live) == 1 and any(a.base == first.base and a.shape == first.shape for a in call.answers()):
        return _gated(call, first)
    tensors, values = [t for t, _ in call.live], call.values
    transpose = Transpose(call, tensors, [None] * len(tensors))
    own: list[Value] = []
    if call.constants() or call.name in FILLING:
        own = [call.tape.constant(transpose.at_0(tensors) if call.tape.accounts else None, call.out.shape)]

    def relevance(arrived: list[Tensor]) -> list[Tensor | None]:
        shares = transpose(arrived)
        if own:
            shares.append(arrived[0].masked_fill(transpose.reached(arrived[0]), 0))
        return shares

    def gradient(arrived: list[Tensor]) -> list[Tensor | None]:
        return transpose(arrived) + arrived[: len(own)]

    axes = _axes_of(call) or (lambda of: ax.by_place(of[0], lambda marks: transpose.run([marks])[0]))
    found = call.make(values + own, relevance, gradient, axes=axes if len(values) == 1 else None)
    found.roots = 0
    for value in values:
        found.roots |= value.roots
    if len(values) == 1:
        found.kind = values[0].kind
        if values[0].dim is not None and found.made_by is not None:
            found.dim = followed(found.made_by, values[0].dim)
    elif len({value.kind for value in values}) == 1:
        found.kind = values[0].kind
    if own and found.kind is None and not transpose.at_0(tensors).any():
        ones = [torch.ones_like(t) if v.real is None else v.real.expand(v.shape).to(t) for t, v in call.live]
        found.real = transpose.linear(ones)
    return [found]


def _gated(call: Call, value: Value) -> list[Value]:
    """Follows a function of a value that is written as a choice by that very value, as where(x > 0, x, 0)."""
    tensor = call.live[0][0]
    transpose = Transpose(call, [tensor], [None])
    own = [call.tape.constant(transpose.at_0([tensor]))] if call.tape.accounts else []

    def gradient(arrived: list[Tensor]) -> list[Tensor | None]:
        return [*transpose(arrived), *(arrived[0] for _ in own)]

    found = call.make([value], lambda r: [r[0]], gradient, sources=[value, *own], axes=lambda of: of[0])
    found.base, found.proportional = value.base, False
    return [found]


def _masked(call: Call, value: Value) -> list[Value]:
    """Follows scores of which some are overwritten: what is asked for stays a matter of the query."""
    transpose = Transpose(call, [call.live[0][0]], [None]) if call.linearised else None
    found = call.make([value], lambda r: [r[0]], transpose, axes=lambda of: of[0])
    found.kind = value.kind
    return [found]


def _axes_of(call: Call) -> AxesOf | None:
    name, shape, before = call.name, tuple(call.out.shape), call.values[0].shape
    if name == "im2col":
        size = call["kernel_size"]
        inside = (ax.Factor(before[1], True), ax.Factor(size[0] * size[1], False))
        return lambda of: (of[0][0], tuple(f for f in inside if f.size > 1), *ax.tokens(shape[2:]))
    if len(shape) == len(before) and name != "as_strided":
        return lambda of: ax.resized(of[0], shape)
    return None


@rule(
    "max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "topk", "sort"
)
@rule("adaptive_max_pool3d", "fractional_max_pool2d", "kthvalue", "median", "nanmedian", "mode", "maximum")
@rule("minimum", "fmax", "fmin", "cummax", "cummin", "msort")
def picked(call: Call) -> list[Value]:
    """Follows what picks elements by their values, as a maximum or a sort does."""
    if call.name in ("maximum", "minimum", "fmax", "fmin") and len(call.live) == 1:
        return RULES["clamp"](call)  # by a constant
    tensors = [t for t, _ in call.live]
    points = [t.detach().clone() if call.overload.written else t for t in tensors]
    transpose = Transpose(call, tensors, points)
    return [call.make(call.values, transpose, transpose, axes=_axes_of(call))]


@rule("amax", "amin", "max", "min", "aminmax")
def extreme(call: Call) -> list[Value]:
    """Follows a maximum over dimensions: it picks, or says how large something is."""
    found = picked(call)
    for value in found:
        value.kind = "size"
    return found

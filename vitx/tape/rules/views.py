"""Frequent rearrangements, such as views, and concatenations: each has a transpose of its own."""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.axes import Axes
from vitx.tape.call import Call, Transpose
from vitx.tape.contraction import COPIES, VIEWS, joins_unlike
from vitx.tape.expanded import core, fitted, refilled, reshaped
from vitx.tape.registry import rule, unknown
from vitx.tape.values import Value, after, followed, marked

IDENTITIES = (*VIEWS, *COPIES, "expand", "slice", "copy")  # if they leave the shape unchanged
TURNED = (*VIEWS, *COPIES, "permute", "transpose", "t")


def carried(call: Call, found: Value, value: Value, number: int = 0) -> Value:
    """Copy to a rearranged value what still holds for it; `number` is its number among the outputs."""
    found.rearranges, found.kind, found.fan = value.rearranges, value.kind, value.fan
    found.proportional, found.times = value.proportional, value.times
    found.reads, found.adds = value.reads, value.adds
    if found.shape == value.shape and call.name in IDENTITIES:
        found.base, found.sum, found.via, found.mass = value.base, value.sum, value.via, value.mass
        found.tokens = value.tokens
    else:
        operation = call.name, number, str(call.args[1:]), str(call.kwargs)
        found.base = call.tape.same(found, "base", value.base, found.shape, *operation)
        found.tokens = call.tape.same(found, "tokens", value.tokens, *operation)
        if value.mass is not None:
            move, mass, before = Transpose(call, [call.live[0][0]], [None]), value.mass, value.shape
            found.mass = lambda: move.run([mass().expand(before).contiguous()])[number]
    found.softmax_over = followed(found, value.softmax_over)
    found.along = followed(found, value.along)
    found.parts = None if found.along is None else value.parts
    return found


def turned(call: Call, back: Callable[[Tensor], Tensor], axes: Callable[[Axes], Axes | None]) -> list[Value]:
    """Record a call that returns all elements in another order or shape, or copies them."""
    value = call.values[0]

    def into(arrived: list[Tensor]) -> list[Tensor]:
        return [back(arrived[0])]

    found = carried(call, call.make([value], into, into, axes=lambda of: axes(of[0]), exact=True), value)
    if value.sum is not None and found.sum is None and call.name in TURNED:
        found.sum, found.via = value.sum, after(back, value.via)
    return [found]


@rule(*VIEWS)
def laid_out(call: Call) -> list[Value]:
    """Record a reshape, but not a view of the bits as another dtype."""
    if isinstance(call["dtype"], torch.dtype):
        return unknown(call)
    before, shape = call.values[0].shape, tuple(call.out.shape)
    return turned(call, lambda r: reshaped(r, before), lambda of: ax.reshaped(of, shape))


@rule(*COPIES)
def same(call: Call) -> list[Value]:
    """Record a copy or a change of dtype, but not to integers."""
    return turned(call, lambda r: r, lambda of: of) if call.out.is_floating_point() else unknown(call)


@rule("permute", "transpose", "t")
def permuted(call: Call) -> list[Value]:
    """Record a permutation of dimensions."""
    order, name = [*range(call.out.ndim)], call.name.removesuffix("_copy")
    if name == "permute":
        order = [dim % len(order) for dim in call["dims"]]
    elif len(order) > 1:
        first, second = (0, 1) if name == "t" else (call["dim0"], call["dim1"])
        order[first], order[second] = order[second], order[first]
    back = [order.index(dim) for dim in range(len(order))]
    return turned(call, lambda r: r.permute(back), lambda of: tuple(of[dim] for dim in order))


@rule("roll")
def rolled(call: Call) -> list[Value]:
    """Record a shift along dimensions that wraps around, as of shifted windows."""
    shifts, dims = call["shifts"], call["dims"] or ()

    def back(r: Tensor) -> Tensor:
        if not dims:  # of the flattened tensor
            return r.roll([-shift for shift in shifts])
        return core(r).roll([-shift for shift in shifts], dims).expand(r.shape)

    return turned(call, back, lambda of: of)


@rule("expand")
def expanded(call: Call) -> list[Value]:
    """Record copies along some dimensions."""
    before, shape = call.values[0].shape, tuple(call.out.shape)
    return turned(call, lambda r: fitted(r, before), lambda of: ax.broadcast(of, shape))


@rule("slice", "select", "unbind", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def divided(call: Call) -> list[Value]:
    """Record parts along one dimension, which select and unbind remove."""
    value, out = call.values[0], call.out.shape
    if value.shape == out:
        return turned(call, lambda r: r, lambda of: of)
    shape, gone, start, step = value.shape, call.name in ("select", "unbind"), 0, 1
    dim = call["dim"] % len(shape)
    if call.name == "slice":
        start, _, step = slice(call["start"], call["end"], call["step"]).indices(shape[dim])
    elif call.name == "select":
        start = call["index"] % shape[dim]
    widths = [1 if gone else one.shape[dim] for one in call.outs]
    starts = [start + sum(widths[:number]) for number in range(len(widths))]

    def back(arrived: list[Tensor]) -> list[Tensor]:
        """Write the parts into zeros, expanded where all of the parts are, except along this dimension."""
        inner = [core(part.unsqueeze(dim) if gone else part) for part in arrived]
        sizes = [max(sizes) for sizes in zip(*(one.shape for one in inner), strict=True)]
        sizes[dim] = shape[dim]
        whole = inner[0].new_zeros(sizes)
        for one, first, width in zip(inner, starts, widths, strict=True):
            torch.ops.aten.slice(whole, dim, first, first + step * width, step).copy_(one)
        return [whole.expand(shape)]

    def axes(of: list[Axes]) -> Axes:
        return (*of[0][:dim], *of[0][dim + 1 :]) if gone else ax.resized(of[0], out)

    outs = call.make_all([value], back, back, axes=axes, exact=True)
    one = shape[dim] // len(value.parts) if value.parts is not None and value.counts(dim) else None
    for number, (found, first, width) in enumerate(zip(outs, starts, widths, strict=True)):
        carried(call, found, value, number)
        if width == one and first % one == 0 and step == 1:
            taken_apart(found, value, first // one)
    return outs


def taken_apart(found: Value, whole: Value, number: int) -> None:
    """Restore what held for a value before it was joined with others, now that it is alone again."""
    assert whole.parts is not None
    part = whole.parts[number]
    found.rearranges, found.open, found.kind, found.parts = part.rearranges, part.open, part.kind, None
    found.ancestors = part.ancestors | 1 << part.number
    if whole.made_by is not None and whole.made_by.name in ("cat", "stack") and found.shape == part.shape:
        found.base, found.proportional, found.times = part.base, part.proportional, part.times
        found.sum, found.via = part.sum, part.via


@rule("cat", "stack")
def joined(call: Call) -> list[Value]:
    """Record tensors that are joined into one; those that are not live are the model's own."""
    given: Sequence[Tensor] = call["tensors"]
    tensors = [t for t in given if t.ndim > 1 or t.numel()]  # cat accepts an empty tensor of any shape
    stacks, dim, shape = call.name == "stack", call["dim"] % call.out.ndim, tuple(call.out.shape)
    values = [call.value(tensor) for tensor in tensors]
    live = [value for value in values if value is not None]
    parts = [v or call.tape.constant(t) for t, v in zip(tensors, values, strict=True)]
    if stacks or dim not in ax.channel_dims(live[0].axes):
        for tensor, value in zip(tensors, parts, strict=True):
            if value.is_constant:
                call.tensors.bind(tensor, value)
    sizes = [1 if stacks else tensor.shape[dim] for tensor in tensors]

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        return list(arrived[0].unbind(dim) if stacks else arrived[0].split(sizes, dim))

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        """Send none to constant channels of tokens that have others, such as a column of ones."""
        r = arrived[0]
        if len(live) < len(parts) and not stacks and dim in ax.channel_dims(found.axes):
            real = [r.new_full((size,), float(v is not None)) for size, v in zip(sizes, values, strict=True)]
            r = refilled(r, torch.cat(real).view(-1, *[1] * (r.ndim - dim - 1)).expand(r.shape), [dim])
        return gradient([r])

    def axes(of: list[Axes]) -> Axes:
        """Return the axes: parts computed by weights from the same tokens, such as heads, are channels."""
        mine = [axes for axes, part in zip(of, parts, strict=True) if not part.is_constant]
        found = mine[0]
        for other in mine[1:]:
            found = ax.merged(found, other) if len(other) == len(found) else found
        of_same_tokens = len({part.tokens for part in parts}) == 1
        if stacks:
            return (*found[:dim], ax.dimension(shape[dim], of_same_tokens), *found[dim:])
        if of_same_tokens and len(set(sizes)) == 1 < len(parts) and dim not in ax.channel_dims(found):
            return (*found[:dim], (ax.Factor(len(parts), True), *found[dim]), *found[dim + 1 :])
        return ax.resized(found, shape)

    found = call.make(parts, relevance, gradient, axes=axes)
    found.rearranges = reduce(or_, (value.rearranges for value in live))
    found.tokens = call.tape.same(found, call.name, dim, *(part.tokens for part in parts))
    if len({(value.kind, value.dim) for value in live}) == 1:
        found.kind, old = live[0].kind, live[0].dim
        if old is not None:
            found.dim = old + 1 if stacks and old >= dim else old if stacks or old != dim else None
    elif {value.kind for value in live} == {"scores", None}:
        found.kind = "scores"  # such as those of a learned key
    if joins_unlike(found):
        call.tape.unlike[found.rearranges] = shape[-1]
    if len(live) == len(parts) > 1 and len(set(sizes)) == 1:
        found.parts, found.along = live, marked(found.shape, dim, len(live))
    pairs = zip(tensors, values, strict=True)
    pads = [v is None and call.tensors.origin(t) == "fixed" and not t.any() for t, v in pairs]
    if any(pads):
        like, shapes, join = call.out.new_zeros(()), [t.shape for t in tensors], call.overload.function
        real = [(shape, 0.0 if pad else 1.0) for shape, pad in zip(shapes, pads, strict=True)]
        found.mass = lambda: join([like.new_full(shape, one) for shape, one in real], dim)
    return [found]


@rule("copy", "zero", "fill")
def overwritten(call: Call) -> list[Value]:
    """Record what overwrites a tensor: another value, or constants."""
    source, shape = call["src"] if call.name == "copy" else call["value"], call.out.shape
    if call.value(source) is not None:
        expand: Any = torch.ops.aten.expand.default
        return expanded(call.inner(expand, source, shape, out=call.out))
    return [call.tape.constant(call.out.clone() if call.tape.accounts else None, shape)]

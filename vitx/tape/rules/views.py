"""The frequent rearrangements, as views are, and what is put together: each has a transpose of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.axes import Axes
from vitx.tape.call import Call, Rule, Transpose, rule, unknown
from vitx.tape.expanded import core, fitted, reshaped
from vitx.tape.values import Value, after, followed, marked

RESHAPES = ("view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze")
COPIES = ("clone", "alias", "detach", "_to_copy", "lift_fresh", "lift", "_conj")
IDENTITIES = (*RESHAPES, *COPIES, "expand", "slice", "copy")  # where they leave the shape as it is
TURNED = (*RESHAPES, *COPIES, "permute", "transpose", "t")
Way = tuple[Callable[[Tensor], Tensor], Callable[[Axes], Axes | None]]


def carried(call: Call, found: Value, value: Value, number: int = 0) -> Value:
    """Tells a rearranged value what is still true of it; it is one of several outputs, or the only one."""
    found.roots, found.kind, found.total, found.fan = value.roots, value.kind, value.total, value.fan
    found.proportional = value.proportional
    found.rounded = value.rounded or call.out.dtype != call.live[0][0].dtype
    if found.shape == value.shape and call.name in IDENTITIES:
        found.base, found.sum, found.via, found.mass = value.base, value.sum, value.via, value.mass
        found.place = value.place
    else:
        operation = call.name, number, *map(str, call.args[1:]), str(call.kwargs)
        found.base = call.tape.same(found, "base", value.base, found.shape, *operation)
        found.place = call.tape.same(found, "place", value.place, *operation)
    assert found.made_by is not None
    found.over = followed(found.made_by, value.over)
    found.along = followed(found.made_by, value.along)
    found.parts = None if found.along is None else value.parts
    return found


def view(*names: str) -> Callable[[Callable[[Call], Way | None]], Rule]:
    """Registers a function that returns the way back of a rearrangement, and what becomes of the axes."""

    def register(function: Callable[[Call], Way | None]) -> Rule:
        @rule(*names)
        def follow(call: Call) -> list[Value]:
            way = function(call)
            return unknown(call) if way is None else [_moved(call, *way)]

        return follow

    return register


def _moved(call: Call, back: Callable[[Tensor], Tensor], axes: Callable[[Axes], Axes | None]) -> Value:
    value = call.values[0]

    def into(arrived: list[Tensor]) -> list[Tensor]:
        return [back(arrived[0])]

    found = carried(call, call.make([value], into, into, axes=lambda of: axes(of[0]), exact=True), value)
    if value.sum is not None and found.sum is None and call.name in TURNED:
        found.sum, found.via = value.sum, after(back, value.via)
    if value.mass is not None and found.mass is None:
        move, mass, before = Transpose(call, [call.live[0][0]], [None]), value.mass, value.shape
        found.mass = lambda: move.run([mass().expand(before).contiguous()])[0]
    return found


@view(*RESHAPES)
def laid_out(call: Call) -> Way | None:
    """Follows a reshape."""
    if isinstance(call["dtype"], torch.dtype):
        return None  # bits read as another type
    before, after = call.values[0].shape, tuple(call.out.shape)
    return lambda r: reshaped(r, before), lambda of: ax.reshaped(of, after)


@view(*COPIES)
def same(call: Call) -> Way | None:
    """Follows a copy, or a change of type, but not to whole numbers."""
    return (lambda r: r, lambda of: of) if call.out.is_floating_point() else None


@view("permute", "transpose", "t")
def permuted(call: Call) -> Way:
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
    return lambda r: r.permute(back), lambda of: tuple(of[dim] for dim in order)


@view("expand")
def expanded(call: Call) -> Way:
    """Follows copies along some dimensions."""
    before, after = call.values[0].shape, tuple(call.out.shape)
    return lambda r: fitted(r, before), lambda of: ax.broadcast(of, after)


@view("slice")
def sliced(call: Call) -> Way:
    """Follows a part along one dimension."""
    before, after, dim = call.values[0].shape, call.out.shape, call["dim"] % call.out.ndim
    start, end, step = call["start"], call["end"], call["step"] or 1

    def back(r: Tensor) -> Tensor:
        if before == after:
            return r
        return _into(r, before, dim, lambda x: torch.ops.aten.slice(x, dim, start, end, step))

    return back, lambda of: ax.resized(of, after)


@rule("select")
def selected(call: Call) -> list[Value]:
    """Follows one place along one dimension."""
    value, index = call.values[0], call["index"]
    dim = call["dim"] % len(value.shape)
    found = _moved(
        call,
        lambda r: _into(r, value.shape, dim, lambda whole: whole.select(dim, index)),
        lambda of: of[:dim] + of[dim + 1 :],
    )
    if value.stacks(dim):
        taken_apart(found, value, index)
    return [found]


def _into(part: Tensor, shape: Sequence[int], dim: int, pick: Callable[[Tensor], Any]) -> Tensor:
    """Lays a part into zeros, expanded where it is, but not along the dimension that is cut."""
    inner = core(part)
    sizes = list(inner.shape)
    if part.ndim == len(shape):
        inner = inner.expand([n if d != dim else part.shape[dim] for d, n in enumerate(sizes)])
        sizes[dim] = shape[dim]
    else:
        sizes.insert(dim, shape[dim])
    whole = part.new_zeros(sizes)
    pick(whole).copy_(inner)
    return whole.expand(tuple(shape))


@rule("unbind")
def unbound(call: Call) -> list[Value]:
    """Follows all places along one dimension."""
    dim = call["dim"] % len(call.values[0].shape)
    return _divided(call, dim, lambda parts: stacked(parts, dim), lambda of: of[:dim] + of[dim + 1 :])


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def divided(call: Call) -> list[Value]:
    """Follows several parts along one dimension."""
    dim, after = call["dim"] % call.out.ndim, call.out.shape
    return _divided(call, dim, lambda parts: _concatenated(parts, dim), lambda of: ax.resized(of, after))


def _divided(
    call: Call, dim: int, back: Callable[[list[Tensor]], Tensor], axes: Callable[[Axes], Axes]
) -> list[Value]:
    value = call.values[0]

    def into(arrived: list[Tensor]) -> list[Tensor]:
        return [back(arrived)]

    outs = call.make_all([value], into, into, axes=lambda of: axes(of[0]))
    again = (
        value.counts(dim) and len(outs) == len(value.parts or ()) and len({out.shape for out in outs}) == 1
    )
    for number, out in enumerate(outs):
        carried(call, out, value, number)
        if again:
            taken_apart(out, value, number)
    return outs


def taken_apart(found: Value, whole: Value, number: int) -> None:
    """Tells a value that was put together with others, and is alone again, where it came from."""
    assert whole.parts is not None
    part = whole.parts[number]
    found.roots, found.open, found.kind, found.parts = part.roots, part.open, part.kind, None
    found.above = part.above | 1 << part.number


def stacked(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Stacks parts, expanded where all are."""
    return _concatenated([part.unsqueeze(dim) for part in parts], dim)


def _concatenated(parts: Sequence[Tensor], dim: int) -> Tensor:
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


@rule("cat", "stack")
def joined(call: Call) -> list[Value]:
    """Follows several tensors that become one; what is not live among them is the model's own."""
    tensors: Sequence[Tensor] = call["tensors"]
    tensors = [t for t in tensors if t.ndim > 1 or t.numel()]  # cat takes an empty one of any shape
    stacks, dim, shape = call.name == "stack", call["dim"] % call.out.ndim, tuple(call.out.shape)
    values = [call.value(t) for t in tensors]
    live = [value for value in values if value is not None]
    parts = [call.tape.constant(t) if v is None else v for t, v in zip(tensors, values, strict=True)]
    sizes = [1 if stacks else t.shape[dim] for t in tensors]

    def back(arrived: list[Tensor]) -> list[Tensor]:
        r = arrived[0]
        return list(r.unbind(dim)) if stacks else list(r.split(sizes, dim))

    def axes(of: list[Axes]) -> Axes:
        """Parts made by weights from the same tokens are channels of them, as the heads of a list are."""
        mine = [axes for axes, part in zip(of, parts, strict=True) if not part.is_constant]
        found = mine[0]
        for other in mine[1:]:
            found = ax.merged(found, other) if len(other) == len(found) else found
        if not stacks:
            return ax.resized(found, shape)
        of_same_tokens = len({part.place for part in parts}) == 1
        return (*found[:dim], ax.dimension(shape[dim], of_same_tokens), *found[dim:])

    found = call.make(parts, back, back, axes=axes)
    found.roots = 0
    for value in live:
        found.roots |= value.roots
    found.place = call.tape.same(found, call.name, dim, *(part.place for part in parts))
    if len({(value.kind, value.dim) for value in live}) == 1:
        found.kind, old = live[0].kind, live[0].dim
        if old is not None:
            found.dim = old + 1 if stacks and old >= dim else old if stacks or old != dim else None
    if len(live) == len(parts) > 1 and len(set(sizes)) == 1:
        found.parts, found.along = live, marked(found.shape, dim, len(live))
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

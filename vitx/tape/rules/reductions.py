"""Sums and means over dimensions: of a stack, of products, or of anything else."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.call import Call, rule
from vitx.tape.contraction import of_sum
from vitx.tape.expanded import over, reshaped, scaled
from vitx.tape.rules.contractions import contracted
from vitx.tape.rules.sums import total
from vitx.tape.rules.views import stacked, taken_apart
from vitx.tape.values import Back, Step, Value, followed


def dimensions(given: Any, ndim: int) -> list[int]:
    """Returns the dimensions over which an operator works, in order; all where none is given."""
    if given in (None, [], ()):
        return list(range(ndim))
    return sorted(dim % max(1, ndim) for dim in ([given] if isinstance(given, int) else given))


@rule("sum", "mean")
def summed(call: Call) -> list[Value]:
    """Follows a sum over dimensions."""
    tensor, value, keepdim = call["self"], call.values[0], bool(call["keepdim"])
    dims = dimensions(call["dim"], tensor.ndim)
    factor = 1 / math.prod(tensor.shape[dim] for dim in dims) if call.name == "mean" else 1.0
    if len(dims) == 1 and value.stacks(dims[0]):
        return [_of_stack(call, value, dims[0], keepdim, factor)]
    factors = call.factors_of(tensor)
    if factors is not None:
        contraction = of_sum(factors, tensor.shape, dims, call.out.shape)
        return [contracted(call, contraction, factors, factor)]
    return [_added_up(call, value, dims, keepdim, factor)]


def spread(r: Tensor, shape: Sequence[int], dims: Sequence[int], *, keepdim: bool, share: float) -> Tensor:
    """Gives each element of those dimensions a share of what came of them."""
    for dim in () if keepdim else dims:
        r = r.unsqueeze(dim)
    return scaled(r, share).expand(tuple(shape))


def _added_up(call: Call, value: Value, dims: Sequence[int], keepdim: bool, factor: float) -> Value:
    """Follows a sum of anything: in proportion to how much each element counts."""
    before, mass = value.shape, value.mass
    count = math.prod(before[dim] for dim in dims)
    back = partial(spread, shape=before, dims=dims, keepdim=keepdim)

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        if mass is None:
            return [back(arrived[0], share=1 / count)]
        inside = mass().to(arrived[0]).expand(before)
        whole = inside.sum(list(dims), keepdim=True)
        return [back(arrived[0], share=1.0) * over(inside, whole)]

    def axes(of: list[ax.Axes]) -> ax.Axes:
        kept = [part if dim not in dims else () for dim, part in enumerate(of[0])]
        return tuple(part for dim, part in enumerate(kept) if keepdim or dim not in dims)

    found = call.make([value], relevance, lambda g: [back(g[0], share=factor)], axes=axes)
    if mass is not None:
        found.mass = lambda: mass().expand(before).sum(list(dims), keepdim=keepdim)
    if value.kind == "exp":
        found.total = value
    if value.kind in ("scores", "weights"):
        assert found.made_by is not None
        found.kind, found.over = value.kind, followed(found.made_by, value.over)
    return found


def _of_stack(call: Call, value: Value, dim: int, keepdim: bool, factor: float) -> Value:
    """Follows the sum of a stack: a sum of its parts."""
    tape, shape = call.tape, [n for d, n in enumerate(value.shape) if d != dim]
    parts = [tape.value(shape, [origin]) for origin in value.parts or ()]
    for number, part in enumerate(parts):
        taken_apart(part, value, number)
    into: Back = lambda arrived: [stacked(arrived, dim)]  # noqa: E731
    tape.append(Step("unbind", [value], parts, into, into))
    found = total(call, [(part, factor) for part in parts])
    if not keepdim:
        return found
    whole, inner = tape.value(call.out.shape, [found]), found.shape
    whole.roots, whole.open = found.roots, found.open
    back: Back = lambda arrived: [reshaped(arrived[0], inner)]  # noqa: E731
    tape.append(Step("unsqueeze", [found], [whole], back, back))
    return whole

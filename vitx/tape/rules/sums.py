"""Sums and differences, of several values or of a value and a constant."""

from collections.abc import Sequence
from functools import partial, reduce
from itertools import product
from operator import or_
from typing import Any

import torch
from torch import Tensor

from vitx.functional.tiles import is_zero
from vitx.tape import axes as ax
from vitx.tape.attention import Attention
from vitx.tape.call import Call
from vitx.tape.expanded import core, fitted, scaled
from vitx.tape.registry import rule
from vitx.tape.sums import Sum, count_layers
from vitx.tape.terms import Weighted, added_anew, as_number, terms_of
from vitx.tape.values import Value, reduced, repeated
from vitx.tape.weights import alike

Summand = tuple[Any, float | Tensor]  # a value, tensor or number, and its factor


@rule("add", "sub", "rsub")
def sum_of_two(call: Call) -> list[Value]:
    """Record a sum or a difference."""
    alpha = 1 if call["alpha"] is None else call["alpha"]
    signs = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[call.name]
    summands = [(call["self"], signs[0]), (call["other"], signs[1])]
    mean = _gated_mean(call, summands)
    return [total(call, summands) if mean is None else total(call, mean, exact=False)]


def _gated_mean(call: Call, summands: Sequence[Summand]) -> list[Summand] | None:
    """Return the summands and factors of a mean by a gate, g f + (1 - g) x or x + g (f - x), as of `lerp`."""
    live = [(one, value) for one, factor in summands if factor == 1 and (value := call.value(one))]
    pairs = [call.factors_of(tensor) or () for tensor, _ in live]
    orders = [[pair, pair[::-1]] if pair and all(value for _, value in pair) else [] for pair in pairs]
    if len(orders) < 2:
        return None
    for ((gate, _), (_, f)), ((other, _), (_, x)) in product(*orders):
        if gate.shape == other.shape and alike(gate + other, 1):
            return [(f, gate.detach().clone()), (x, other.detach().clone())]
    for order, (_, x) in zip(orders, live[::-1], strict=True):
        for (gate, _), (_, change) in order:
            assert change is not None
            inner = change.sum if change.times == 1 else None
            if inner is None or not inner.whole or inner.vias or change.base != inner.outputs[0].base:
                continue
            rest = [(one.value, gate.detach() * one.factor) for one in inner.terms if one.value is not x]
            if rest and any(one.value is x and one.factor == -1 for one in inner.terms):
                return [*rest, (x, 1 - gate.detach())]
    return None


@rule("lerp")
def blended(call: Call) -> list[Value]:
    """Record a weighted mean of two; the weight is held constant."""
    weight = call["weight"]
    of_constant = call.value(weight) is None
    weight = weight.detach().clone() if isinstance(weight, Tensor) else weight
    return [total(call, [(call["self"], 1 - weight), (call["end"], weight)], exact=of_constant)]


def total(call: Call, summands: Sequence[Summand], *, exact: bool = True) -> Value:
    """Record a sum of values, tensors and numbers, at least one of them live, each times a factor.

    The gradient is exact if all factors are constants.
    """
    out, live, own = call.out, [], []
    for one, factor in summands:
        value = one if isinstance(one, Value) else call.value(one)
        if value is not None:
            live.append((value, factor))
        elif call.tape.accounts:
            dtype = torch.promote_types(out.dtype, torch.float32)
            constant = torch.as_tensor(one, dtype=dtype, device=out.device) * factor  # a copy, not a view
            own.append((call.tape.constant(constant.to(dtype)), 1))
    sources, values = live + own, [value for value, _ in live]
    read = reduce(or_, (value.ancestors for value in values))
    # A constant from which another summand was computed is a stream, such as the first class token.
    counted = [v for v in values if v.kind != "size" and not (v.is_constant and not read >> v.number & 1)]
    tensors = [(one, factor) for one, factor in summands if isinstance(one, Tensor) and call.value(one)]
    if len(counted) == len(values) == len(tensors) == 2:
        mean = _mean_among(tensors, values)
        counted = counted if mean is None else [values[1 - mean]]
    if len(live) == 1 or len(counted) == 1:
        found = _shifted(call, (counted or values)[0], _linear(sources, exact), alone=len(live) == 1)
        constants = [one for one, _ in summands if call.value(one) is None]
        if (
            len(live) == 1
            and found.shape == values[0].shape
            and all(_is_zero(call, one) for one in constants)
        ):
            found.base, found.proportional = values[0].base, values[0].proportional
            found.times, found.mass = values[0].times * as_number(live[0][1]), values[0].mass
    else:
        summands = [one for one in live if one[0] in (counted or values)]
        found = _summed(call, summands, values, sources, exact=exact)
    if len(live) == 2 and live[1][0].kind == "size" and found.kind == "scores":  # less their maximum
        found.dim = reduced(found.shape, live[1][0].shape)
    return found


def _is_zero(call: Call, constant: Any) -> bool:
    """Return whether a summand is 0; a weight is taken for another number."""
    if isinstance(constant, Tensor):
        return call.tensors.origin(constant) != "learned" and is_zero(constant)
    return isinstance(constant, (int, float)) and constant == 0


def _linear(sources: Sequence[Weighted], exact: bool) -> dict[str, Any]:
    """Return the gradient of a weighted sum as options of its step."""
    ways = [(value.shape, factor) for value, factor in sources]

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        return [fitted(scaled(arrived[0], factor), shape) for shape, factor in ways]

    return {"gradient": gradient, "sources": [value for value, _ in sources], "exact": exact}


def _mean_among(terms: Sequence[tuple[Tensor, float | Tensor]], values: Sequence[Value]) -> int | None:
    """Return which of two terms subtracts the mean of the other over some dimensions, as a norm does."""
    for number, ((one, factor), (other, times)) in enumerate((terms, terms[::-1])):
        if one.ndim <= other.ndim:
            alone = core(one.detach())
            if values[number].mass is not None and values[number].made_from(values[1 - number]):
                # Constants weighed the other: the mean may be repeated, as by a matrix of ones.
                for dim in range(alone.ndim):
                    first = alone.narrow(dim, 0, 1)
                    alone = first if alike(alone - first, 0) else alone
            sizes = (1,) * (other.ndim - one.ndim) + tuple(alone.shape)
            dims = [dim for dim, size in enumerate(sizes) if size == 1 < other.shape[dim]]
            if not dims:
                continue
            whole = other.detach() * times
            if alike((alone * factor + whole.mean(dims, keepdim=True)) / whole.abs().amax(), 0):
                return number
    return None


def _shifted(call: Call, value: Value, options: dict[str, Any], *, alone: bool) -> Value:
    """Record a value plus constants or sizes: all relevance goes to the value."""
    before, shape = value.shape, call.out.shape
    found = call.make(
        *([value], lambda r: [fitted(r[0], before)]),
        axes=lambda of: ax.broadcast(of[0], shape),
        **options,
    )
    if before == shape:
        found.fan, found.tokens, found.via = value.fan, value.tokens, value.via
        if alone:
            found.rearranges, found.sum = value.rearranges, value.sum
        if not value.proportional:
            found.base, found.proportional = value.base, False
    if value.kind in ("scores", "size", "exp", "weights"):
        found.kind = value.kind
        found.along = value.along if before == shape else None
    if options["sources"][1:] and value.rearranges & call.tape.residuals:
        call.tape.shifted[value] = found, call.tape.keeper.keep(call.out)
    return found


def _summed(
    call: Call,
    summands: Sequence[Weighted],
    live: Sequence[Value],
    sources: Sequence[Weighted],
    *,
    exact: bool,
) -> Value:
    """Record a sum of several values, among which sizes have no share."""
    tape, shape, counted = call.tape, call.out.shape, [value for value, _ in summands]
    terms, opened, whole = terms_of(summands)
    if not terms:
        return tape.constant(call.out.clone() if tape.accounts else None, shape)
    anew = added_anew(summands, tape.last_residuals())
    replaced: set[Sum] = set()
    if anew is not None and all(term.value.shape == shape for term in anew[0]):
        (terms, replaced), whole = anew, True
        others = [one for one in sources if one[0] not in counted]
        sources = [*((value, factor) for value, _, factor in terms), *others]
    inputs, kind = [term.value for term in terms], partial(Sum, terms=terms)
    fit = all(repeated(value.shape, shape) is not None for value in inputs)
    axes = (lambda of: reduce(ax.merged, (ax.broadcast(one, shape) for one in of))) if fit else None
    found = call.make(inputs, None, axes=axes, kind=kind, **_linear(sources, exact))
    step = found.made_by
    assert isinstance(step, Sum)
    found.sum, step.whole = step, whole and not any(value.is_constant for value, _ in sources)
    if step.stream is None:
        step.refuse_within(tape.residuals)
        tape.opened |= opened
    else:
        found.open = step.stream.open
        tape.drop(opened)
        tape.opened |= replaced
        for attention in step.closes:
            attention.residuals.add(step)
        tape.residuals |= 1 << found.number
        tape.end(found, call.out)
        if tape.accounts:
            # An attention over channels, which is in no layer, counts, too.
            before = count_layers(found, tape.layers) or any(isinstance(one, Attention) for one in tape.steps)
            inside = [term.mass() != 0 for term in step.branches if term.mass is not None]
            padded = len(inside) == len(step.branches) > 0  # only some tokens are in a branch
            out = call.out * reduce(or_, inside) if padded else call.out
            tape.streams[found] = tape.keeper.keep(out), int(before)
    found.tokens = tape.combined(found, counted)
    kinds = {value.kind for value in counted}
    if "scores" in kinds or kinds in ({"weights"}, {"size"}):
        found.kind = "scores" if "scores" in kinds else counted[0].kind
    if len({value.base for value in live}) == 1 and all(value.shape == shape for value in live):
        found.base, found.proportional = live[0].base, all(value.proportional for value in live)
        found.times = sum(as_number(factor) * value.times for value, factor in summands)
    return found

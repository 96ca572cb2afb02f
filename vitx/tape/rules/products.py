"""Elementwise products and quotients, of two values or of a value and a constant."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.call import Call
from vitx.tape.contraction import of_sum
from vitx.tape.expanded import core, fitted, scaled
from vitx.tape.registry import rule, unknown
from vitx.tape.rules.attention import attended, attends, has_one_key, normalized, rescaled
from vitx.tape.rules.elementwise import gated, of_scores
from vitx.tape.terms import as_number
from vitx.tape.values import Value, reduced, repeated
from vitx.tape.weights import alike

WEIGHING = ("weights", "exp")


@rule("neg")
def negated(call: Call) -> list[Value]:
    """Record a change of sign."""
    return [_times_constant(call, call.values[0], -1)]


@rule("mul")
def multiplied(call: Call) -> list[Value]:
    """Record a product, and keep its factors in case it is summed later."""
    first, second = call["self"], call["other"]
    one, other = call.value(first), call.value(second)
    if one is not None and other is not None:
        for value, factor in ((one, second), (other, first)):
            if (softmax := normalized(call, value, partial(torch.reciprocal, factor))) is not None:
                return [softmax]
        if (regrouped := _regrouped(call, (first, one), (second, other))) is not None:
            return multiplied(regrouped)
        pair = (first, one), (second, other)
        for weights, values in (pair, pair[::-1]):
            if has_one_key(call, weights[1]) and values[1].kind is None:
                contraction = of_sum((weights, values), call.out.ndim, ())
                return [attended(call, contraction, *contraction[:2], 1.0)]
        found = _product(call, first, second)
        if first.numel() and second.numel() and (one.base != other.base or one is other):
            call.factors = pair  # an activation is summed as a whole
        return [found]
    tensor, factor = (second, first) if one is None else (first, second)
    (value,) = call.values
    found = _times_constant(call, value, factor)
    if isinstance(factor, Tensor) and factor.numel() > 1:
        call.factors = [(tensor, value), (factor, None)]
    elif isinstance(factor, Tensor) or value.kind is None:
        call.factors = call.factors_of(tensor) if found.shape == value.shape and factor == 1 else None
    return [found]


def _regrouped(call: Call, *pair: tuple[Tensor, Value]) -> Call | None:
    """Return (b a) f(a) as the product of b and the activation a f(a); None for any other product."""
    for (product, value), (factor, function) in (pair, pair[::-1]):
        factors = [] if value.base == function.base else [*(call.factors_of(product) or ())]
        for (alone, of_alone), (rest, of_rest) in zip(factors, factors[::-1], strict=True):
            if of_alone is not None and of_alone.base == function.base:
                made, inner = alone.detach() * factor.detach(), [(alone, of_alone), (factor, function)]
                activation = multiplied(replace(call, args=[alone, factor], live=inner, outs=[made]))[0]
                live = [(made, activation)] + ([] if of_rest is None else [(rest, of_rest)])
                return replace(call, args=[rest, made], live=live)
    return None


@rule("div")
def quotient(call: Call) -> list[Value]:
    """Record a quotient: the divisor is a scale; exponentials over their sum are a softmax."""
    first, second = call["self"], call["other"]
    above, below = call.value(first), call.value(second)
    if call["rounding_mode"] is not None or above is None:
        return gated(call, size=call["rounding_mode"] is None)
    if below is None:
        return [_times_constant(call, above, 1 / second)]
    return [normalized(call, above, lambda: second) or _product(call, first, second, quotient=True)]


def _times_constant(call: Call, value: Value, factor: Any) -> Value:
    before, shape, mass = value.shape, call.out.shape, value.mass
    number = isinstance(factor, (int, float))
    if number and factor == 0:
        return call.tape.constant(call.out.clone() if call.tape.accounts else None, shape)
    alone = not ax.channel_dims(value.softmax_over or (), some=True)  # without other keys
    if before != shape and alone and attends(call, value):
        return unknown(call)[0]  # a key with a constant value
    by = 1 if number and rescaled(call, value, factor) else factor
    mask = isinstance(factor, Tensor) and factor.dtype == torch.bool and bool(call.mask_sources())
    if isinstance(factor, Tensor) and not factor.is_floating_point():
        factor = factor.to(call.out.dtype)
    kept = call.kept(factor) if isinstance(factor, Tensor) else None
    found = call.make(
        [value],
        lambda r: [fitted(r[0], before)],
        lambda g: [fitted(scaled(g[0], by if kept is None else kept.tensor), before)],
        axes=lambda of: ax.broadcast(of[0], shape),
    )
    if before == shape:
        found.rearranges, found.base, found.proportional = value.rearranges, value.base, value.proportional
        found.times, found.reads, found.adds = value.times * as_number(factor), value.reads, value.adds
        found.sum, found.via, found.fan, found.mass = value.sum, value.via, value.fan, mass
        found.tokens = value.tokens
    found.kind = "weights" if mask and value.kind == "scores" else value.kind  # a ReLU, up to other masks
    if not isinstance(factor, Tensor):
        found.softmax_over = value.softmax_over
    elif kept and factor.numel() > 1 and call.weighs(factor, lambda: found.axes, _along(factor, shape)):
        found.mass = lambda: kept.tensor.abs() * (1 if mass is None else mass())
    return found


def _along(factor: Tensor, shape: Sequence[int]) -> list[int]:
    """Return the dimensions of a shape along which a factor that broadcasts to it varies."""
    return [dim + len(shape) - factor.ndim for dim, size in enumerate(factor.shape) if size > 1]


def _product(call: Call, first: Tensor, second: Tensor, *, quotient: bool = False) -> Value:
    """Record a product or quotient of two live values that is not summed.

    A factor that weights the other, scales rows of weights or all channels of a token, or is a size, is held
    constant, without relevance. One computed from the other is held, too, and shares the relevance unless it
    is elementwise. Otherwise, each counts half.
    """
    one, other = call.value(first), call.value(second)
    assert one is not None
    assert other is not None
    if one.kind == other.kind == "exp" and one.base != other.base:
        return call.make(call.values, None)  # the exponential of a sum
    pairs = [(one, core(second).shape), (other, core(first).shape)][: 1 if quotient else 2]
    rows = next((n for n, pair in enumerate(pairs) if _scales(*pair)), None)
    if quotient and rows is None and one.kind == "exp" and _is_sum(first, second):
        rows = 0
    held = 1 if quotient else _held(call, one, other) if rows is None else 1 - rows
    moving = [(one, second), (other, first)]
    if held is not None:
        moving = [moving[1 - held]]
    value = moving[0][0]
    bases = {one.base, *(value.base for _, value in call.factors_of(first) or () if value)}
    gate = quotient and other.kind == "exp" and other.base not in bases and not of_scores(call, other)
    if gate and not other.made_from(one):
        return call.make(call.values, None)  # such as b / (1 + exp(-a)), whose gate has a gradient
    alone = held is not None and (quotient or one.base == other.base or _weighs(one, other))
    inputs = [value] if alone and (not gate or _gates(other, one)) else [one, other]
    shapes, sources, shape = [v.shape for v in inputs], [v for v, _ in moving], call.out.shape
    keep = call.tape.keeper.keep
    gates = [keep(1 / factor if quotient else factor) for _, factor in moving] if call.linearized else []

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0] / len(gates)
        return [fitted(g * gate.tensor, v.shape) for gate, v in zip(gates, sources, strict=True)]

    found = call.make(
        inputs,
        lambda r: [fitted(scaled(r[0], 1 / len(shapes)), s) for s in shapes],
        gradient,
        sources=sources,
        axes=lambda of: reduce(ax.merged, (ax.broadcast(axes, shape) for axes in of)),
    )
    found.tokens = call.tape.combined(found, [one, other])
    if one.base == other.base and one.shape == other.shape:
        found.base, found.proportional = one.base, False
    if rows is not None:
        found.kind, found.softmax_over = "weights", value.softmax_over
        if value.softmax_over is None:
            found.dim = reduced(shape, pairs[rows][1])
    elif held is not None and value.kind in ("size", "scores", "weights"):
        found.kind = value.kind
    return found


def _scales(weights: Value, sizes: Sequence[int]) -> bool:
    """Return whether a factor scales rows or columns of weights as a whole, as gates and sums of rows do.

    Its sizes are 1 in the dimensions along which it is equal.
    """
    return weights.kind in WEIGHING and bool(repeated(sizes, weights.shape))


def _weighs(one: Value, other: Value) -> bool:
    """Return whether one of two factors weights the other or is a size."""
    kinds = any(value.kind in (*WEIGHING, "size") for value in (one, other))
    return kinds or _gates(one, other) or _gates(other, one)


def _gates(gate: Value, content: Value) -> bool:
    """Return whether a factor weights channels of a token together, such as those of a head."""
    return not {*(repeated(gate.shape, content.shape) or ())}.isdisjoint(ax.channel_dims(content.axes))


def _is_sum(exponentials: Tensor, divisor: Tensor) -> bool:
    """Return whether a divisor is the sum of exponentials over the dimensions in which it is alike."""
    dims = repeated(core(divisor).shape, exponentials.shape)
    return bool(dims) and bool(alike(exponentials.detach().sum(dims, keepdim=True) / divisor.detach(), 1))


def _held(call: Call, one: Value, other: Value) -> int | None:
    """Return which of two factors is held constant, 0 or 1; None if each counts half."""
    for kinds in (WEIGHING, ("size",)):
        if (one.kind in kinds) != (other.kind in kinds):
            return 0 if one.kind in kinds else 1
    for n, (gate, content) in enumerate(((one, other), (other, one))):
        if _gates(gate, content):
            return n
    for n, (made, of) in enumerate(((one, other), (other, one))):
        whole = call.tape.source_of(of)
        permuted = of.shape.numel() == whole.shape.numel() and made.made_from(whole)
        if permuted or made.ancestors >> of.number & 1:
            return n
    if one.base == other.base:
        return 0 if other.proportional and not one.proportional else 1
    if other.ancestors >> one.base & 1:
        return 1
    return 0 if one.ancestors >> other.base & 1 else None

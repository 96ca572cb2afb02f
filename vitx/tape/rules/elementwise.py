"""Elementwise functions of one value, and elementwise products and quotients of two.

A function of one value gives it all relevance, and its gate is held constant in the linearized network:
y = x * gate + f(0), where gate = (f(x) - f(0)) / x.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.call import Call, Transpose, tensors_in
from vitx.tape.expanded import core, fitted, scaled
from vitx.tape.registry import rule, unknown
from vitx.tape.rules.attention import normalized
from vitx.tape.sums import as_number
from vitx.tape.values import Value, reduced

SIZES = ("rsqrt", "reciprocal")
SAME_KIND = ("clamp", "clamp_min", "clamp_max", "nan_to_num", "abs")

Around0 = tuple[float | None, float]  # value of a function at 0, if finite, and slope
_KNOWN: dict[tuple[str, int, str], Around0] = {}  # of functions of one tensor, with their other arguments
_NEAR_0, _KINK = 1e-4, 1e-2  # a step from 0; a difference of slopes that makes a kink


@rule("hardswish", "_prelu_kernel", "log_sigmoid_forward")
def gated(call: Call, *, size: bool = False) -> list[Value]:
    """Record an activation, or any other function of one value, which may be a measure of size."""
    if len({id(tensor) for tensor, _ in call.live}) != 1:
        return unknown(call)
    tensor, value = call.live[0]
    before, exponent = value.shape, call["exponent"]
    size = size or call.name in SIZES
    size = size or (call.name == "pow" and bool(torch.as_tensor(exponent).lt(0).any()))
    of_scores = call.tape.values[value.base].kind == "scores"
    activation = size and value.kind == "exp" and not of_scores  # such as 1 / (1 + exp(-x))
    size = size and not activation
    sources, gradient = _linearized(call, tensor, value, size) if call.linearized else ([value], None)
    same = before == call.out.shape
    found = call.make(
        *([value], lambda r: [fitted(r[0], before)], gradient),
        sources=sources,
        axes=(lambda of: of[0]) if same else None,
    )
    if same:
        found.base, found.proportional, found.tokens = value.base, False, value.tokens
    if value.kind == "size" or (size and value.kind not in ("scores", "exp")):
        found.kind = "size"
    elif call.name in ("exp", "exp2"):
        found.kind, found.softmax_over = "exp", value.softmax_over if same else None
    elif activation or (call.name, value.kind) == ("log", "exp"):
        pass
    elif value.kind in ("scores", "weights", "exp"):
        found.kind = value.kind if call.name in SAME_KIND else "weights"
    return [found]


def _linearized(call: Call, tensor: Tensor, value: Value, size: bool) -> tuple[list[Value], Any]:
    """Return where the gradient goes, and how: through the gate, and to the value at 0 as a constant."""
    out, tape = call.out.detach(), call.tape
    if value.kind == "scores" and call.name == "exp":
        return [], lambda _: []  # before a softmax, which ends the gradient
    if size:  # a constant, without a gate
        own = [tape.constant(out.clone())] if tape.accounts else []
        return own, lambda g: [g[0]] if own else []
    at_0, slope = _around_0(call, tensor)
    if at_0 is None:
        return [value], None  # such as a logarithm, which no gate makes linear
    x = tensor.detach()
    gate = ((out - at_0) if at_0 else out) / x
    gate = torch.where(x == 0, slope, gate) if gate.dtype.is_complex else gate.nan_to_num_(nan=slope)
    own = [tape.constant(out.new_tensor(at_0))] if tape.accounts and at_0 else []
    return [value, *own], lambda g: [fitted(g[0] * gate, value.shape), *(g[0].sum() for _ in own)]


def _around_0(call: Call, tensor: Tensor) -> Around0:
    """Return the value and the slope of a function at 0; the slope of a kink counts as 0."""
    given = [None if one is tensor else one for one in (*call.args, *call.kwargs.items())]
    alone = not tensors_in(*given)
    key = call.name, tensor.ndim, str(given) if alone else ""
    if not alone or key not in _KNOWN:
        device = "cpu" if alone else tensor.device  # this avoids waiting for a GPU
        point = torch.zeros((1,) * tensor.ndim, dtype=torch.float64, device=device)
        transpose = Transpose(call, [tensor], [point])
        values = transpose.at_0([point])
        # By finite differences: autograd is off while a call is recorded.
        below, above = (transpose.at([point + by]) for by in (-_NEAR_0, _NEAR_0))
        left, right = ((one.sum().item() / values.numel()) for one in (values - below, above - values))
        lowest, highest = (one.item() for one in values.aminmax())
        at_0 = highest if lowest == highest else math.nan
        smooth = abs(left - right) < _KINK * _NEAR_0  # and neither is infinite or NaN
        slope = (left + right) / 2 / _NEAR_0 if smooth else 0.0
        _KNOWN[key] = at_0 if math.isfinite(at_0) else None, slope
    return _KNOWN[key]


@rule("_softmax", "_safe_softmax", "softmax", "_log_softmax", "log_softmax")
def softmax(call: Call) -> list[Value]:
    """Record a softmax or its logarithm: as weights, or by its derivative if a score is read from it."""
    tape, (tensor, value), y = call.tape, call.live[0], call.out.detach()
    dim, logarithm = call["dim"] % max(1, y.ndim), "log" in call.name

    def transposed(g: Tensor) -> Tensor:
        return g if logarithm else y * (g - (g * y).sum(dim, keepdim=True))

    own = []
    if tape.accounts and value.kind != "scores":  # whose softmax weights values, and ends the gradient
        own = [tape.constant(y - transposed(tensor.to(y.dtype)))]

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        return [transposed(arrived[0]), *(arrived[0] for _ in own)]

    found = call.make([value], lambda r: [r[0]], gradient, sources=[value, *own], axes=lambda of: of[0])
    found.kind, found.dim = value.kind if logarithm else "weights", dim
    return [found]


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
        found = _product(call, first, second)
        if first.numel() and second.numel():
            call.factors = [(first, one), (second, other)]
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
    if isinstance(factor, (int, float)) and factor == 0:
        return call.tape.constant(call.out.clone() if call.tape.accounts else None, shape)
    if isinstance(factor, Tensor) and not factor.is_floating_point():
        factor = factor.to(call.out.dtype)
    found = call.make(
        [value],
        lambda r: [fitted(r[0], before)],
        lambda g: [fitted(g[0] * factor, before)],
        axes=lambda of: ax.broadcast(of[0], shape),
    )
    if before == shape:
        found.rearranges, found.base, found.proportional = value.rearranges, value.base, value.proportional
        found.times, found.reads, found.adds = value.times * as_number(factor), value.reads, value.adds
        found.sum, found.via, found.fan, found.mass = value.sum, value.via, value.fan, mass
        found.tokens = value.tokens
    found.kind = value.kind
    if not isinstance(factor, Tensor):
        found.softmax_over = value.softmax_over
    elif factor.numel() > 1 and call.weighs(factor, lambda: found.axes, _along(factor, shape)):
        kept = call.tape.keeper.keep(factor)
        found.mass = lambda: kept.tensor.abs() * (1 if mass is None else mass())
    return found


def _along(factor: Tensor, shape: Sequence[int]) -> list[int]:
    """Return the dimensions of a shape along which a factor that broadcasts to it varies."""
    return [dim + len(shape) - factor.ndim for dim, size in enumerate(factor.shape) if size > 1]


def _product(call: Call, first: Tensor, second: Tensor, *, quotient: bool = False) -> Value:
    """Record a product or quotient of two live values that is not summed.

    A factor that weights the other, scales rows of weights or is a size is held constant, without relevance.
    One computed from the other is held, too, and shares the relevance unless it is elementwise. Otherwise,
    each counts half.
    """
    one, other = call.value(first), call.value(second)
    assert one is not None
    assert other is not None
    if one.kind == other.kind == "exp" and one.base != other.base:
        return call.make(call.values, None)  # the exponential of a sum
    pairs = [(one, other, core(second).shape), (other, one, core(first).shape)][: 1 if quotient else 2]
    rows = next((n for n, pair in enumerate(pairs) if _scales(*pair)), None)
    held = 1 if quotient else _held(one, other) if rows is None else 1 - rows
    moving = [(one, second), (other, first)]
    if held is not None:
        moving = [moving[1 - held]]
    value = moving[0][0]
    all_its_own = held is not None and (
        quotient or one.base == other.base or any(v.kind in (*WEIGHING, "size") for v in (one, other))
    )
    inputs = [value] if all_its_own else [one, other]
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
        axes=(lambda of: ax.broadcast(of[0], shape)) if all_its_own else None,
    )
    found.tokens = call.tape.combined(found, [one, other])
    if one.base == other.base and one.shape == other.shape:
        found.base, found.proportional = one.base, False
    if rows is not None:
        found.kind, found.softmax_over = "weights", value.softmax_over
        if value.softmax_over is None:
            found.dim = reduced(shape, pairs[rows][2])
    elif held is not None and value.kind in ("size", "scores", "weights"):
        found.kind = value.kind
    return found


def _scales(weights: Value, by: Value, shape: Sequence[int]) -> bool:
    """Return whether a factor scales rows of weights as a whole, as a gate or a sum of exponentials does.

    Its `shape` has size 1 in the dimensions along which it is equal.
    """
    sizes = (1,) * (len(weights.shape) - len(shape)) + tuple(shape)
    if weights.kind not in WEIGHING or len(sizes) > len(weights.shape):
        return False
    pairs = [*zip(sizes, weights.shape, strict=True)]
    same = [dim for dim, (size, of_weights) in enumerate(pairs) if size == 1 < of_weights]
    fits = all(size in (1, of_weights) for size, of_weights in pairs)
    return fits and (bool(same) if by.kind == "size" else weights.dim in same)


def _held(one: Value, other: Value) -> int | None:
    """Return which of two factors is held constant, 0 or 1; None if each counts half."""
    for kinds in (WEIGHING, ("size",)):
        if (one.kind in kinds) != (other.kind in kinds):
            return 0 if one.kind in kinds else 1
    for n, (made, of) in enumerate(((one, other), (other, one))):
        if made.ancestors >> of.number & 1:
            return n
    if one.base == other.base:
        return 0 if other.proportional and not one.proportional else 1
    if other.ancestors >> one.base & 1:
        return 1
    return 0 if one.ancestors >> other.base & 1 else None

"""Elementwise functions of one value.

A function of one value gives it all relevance, and its gate is held constant in the linearized network:
y = x * gate + f(0), where gate = (f(x) - f(0)) / x.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vitx.tape.call import Call, Transpose
from vitx.tape.expanded import fitted
from vitx.tape.overload import tensors_in
from vitx.tape.registry import rule, unknown
from vitx.tape.values import Value

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
    size = size or (call.name == "pow" and bool(torch.as_tensor(exponent, device="cpu").lt(0).any()))
    activation = size and value.kind == "exp" and not of_scores(call, value)  # such as 1 / (1 + exp(-x))
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
        if value.mass is not None and _around_0(call, tensor)[0] == 0:
            found.mass = value.mass  # padding stays 0
    if value.kind == "size" or (size and value.kind not in ("scores", "exp")):
        found.kind = "size"
    elif call.name in ("exp", "exp2"):
        found.kind, found.softmax_over = "exp", value.softmax_over if same else None
    elif activation or (call.name, value.kind) == ("log", "exp"):
        pass
    elif value.kind in ("scores", "weights", "exp"):
        relu = call.name.startswith("clamp") and call["min"] == 0 and value.kind == "scores"
        found.kind = value.kind if call.name in SAME_KIND and not relu else "weights"
    return [found]


def of_scores(call: Call, value: Value) -> bool:
    """Return whether a value is an elementwise function of scores."""
    return call.tape.values[value.base].kind == "scores"


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
    tape, (tensor, value), kept = call.tape, call.live[0], call.tape.keeper.keep(call.out)
    dim, logarithm = call["dim"] % max(1, call.out.ndim), "log" in call.name

    def transposed(g: Tensor) -> Tensor:
        y = kept.tensor
        return g if logarithm else y * (g - (g * y).sum(dim, keepdim=True))

    own = []
    if tape.accounts and value.kind != "scores":  # whose softmax weights values, and ends the gradient
        own = [tape.constant(call.out - transposed(tensor.to(call.out.dtype)))]

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        return [transposed(arrived[0]), *(arrived[0] for _ in own)]

    found = call.make([value], lambda r: [r[0]], gradient, sources=[value, *own], axes=lambda of: of[0])
    found.kind, found.dim = value.kind if logarithm else "weights", dim
    return [found]

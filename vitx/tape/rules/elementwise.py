"""Functions of one value, element by element: all relevance is its own, and the gate is held.

y = x * (f(x) / x) + f(0), in which the gate f(x) / x is a constant of the linearised network.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vitx.tape.call import Call, Transpose, rule
from vitx.tape.expanded import fitted
from vitx.tape.values import Value

GATED = """gelu relu silu sigmoid tanh erf log sqrt rsqrt pow abs elu reciprocal hardswish leaky_relu
hardsigmoid softplus mish celu sin cos tan asin acos atan sinh cosh asinh acosh atanh expm1 log1p
log2 log10 exp exp2 erfc erfinv hardtanh hardshrink softshrink _prelu_kernel threshold
log_sigmoid_forward logit clamp clamp_min clamp_max nan_to_num xlogy i0 round floor ceil trunc
frac sign sgn fmod remainder hypot atan2""".split()  # noqa: SIM905
SIZES = ("rsqrt", "reciprocal")
SAME_KIND = ("clamp", "clamp_min", "clamp_max", "nan_to_num", "abs")

Around0 = tuple[float | None, float | None]  # value and slope of a function at 0, if it has some
_KNOWN: dict[
    tuple[str, int, str] | None, Around0
] = {}  # of those of one tensor, with all else they are given


@rule(*GATED)
def gated(call: Call, *, size: bool = False) -> list[Value]:
    """Follows an activation, or any other function of one value, which may say how large something is."""
    if len({id(t) for t, _ in call.live}) != 1:
        return call.make_all(call.values, None)
    tensor, value = call.live[0]
    before, exponent = value.shape, call["exponent"]
    size = size or call.name in SIZES
    size = size or (call.name == "pow" and bool(torch.as_tensor(exponent).lt(0).any()))
    sources, gradient = _linearised(call, tensor, value, size) if call.linearised else ([value], None)
    same = before == call.out.shape
    found = call.make(
        *([value], lambda r: [fitted(r[0], before)], gradient),
        sources=sources,
        axes=(lambda of: of[0]) if same else None,
    )
    if same:
        found.base, found.proportional, found.place = value.base, False, value.place
    if call.name in ("exp", "exp2"):
        found.kind, found.dim = ("weights", value.dim) if value.kind == "log" else ("exp", None)
    elif call.name == "log" and (value.total is not None or value.kind == "exp"):
        found.kind = None if value.total is None else "normalizer"
    else:
        if value.kind == "size" or (size and value.kind not in ("scores", "exp")):
            found.kind = "size"
        elif value.kind in ("scores", "weights", "exp"):
            found.kind = value.kind if call.name in SAME_KIND else "weights"
        found.total = value.total if found.kind is not None or call.name in SAME_KIND else None
    return [found]


def _linearised(call: Call, tensor: Tensor, value: Value, size: bool) -> tuple[list[Value], Any]:
    """Returns where the gradient goes, and how: by the gate, and to what is not 0 at 0."""
    out, tape = call.out.detach(), call.tape
    if value.kind == "scores" and call.name == "exp":
        return [], lambda _: []  # on the way to a softmax, which ends the gradient
    if size:  # no gate: a constant
        own = [tape.constant(out.clone())] if tape.accounts else []
        return own, lambda g: [g[0]] if own else []
    at_0, slope = _around_0(call, tensor)
    if at_0 is None or slope is None:
        return [value], None  # as a logarithm, which no gate makes linear
    x = tensor.detach()
    gate = ((out - at_0) if at_0 else out) / x
    gate = torch.where(x == 0, slope, gate) if gate.dtype.is_complex else gate.nan_to_num_(nan=slope)
    own = [tape.constant(out.new_tensor(at_0))] if tape.accounts and at_0 else []
    before = value.shape

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0]
        return [fitted(g * gate, before), *([g.sum()] if own else [])]

    return [value, *own], gradient


def _around_0(call: Call, tensor: Tensor) -> Around0:
    """Returns value and slope of a function at 0; None where it has none."""
    given = [None if one is tensor else one for one in (*call.args, *call.kwargs.items())]
    alone = not any(isinstance(one, Tensor) for one in (*given, *call.kwargs.values()))
    known = (call.name, tensor.ndim, str(given)) if alone else None
    if known in _KNOWN:
        return _KNOWN[known]
    device = "cpu" if alone else tensor.device  # a GPU would have to be waited for
    point = torch.zeros((1,) * tensor.ndim, dtype=torch.float64, device=device)
    transpose = Transpose(call, [tensor], [point])
    values = transpose.at_0([point])
    (slope,) = transpose([torch.ones_like(values)])
    at_0 = values.amax().item() if bool((values == values.amax()).all()) else math.nan
    of_slope = 0.0 if slope is None else slope.sum().item() / values.numel()
    found = at_0 if math.isfinite(at_0) else None, of_slope if math.isfinite(of_slope) else None
    if known is not None:
        _KNOWN[known] = found
    return found


@rule("glu")
def glu(call: Call) -> list[Value]:
    """Follows half of a value times a gate of the other half: each has its share."""
    (tensor, value), dim = call.live[0], call["dim"]
    gate = tensor.detach().chunk(2, dim)[1].sigmoid()

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        return [torch.cat([arrived[0] * gate, torch.zeros_like(gate)], dim)]

    return [call.make([value], lambda r: [torch.cat([r[0], r[0]], dim) / 2], gradient)]


@rule("_softmax", "_safe_softmax", "softmax", "_log_softmax", "log_softmax")
def softmax(call: Call) -> list[Value]:
    """Follows a softmax or its logarithm: weights, or to first order where a score is read."""
    tape, (tensor, value), y = call.tape, call.live[0], call.out.detach()
    dim, logarithm = call["dim"] % max(1, y.ndim), "log" in call.name

    def transposed(g: Tensor) -> Tensor:
        return g if logarithm else y * (g - (g * y).sum(dim, keepdim=True))

    own = []
    if tape.accounts and value.kind != "scores":  # whose weights meet values, and end the gradient
        own = [tape.constant(y - transposed(tensor.to(y.dtype)))]

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        return [transposed(arrived[0]), *(arrived[0] for _ in own)]

    found = call.make([value], lambda r: [r[0]], gradient, sources=[value, *own], axes=lambda of: of[0])
    found.kind, found.dim = "log" if logarithm else "weights", dim
    return [found]


@rule("logsumexp")
def logsumexp(call: Call) -> list[Value]:
    """Follows the logarithm of a sum of exponentials, by which x is normalized."""
    found = call.make(call.values, None)
    found.kind = "normalizer"
    return [found]

"""Activations in the linearised network: x times a gate, which is a constant on the way back."""

import inspect
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitx.models.isolation import without_autocast
from vitx.relevance.linear import Held, constant, linear
from vitx.relevance.live import Live, Watched
from vitx.relevance.names import Function, argument, named

# Activations: what is not 0 at 0 there is a constant that they add.
GATED = named(
    *("gelu", "silu", "silu_", "mish", "hardswish", "hardswish_", "tanh", "tanh_", "softsign", "elu", "elu_"),
    *("selu", "selu_", "celu", "celu_", "erf", "square", "tanhshrink", "softplus", "sigmoid", "sigmoid_"),
    *("hardsigmoid", "logsigmoid", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clip", "clamp_min"),
    *("clamp_max",),
)


def _gated(watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]) -> Any:
    """An activation: x times a constant gate."""
    x, rest = args[0], dict(kwargs)
    others, place = args[1:], _place_of_in_place(func)
    in_place = rest.pop("inplace", False) or func.__name__.endswith("_")
    if place is not None and len(args) > place:  # as nn.Hardswish gives it
        in_place, others = args[place], args[1:place]
    if in_place:
        return x.copy_(_gate(watched, func, x.clone(), others, rest))
    return _gate(watched, func, x, others, rest)


@lru_cache
def _place_of_in_place(func: Function) -> int | None:
    """Where an activation takes `inplace`; None: nowhere, or it is no function of Python."""
    try:
        names = list(inspect.signature(func).parameters)
    except ValueError:
        return None
    return names.index("inplace") if "inplace" in names else None


def _gate(
    watched: Watched, func: Function, x: Tensor, args: Sequence[Any], options: dict[str, Any]
) -> Tensor:
    with torch.no_grad():
        value = func(x.detach().clone() if func.__name__.endswith("_") else x.detach(), *args, **options)
        at_0, slope = _around_0(func, tuple(args), tuple(options.items()))
        gate = ((value - at_0) if at_0 else value) / x
        gate.nan_to_num_(nan=slope)
    adds = watched.added(x.new_tensor(at_0)) if at_0 else None
    return linear(x, value, lambda gradient: gradient * gate, adds)


@lru_cache
def _around_0(
    func: Function, args: tuple[Any, ...], options: tuple[tuple[str, Any], ...]
) -> tuple[float, float]:
    """Returns value and slope of an activation at 0."""
    with torch.enable_grad(), without_autocast(torch.device("cpu")):
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        value = func(x.clone(), *args, **dict(options))
        (slope,) = torch.autograd.grad(value, x)
    return value.item(), slope.item()


def _power(watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]) -> Any:
    """A positive power is an activation, another one a scale."""
    exponent = argument(args, kwargs, 1, "exponent")
    if not isinstance(exponent, (int, float)) or not exponent > 0 or not math.isfinite(exponent):
        return constant(watched, func, args, kwargs, live)
    x = args[0]
    with torch.no_grad():
        gate = x.detach() ** (exponent - 1)
        value = func(x.detach(), exponent)
    return linear(x, value, lambda gradient: gradient * gate)


def _glu(watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]) -> Tensor:
    """`glu`: half of it times a constant gate."""
    x = args[0]
    dim = argument(args, kwargs, 1, "dim", -1)
    with torch.no_grad():
        value = func(*args, **kwargs)
        gate = x.chunk(2, dim)[1].sigmoid()
    return linear(x, value, lambda g: torch.cat([g * gate, torch.zeros_like(g)], dim))


RULES: dict[Function, Held] = {
    **dict.fromkeys(GATED, _gated),
    **dict.fromkeys(named("pow", "__pow__"), _power),
    F.glu: _glu,
}

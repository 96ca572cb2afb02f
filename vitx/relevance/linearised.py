"""The linearised network: the forward values as they are, differentiated as if they were a linear map.

On the way back these are constants: attention, the scale of each norm, the gate of each activation
(y = x * (act(x) / x)), what a tensor is multiplied with if it was made of that very tensor, and each factor
of another product in its turn, halved. A saturated score has little gradient, and in odd places; in this
network what all parts add to the score, biases among them, sums to it exactly.

Sources: Ali et al. 2022 (arXiv 2202.07304), Achtibat et al. 2024 (arXiv 2402.05602), Mehri et al. 2025 (arXiv
2411.16760).
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vitx.models.isolation import without_autocast
from vitx.relevance.names import (
    ADDED,
    CONVOLUTIONS,
    DIVIDED,
    JOINED,
    MULTIPLIED,
    PRODUCTS,
    SOFTMAX,
    SUBTRACTED,
    Function,
    argument,
    named,
    replaced,
    tensors,
)

if TYPE_CHECKING:
    from vitx.relevance.shadow import Live, Shadow

Held = Callable[["Shadow", Function, Any, dict[str, Any], list["Live"]], Any]

# Activations: what is not 0 at 0 there is a constant that they add.
GATED = named(
    *("gelu", "silu", "silu_", "mish", "hardswish", "hardswish_", "tanh", "tanh_", "softsign", "elu", "elu_"),
    *("selu", "selu_", "celu", "celu_", "erf", "square", "tanhshrink", "softplus", "sigmoid", "sigmoid_"),
    *("hardsigmoid", "logsigmoid", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clip", "clamp_min"),
    *("clamp_max",),
)
TRANSPOSED = named("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
SUMS = ADDED | SUBTRACTED | named("rsub", "__rsub__")
# Never what a tensor holds, but how large it is.
SCALES = named("rsqrt", "reciprocal", "var", "std", "norm", "vector_norm")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        constant: Tensor | None,
        value: Callable[[], Tensor],
        back: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.set_materialize_grads(False)  # else a way back of relevance alone would compute with zeros
        ctx.back, ctx.dtype = back, x.dtype
        ctx.adds = None if constant is None else constant.shape
        return value()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        adds = gradient.sum_to_size(ctx.adds) if ctx.needs_input_grad[1] else None
        into = ctx.back(gradient).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return into, adds, None, None


def _linear(
    x: Tensor, value: Tensor, back: Callable[[Tensor], Tensor], constant: Tensor | None = None
) -> Tensor:
    """A value as a linear function of x, whose transpose is known, and a constant, where that counts."""
    found: Tensor = _Linear.apply(x, constant, lambda: value, back)
    return found


def _gated(watched: "Shadow", func: Function, args: Any, kwargs: dict[str, Any], live: list["Live"]) -> Any:
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
    watched: "Shadow", func: Function, x: Tensor, args: Sequence[Any], options: dict[str, Any]
) -> Tensor:
    with torch.no_grad():
        value = func(x.detach().clone() if func.__name__.endswith("_") else x.detach(), *args, **options)
        at_0, slope = _around_0(func, tuple(args), tuple(options.items()))
        gate = ((value - at_0) if at_0 else value) / x
        gate.nan_to_num_(nan=slope)
    adds = watched.added(x.new_tensor(at_0)) if at_0 else None
    return _linear(x, value, lambda gradient: gradient * gate, adds)


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


def _layer_norm(
    watched: "Shadow", func: Function, args: Any, kwargs: dict[str, Any], live: list["Live"]
) -> Tensor:
    """`layer_norm` and `rms_norm`: all but the scale is linear."""
    x = args[0]
    given = dict(zip(_LAYER_NORM if func in CENTRED else _RMS_NORM, args, strict=False)) | kwargs
    dims = tuple(range(-len(given["normalized_shape"]), 0))
    with torch.no_grad():
        value = func(*args, **kwargs)
        wide, eps = x.to(value.dtype), given.get("eps")
        if func in CENTRED:  # which kernels know better than one reads it off the tensor
            shape = list(given["normalized_shape"])
            scale = torch.native_layer_norm(wide, shape, None, None, 1e-5 if eps is None else eps)[2]
        else:
            eps = torch.finfo(wide.dtype).eps if eps is None else eps
            scale = (wide.square().mean(dims, keepdim=True) + eps).rsqrt()
        if given.get("weight") is not None:
            scale = scale * given["weight"]

    def back(gradient: Tensor) -> Tensor:
        scaled = gradient * scale
        return scaled - scaled.mean(dims, keepdim=True) if func in CENTRED else scaled

    return _linear(x, value, back, watched.added(given.get("bias")))


CENTRED = named("layer_norm")
_LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps")
_RMS_NORM = ("input", "normalized_shape", "weight", "eps")


def _group_norm(
    watched: "Shadow", func: Function, args: Any, kwargs: dict[str, Any], live: list["Live"]
) -> Tensor:
    """`group_norm`, and `instance_norm`, in which each channel is a group: all but the scale is linear."""
    given = dict(zip(_GROUP_NORM if func in GROUPED else _INSTANCE_NORM, args, strict=False)) | kwargs
    x, weight, bias = given["input"], given.get("weight"), given.get("bias")
    if given.get("running_mean") is not None and not given.get("use_input_stats", True):
        return _batch_norm(watched, func, args, kwargs, live)
    groups = given.get("num_groups", x.shape[1])
    with torch.no_grad():
        value = func(*args, **kwargs)
        apart = x.to(value.dtype).unflatten(1, (groups, -1))
        dims = tuple(range(2, apart.ndim))
        eps = given.get("eps", 1e-5)
        scale = (apart.var(dims, unbiased=False, keepdim=True) + eps).rsqrt()

    def back(gradient: Tensor) -> Tensor:
        if weight is not None:
            gradient = gradient * _along_channels(weight, x)
        scaled = gradient.unflatten(1, (groups, -1)) * scale
        centred: Tensor = scaled - scaled.mean(dims, keepdim=True)
        return centred.flatten(1, 2)

    return _linear(x, value, back, watched.added(None if bias is None else _along_channels(bias, x)))


GROUPED = named("group_norm")
_GROUP_NORM = ("input", "num_groups", "weight", "bias", "eps")
_STATISTICS = ("input", "running_mean", "running_var", "weight", "bias")
_INSTANCE_NORM = (*_STATISTICS, "use_input_stats", "momentum", "eps")
_BATCH_NORM = (*_STATISTICS, "training", "momentum", "eps")


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *(1 for _ in x.shape[2:]))


def _batch_norm(
    watched: "Shadow", func: Function, args: Any, kwargs: dict[str, Any], live: list["Live"]
) -> Tensor:
    """A norm with the statistics of the training: linear, and a constant."""
    given = dict(zip(_BATCH_NORM, args, strict=False)) | kwargs
    mean, spread = given.get("running_mean"), given.get("running_var")
    if given.get("training") or mean is None or spread is None:
        return func(*args, **kwargs)  # type: ignore[no-any-return]
    x = given["input"]
    with torch.no_grad():
        value = func(*args, **kwargs)
        scale = (spread + given.get("eps", 1e-5)).rsqrt()
        scale = scale if given.get("weight") is None else scale * given["weight"]
        constant = -mean * scale if given.get("bias") is None else given["bias"] - mean * scale
        scale, constant = (_along_channels(t, x) for t in (scale, constant))
    return _linear(x, value, lambda gradient: gradient * scale, watched.added(constant))


def _biased(watched: "Shadow", func: Function, args: Any, kwargs: dict[str, Any], live: list["Live"]) -> Any:
    """A linear map or a convolution, whose bias is a constant."""
    if "bias" in kwargs:
        return func(*args, **kwargs | {"bias": watched.added(kwargs["bias"])})
    if len(args) > 2:
        args = (*args[:2], watched.added(args[2]), *args[3:])
    return func(*args, **kwargs)


def _added(watched: "Shadow", func: Function, args: Any, kwargs: dict[str, Any], live: list["Live"]) -> Any:
    """What is added to what depends on the image, or stands beside it, is a constant."""

    def constant(value: Tensor) -> Any:
        return value if watched.get(value) is not None else watched.added(value)

    like = live[0].real()
    if (
        watched.accounts
        and func in SUMS
        and like is not None
        and like.dtype in (torch.float32, torch.float64)
    ):
        numbers = [isinstance(value, (int, float)) and place < 2 for place, value in enumerate(args)]
        pairs = zip(args, numbers, strict=True)
        args = tuple(like.new_tensor(value) if number else value for value, number in pairs)
    given, named = replaced((args, kwargs), constant)
    return func(*given, **named)


def _normalised(
    watched: "Shadow", func: Function, args: Any, kwargs: dict[str, Any], live: list["Live"]
) -> Tensor:
    """`normalize`: x over its length."""
    x = args[0]
    given = dict(zip(("input", "p", "dim", "eps"), args, strict=False)) | kwargs
    with torch.no_grad():
        value = func(*args, **kwargs)
        length = x.norm(given.get("p", 2.0), given.get("dim", 1), keepdim=True)
        length = length.clamp_min(given.get("eps", 1e-12))
    return _linear(x, value, lambda gradient: gradient / length)


def _log_softmax(
    watched: "Shadow", func: Function, args: Any, kwargs: dict[str, Any], live: list["Live"]
) -> Tensor:
    """`log_softmax`: x less a constant."""
    x = args[0]
    with torch.no_grad():
        value = func(*args, **kwargs)
        constant = watched.added(value - x)
    return _linear(x, value, lambda gradient: gradient, constant)


def _softmax(
    watched: "Shadow", func: Function, args: Any, kwargs: dict[str, Any], live: list["Live"]
) -> Tensor:
    """A `softmax` that is no attention, as of classes: to first order, where that counts."""
    if not watched.accounts or live[0].lineage.kind == "scores":
        return func(*args, **kwargs)  # type: ignore[no-any-return]
    x = args[0]
    dim = argument(args, kwargs, 1, "dim", -1)
    with torch.no_grad():
        value: Tensor = func(*args, **kwargs)

    def back(gradient: Tensor) -> Tensor:
        return value * (gradient - (gradient * value).sum(dim, keepdim=True))

    return _linear(x, value, back, watched.added(value - back(x.detach().to(value.dtype))))


def _multiplied(
    watched: "Shadow", func: Function, args: Any, kwargs: dict[str, Any], live: list["Live"]
) -> Any:
    """A product of two: a factor that was made of the other one is its gate; else each counts half."""
    if len(live) != 2 or not all(value.requires_grad for value in args[:2]):
        return func(*args, **kwargs)  # one is a constant already
    first, second = live
    if args[0] is args[1] or _made_of(args[1], second, args[0], first):
        return func(args[0], _held(args[1]), *args[2:], **kwargs)
    if _made_of(args[0], first, args[1], second):
        if func.__name__.endswith("_") or func.__name__.startswith("__i"):
            return args[0].copy_(_held(args[0]).clone() * args[1])
        return func(_held(args[0]), args[1], *args[2:], **kwargs)
    out: Tensor = func(*args, **kwargs)
    return _halved(out)


def _made_of(made: Tensor, live: "Live", of: Tensor, other: "Live") -> bool:
    """Whether a tensor was made of another one, and not of another part of what that is a part of."""
    if not other.lineage.identity <= live.lineage.ancestors:
        return False
    seen, waiting = {of.grad_fn}, [made.grad_fn]
    while waiting:
        node = waiting.pop()
        for before, output in () if node is None else node.next_functions:
            if before is of.grad_fn and output == of.output_nr:
                return True
            if before not in seen:
                seen.add(before)
                waiting.append(before)
    return False


def _halved(out: Tensor) -> Tensor:
    if out.requires_grad:
        out.register_hook(_half)
    return out


def _half(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient / 2  # None: a way back of relevance alone


def _held(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _divided(watched: "Shadow", func: Function, args: Any, kwargs: dict[str, Any], live: list["Live"]) -> Any:
    """A quotient: what divides is a scale."""
    return func(args[0], *(_held(value) for value in args[1:]), **kwargs)


def _constant(
    watched: "Shadow", func: Function, args: Any, kwargs: dict[str, Any], live: list["Live"]
) -> Any:
    given, named = replaced((args, kwargs), _held)
    return func(*given, **named)


def _product(watched: "Shadow", func: Function, args: Any, kwargs: dict[str, Any], live: list["Live"]) -> Any:
    """A matrix product of two that is no attention."""
    out = func(*args, **kwargs)
    return _halved(out) if len(live) == 2 and all(t.requires_grad for t in tensors(args)) else out


def _power(watched: "Shadow", func: Function, args: Any, kwargs: dict[str, Any], live: list["Live"]) -> Any:
    """A positive power is an activation, another one a scale."""
    exponent = argument(args, kwargs, 1, "exponent")
    if not isinstance(exponent, (int, float)) or not exponent > 0 or not math.isfinite(exponent):
        return _constant(watched, func, args, kwargs, live)
    x = args[0]
    with torch.no_grad():
        gate = x.detach() ** (exponent - 1)
        value = func(x.detach(), exponent)
    return _linear(x, value, lambda gradient: gradient * gate)


def _glu(watched: "Shadow", func: Function, args: Any, kwargs: dict[str, Any], live: list["Live"]) -> Tensor:
    """`glu`: half of it times a constant gate."""
    x = args[0]
    dim = argument(args, kwargs, 1, "dim", -1)
    with torch.no_grad():
        value = func(*args, **kwargs)
        gate = x.chunk(2, dim)[1].sigmoid()
    return _linear(x, value, lambda g: torch.cat([g * gate, torch.zeros_like(g)], dim))


RULES: dict[Function, Held] = {
    **dict.fromkeys(GATED, _gated),
    **dict.fromkeys(SCALES, _constant),
    **dict.fromkeys(CENTRED | named("rms_norm"), _layer_norm),
    **dict.fromkeys(GROUPED | named("instance_norm"), _group_norm),
    **dict.fromkeys(named("log_softmax"), _log_softmax),
    **dict.fromkeys(SOFTMAX, _softmax),
    **dict.fromkeys(named("normalize"), _normalised),
    **dict.fromkeys(named("batch_norm"), _batch_norm),
    **dict.fromkeys(SUMS | JOINED, _added),
    **dict.fromkeys(named("linear") | CONVOLUTIONS | TRANSPOSED, _biased),
    **dict.fromkeys(MULTIPLIED, _multiplied),
    **dict.fromkeys(DIVIDED, _divided),
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(named("pow", "__pow__"), _power),
    F.glu: _glu,
}

"""Norms in the linearised network: all but their scale, which is a constant on the way back."""

from typing import Any

import torch
from torch import Tensor

from vitx.relevance.linear import Held, constant, linear
from vitx.relevance.live import Live, Watched
from vitx.relevance.names import Function, named


def _layer_norm(
    watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]
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

    return linear(x, value, back, watched.added(given.get("bias")))


CENTRED = named("layer_norm")
_LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps")
_RMS_NORM = ("input", "normalized_shape", "weight", "eps")


def _group_norm(
    watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]
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

    return linear(x, value, back, watched.added(None if bias is None else _along_channels(bias, x)))


GROUPED = named("group_norm")
_GROUP_NORM = ("input", "num_groups", "weight", "bias", "eps")
_STATISTICS = ("input", "running_mean", "running_var", "weight", "bias")
_INSTANCE_NORM = (*_STATISTICS, "use_input_stats", "momentum", "eps")
_BATCH_NORM = (*_STATISTICS, "training", "momentum", "eps")


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *(1 for _ in x.shape[2:]))


def _batch_norm(
    watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]
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
    return linear(x, value, lambda gradient: gradient * scale, watched.added(constant))


def _normalised(
    watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]
) -> Tensor:
    """`normalize`: x over its length."""
    x = args[0]
    given = dict(zip(("input", "p", "dim", "eps"), args, strict=False)) | kwargs
    with torch.no_grad():
        value = func(*args, **kwargs)
        length = x.norm(given.get("p", 2.0), given.get("dim", 1), keepdim=True)
        length = length.clamp_min(given.get("eps", 1e-12))
    return linear(x, value, lambda gradient: gradient / length)


# Never what a tensor holds, but how large it is.
SCALES = named("rsqrt", "reciprocal", "var", "std", "norm", "vector_norm")

RULES: dict[Function, Held] = {
    **dict.fromkeys(CENTRED | named("rms_norm"), _layer_norm),
    **dict.fromkeys(GROUPED | named("instance_norm"), _group_norm),
    **dict.fromkeys(named("batch_norm"), _batch_norm),
    **dict.fromkeys(named("normalize"), _normalised),
    **dict.fromkeys(SCALES, constant),
}

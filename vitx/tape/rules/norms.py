"""Norms: all but their scale is linear, and the scale is held; and what says how large a value is."""

import math
from functools import partial
from typing import Any

from torch import Tensor

from vitx.tape.call import Call, rule, unknown
from vitx.tape.expanded import fitted
from vitx.tape.rules.reductions import dimensions, spread
from vitx.tape.values import Value


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> list[Value]:
    """Follows a norm over the last dimensions, centred or not."""
    weight, bias, scale = call.learned(call["weight"]), call.learned(call["bias"]), call.outs[-1]
    dims = tuple(range(-len(call["normalized_shape"]), 0))
    centred = call.name == "native_layer_norm"

    def back(g: Tensor) -> Tensor:
        g = g * scale if weight is None else g * weight * scale
        return g - g.mean(dims, keepdim=True) if centred else g

    return [_norm(call, back, bias)]


@rule("native_group_norm")
def group_norm(call: Call) -> list[Value]:
    """Follows a norm over groups of channels."""
    weight, bias = call.learned(call["weight"]), call.learned(call["bias"])
    scale, groups = call.outs[2], call["group"]
    shape = call.out.shape
    along = (1, -1, *[1] * (len(shape) - 2))

    def back(g: Tensor) -> Tensor:
        g = g if weight is None else g * weight.view(along)
        apart = g.reshape(shape[0], groups, -1) * scale.view(shape[0], groups, 1)
        return (apart - apart.mean(-1, keepdim=True)).reshape(shape)

    return [_norm(call, back, None if bias is None else bias.view(along))]


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit")
@rule("cudnn_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update", "miopen_batch_norm")
def batch_norm(call: Call) -> list[Value]:
    """Follows a norm with the statistics of the training, linear and a constant, or with those of a batch."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    mean, variance = call["running_mean"], call["running_var"]
    eps = call["eps"] if call["eps"] is not None else call["epsilon"]
    along = (1, -1, *[1] * (x.ndim - 2))
    if call["training"] or mean is None or variance is None:
        dims = [d for d in range(x.ndim) if d != 1]
        scale = (x.var(dims, unbiased=False, keepdim=True) + eps).rsqrt()
        scale = scale if weight is None else scale * weight.view(along)

        def centred(g: Tensor) -> Tensor:
            g = g * scale
            return g - g.mean(dims, keepdim=True)

        return [_norm(call, centred, None if bias is None else bias.view(along))]
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return [_norm(call, lambda g: g * scale.view(along), shift.view(along))]


def _norm(call: Call, back: Any, bias: Tensor | None) -> Value:
    value = call.value(call["input"])
    if value is None:
        return unknown(call)[0]
    own = [call.tape.constant(bias)] if call.tape.accounts and bias is not None else []

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        return [back(arrived[0]), *(fitted(arrived[0], o.shape) for o in own)]

    return call.make([value], lambda r: [r[0]], gradient, sources=[value, *own], axes=lambda of: of[0])


@rule("var", "std", "linalg_vector_norm", "norm", "var_mean", "std_mean")
def size(call: Call) -> list[Value]:
    """Follows what says how large a value is; a mean beside it is one."""
    shape, keepdim = call.values[0].shape, bool(call["keepdim"])
    dims = dimensions(call["dim"], len(shape))
    count = math.prod(shape[dim] for dim in dims)
    own = [call.tape.constant(call.out.clone())] if call.tape.accounts else []
    back = partial(spread, shape=shape, dims=dims, keepdim=keepdim, share=1 / count)

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        return [sum((back(r) for r in arrived[1:]), back(arrived[0]))]

    def gradient(arrived: list[Tensor]) -> list[Tensor | None]:
        return [back(arrived[1]) if len(arrived) > 1 else None, *(arrived[0] for _ in own)]

    found = call.make_all(call.values[:1], relevance, gradient, sources=[call.values[0], *own])
    found[0].kind = "size"
    return found

"""Norms: all but their scale is linear, and the scale is held; and what says how large a value is."""

from collections.abc import Sequence

from torch import Tensor

from vitx.tape.axes import dimensions
from vitx.tape.call import Call, rule, unknown
from vitx.tape.expanded import fitted, reshaped, spread
from vitx.tape.values import Value


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> list[Value]:
    """Follows a norm over the last dimensions, centred or not."""
    dims = (*range(-len(call["normalized_shape"]), 0),) if call.name == "native_layer_norm" else ()
    return _norm(call, call.outs[-1], dims)


@rule("native_group_norm")
def group_norm(call: Call) -> list[Value]:
    """Follows a norm over groups of channels."""
    shape, groups = call.out.shape, call["group"]
    along = (-1, *[1] * (len(shape) - 2))
    scale = call.outs[2].repeat_interleave(shape[1] // groups, 1).view(shape[0], *along)
    return _norm(call, scale, (-1,), along=along, apart=(shape[0], groups, -1))


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit")
@rule("cudnn_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update", "miopen_batch_norm")
def batch_norm(call: Call) -> list[Value]:
    """Follows a norm with the statistics of the training, linear and a constant, or with those of a batch."""
    x, mean, variance = call["input"], call["running_mean"], call["running_var"]
    eps = call["eps"] if call["eps"] is not None else call["epsilon"]
    along = (-1, *[1] * (x.ndim - 2))
    if call["training"] or mean is None or variance is None:
        dims = tuple(dim for dim in range(x.ndim) if dim != 1)
        scale = (x.var(dims, unbiased=False, keepdim=True) + eps).rsqrt()
        return _norm(call, scale, dims, along=along)
    return _norm(call, (variance + eps).rsqrt().view(along), along=along, mean=mean.view(along))


def _norm(
    call: Call,
    scale: Tensor,
    dims: tuple[int, ...] = (),
    *,
    along: Sequence[int] = (-1,),
    apart: Sequence[int] | None = None,
    mean: Tensor | None = None,
) -> list[Value]:
    """Follows a norm with this scale, centred over some dimensions, or by a mean that was learned.

    Weight and bias lie along some dimensions; those that are centred are apart in another shape.
    """
    value, tape = call.value(call["input"]), call.tape
    if value is None:
        return unknown(call)
    weight, bias = (call.learned(call[name]) for name in ("weight", "bias"))
    if len(along) > 1:
        weight, bias = (None if one is None else one.view(along) for one in (weight, bias))
    if mean is not None and tape.accounts:
        bias = (0 if bias is None else bias) - mean * scale * (1 if weight is None else weight)
    own = [tape.constant(bias)] if tape.accounts and bias is not None else []

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0]
        back = g * scale if weight is None else g * weight * scale
        if dims:
            parts = back if apart is None else back.reshape(apart)
            back = (parts - parts.mean(dims, keepdim=True)).reshape(g.shape)
        return [back, *(fitted(g, one.shape) for one in own)]

    found = call.make([value], lambda r: [r[0]], gradient, sources=[value, *own], axes=lambda of: of[0])
    tape.end(found, call.out, value)
    return [found]


@rule("var", "std", "linalg_vector_norm", "norm", "var_mean", "std_mean")
def size(call: Call) -> list[Value]:
    """Follows what says how large a value is; a mean beside it is one."""
    value, tape = call.values[0], call.tape
    shape, dims = value.shape, dimensions(call["dim"], len(value.shape))
    kept = [1 if dim in dims else size for dim, size in enumerate(shape)]
    own = [tape.constant(call.out.clone())] if tape.accounts else []

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        return [spread(reshaped(sum(arrived[1:], arrived[0]), kept), shape, dims)]

    def gradient(arrived: list[Tensor]) -> list[Tensor | None]:
        of_mean = spread(reshaped(arrived[1], kept), shape, dims) if len(arrived) > 1 else None
        return [of_mean, *(arrived[0] for _ in own)]

    found = call.make_all([value], relevance, gradient, sources=[value, *own])
    found[0].kind = "size"
    return found

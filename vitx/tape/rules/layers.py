"""Layers that torch runs as one operator: linear layers, convolutions and norms.

A linear layer divides relevance evenly among channels, a convolution also among the real pixels under a
window. A norm is linear except for its scale, which is held constant.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitx.tape import axes as ax
from vitx.tape.axes import dimensions
from vitx.tape.call import Call
from vitx.tape.contraction import across, of_matmul
from vitx.tape.expanded import fitted, reshaped, shared, spread, summed
from vitx.tape.registry import rule, unknown
from vitx.tape.rules.contractions import weighed
from vitx.tape.rules.sums import total
from vitx.tape.sums import may_close
from vitx.tape.tensors import Kept
from vitx.tape.values import Value

CONVOLUTIONS = (
    *("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "convolution_overrideable"),
)
OPTIONS = ("stride", "padding", "dilation", "transposed")
_NONE = 1e-6  # a smaller part of a window counts as none


@rule(*CONVOLUTIONS)
def convolved(call: Call) -> list[Value]:
    """Record a convolution: relevance goes evenly to the group's channels and real pixels of each window.

    If its weights are fixed, as in a blur, it goes in proportion to their size.
    """
    tensor = call["self"] if call["input"] is None else call["input"]
    weight, value, tape = call["weight"], call.value(tensor), call.tape
    if value is None or call.value(weight) is not None:
        return unknown(call)
    groups, size, shape, mass = call["groups"], weight.shape[2:], value.shape, value.mass
    stride, padding, dilation, transposed = (call[name] for name in OPTIONS)
    options = stride, padding, dilation, bool(transposed), call["output_padding"] or [0] * len(size)
    own = []
    if tape.accounts and call["bias"] is not None:
        own = [tape.constant(call.learned(call["bias"]).tensor.view(-1, *[1] * len(size)))]
    blind = tape.constant(None)  # gets the relevance of windows without real pixels
    fixed = call.tensors.origin(weight) == "fixed"
    kept = call.kept(weight) if fixed else call.learned(weight)
    if fixed and may_close(value, call.out.shape):
        return unknown(call)  # it may be the sum of a residual
    plain = mass is None and not transposed and not any(padding) and set(dilation) == {1}
    tiles = plain and tuple(stride) == size
    tiles = tiles and tuple(n * k for n, k in zip(call.out.shape[2:], size, strict=True)) == shape[2:]

    def back(g: Tensor, x: Tensor, kernel: Tensor, groups: int) -> Tensor:
        given = g.contiguous(), x, kernel.to(g.dtype), None, *options, groups, [True, False, False]
        found: Tensor = torch.ops.aten.convolution_backward(*given)[0]
        return found

    def to_channels(pixels: Tensor) -> Tensor:
        apart = (len(pixels), groups, shape[1] // groups, *shape[2:])
        return reshaped(spread(pixels[:, :, None], apart, [2]), shape)

    def relevance(arrived: list[Tensor]) -> list[Tensor | None]:
        r = arrived[0]
        if fixed:
            inside = r.new_ones(shape) if mass is None else mass().to(r).expand(shape)
            kernel = kept.tensor.abs().to(r)
            under: Tensor = torch.ops.aten.convolution(inside, kernel, None, *options, groups)
            share, unseen = shared(r, under, _NONE)
            return [back(share, inside, kernel, groups) * inside, unseen]
        r = summed(r.unflatten(1, (groups, -1)), [2])
        if tiles:  # as in the first layer of a ViT
            return [to_channels(F.interpolate((r / math.prod(size)).contiguous(), size=shape[2:])), None]
        one, inside = r.new_ones(1, 1, *size), r.new_ones(1, 1, *shape[2:])
        if mass is not None:
            inside = inside * mass().to(r).expand(shape).mean(1, keepdim=True)
        under = torch.ops.aten.convolution(inside, one, None, *options, 1)
        share, unseen = shared(r, under, _NONE)
        share = share.reshape(-1, 1, *r.shape[2:])
        x = r.new_empty(()).expand(len(share), 1, *shape[2:])
        pixels = back(share, x, one, 1).view(len(r), groups, *shape[2:]) * inside
        return [to_channels(pixels), unseen]

    def of_tiles(g: Tensor) -> Tensor:
        """Return the gradient of tiles by a matrix product, which takes a third of the time."""
        parts: Tensor = torch.tensordot(g, kept.tensor.to(g.dtype), ([1], [0]))
        channels = len(size) + 1
        pairs = [dim for n in range(1, channels) for dim in (n, channels + n)]  # a tile, a place inside
        return parts.permute(0, channels, *pairs).reshape(shape)

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0]
        found = of_tiles(g) if tiles and groups == 1 else back(g, g.new_empty(shape), kept.tensor, groups)
        return [found, *(fitted(g, one.shape) for one in own)]

    out = tuple(call.out.shape)
    found = call.make(
        [value, blind],
        relevance,
        gradient,
        sources=[value, *own],
        axes=lambda of: (of[0][0], ax.dimension(out[1], True), *ax.resized(of[0][2:], out[2:])),
    )
    pointwise = set(size) == set(stride) == {1}
    found.tokens = tape.combined(found, [value], *(() if pointwise else ("convolution", *size, str(options))))
    if value.kind in ("scores", "weights") and value.dim != 1 and (pointwise or value.kind == "weights"):
        found.kind, found.dim = value.kind, value.dim if pointwise else None  # heads are mixed
    return [found]


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> list[Value]:
    """Record a norm over the last dimensions, centered or not."""
    centered = range(-len(call["normalized_shape"]), 0) if call.name == "native_layer_norm" else ()
    return _norm(call, call.outs[-1], (*centered,))


@rule("native_group_norm")
def group_norm(call: Call) -> list[Value]:
    """Record a norm over groups of channels."""
    shape, groups = call.out.shape, call["group"]
    along = (-1, *[1] * (len(shape) - 2))
    scale = call.outs[2].repeat_interleave(shape[1] // groups, 1).view(shape[0], *along)
    return _norm(call, scale, (-1,), along=along, grouped=(shape[0], groups, -1))


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit")
@rule("cudnn_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update", "miopen_batch_norm")
def batch_norm(call: Call) -> list[Value]:
    """Record a norm with running statistics, which is linear plus a constant, or with those of the batch."""
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
    along: Sequence[int] | None = None,
    grouped: Sequence[int] | None = None,
    mean: Tensor | None = None,
) -> list[Value]:
    """Record a norm with this scale, centered over some dimensions of the groups, or by a running mean.

    `along` is the shape in which weight and bias broadcast to the input, by default in the last dimensions.
    """
    value, tape = call.value(call["input"]), call.tape
    if value is None:
        return unknown(call)
    weight, bias = (None if call[name] is None else call.learned(call[name]) for name in ("weight", "bias"))

    def wide(kept: Kept | None, instead: float) -> Tensor | float:
        if kept is None:
            return instead
        return kept.tensor if along is None else kept.tensor.view(along)

    added = wide(bias, 0)
    if mean is not None and tape.accounts:
        added = added - mean * scale * wide(weight, 1)
    own = [tape.constant(added)] if tape.accounts and isinstance(added, Tensor) else []

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0]
        back = g * scale if weight is None else (g * wide(weight, 1)).mul_(scale)
        if dims:
            parts = back if grouped is None else back.reshape(grouped)
            back = parts.sub_(parts.mean(dims, keepdim=True)).reshape(g.shape)
        return [back, *(fitted(g, one.shape) for one in own)]

    found = call.make([value], lambda r: [r[0]], gradient, sources=[value, *own], axes=lambda of: of[0])
    found.tokens = value.tokens
    if value.kind in ("scores", "weights"):  # heads are mixed by the norm
        found.kind, found.softmax_over = value.kind, value.softmax_over
    tape.end(found, call.out, value)
    return [found]


@rule("var", "std", "linalg_vector_norm", "norm", "var_mean", "std_mean")
def size(call: Call) -> list[Value]:
    """Record a measure of size, such as a variance; a mean that it also returns is followed as a mean."""
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


@rule("linear")
def linear(call: Call) -> list[Value]:
    """Record a linear layer as a whole."""
    (x, value), bias, weight = call.live[0], call["bias"], call["weight"]
    alike = not value.parts and value.rearranges not in call.tape.unlike
    if alike and value.kind is None and call.tensors.origin(weight) == "learned":
        product = _learned_layer(call, value, weight)
    else:
        matrix = weight.mT[(None,) * (x.ndim - 2)]
        call.tensors.of(matrix).origin = call.tensors.origin(weight)
        product = weighed(call, of_matmul((x, value), (matrix, None)))
    return [total(call, [(product, 1), (bias, 1)]) if bias is not None and call.tape.accounts else product]


def _learned_layer(call: Call, value: Value, weight: Tensor) -> Value:
    """Record learned weights on the channels of each token: a fast path of `weighed` for many steps."""
    shape, outward, matrix = value.shape, call.out.shape[-1], call.learned(weight)
    found = call.make(
        [value],
        lambda r: [spread(r[0], shape, [len(shape) - 1])],
        lambda g: [across(g[0], matrix.tensor)],
        axes=lambda of: (*of[0][:-1], ax.dimension(outward, True)),
    )
    found.fan, found.tokens = (shape[-1], value.rearranges), value.tokens
    return found


@rule("quantized::linear_dynamic", "quantized::linear_dynamic_fp16", "quantized::linear_relu_dynamic")
def quantized(call: Call) -> list[Value]:
    """Record a linear layer with integer weights; the error that rounding adds is a constant."""
    x, of_x = call.live[0]
    half = "fp16" in call.name
    unpack: Any = torch.ops.quantized.linear_unpack_fp16 if half else torch.ops.quantized.linear_unpack
    weight = unpack(call["W_prepack"])[0]
    weight = (weight.dequantize() if weight.is_quantized else weight.float()).mT
    wide = weight.view(*[1] * (x.ndim - 2), *weight.shape)
    product = weighed(call, of_matmul((x, of_x), (wide, None)))
    return [total(call, [(product, 1), (call.out - x @ weight if call.tape.accounts else 0, 1)])]

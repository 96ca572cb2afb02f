"""Convolutions, and linear layers of whole numbers."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitx.tape import axes as ax
from vitx.tape.call import Call, rule, unknown
from vitx.tape.expanded import fitted, scaled, summed
from vitx.tape.values import Value

CONVOLUTIONS = (
    *("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "convolution_overrideable"),
)
_NONE = 1e-6  # how much of a window counts as none


@rule(*CONVOLUTIONS)
def convolved(call: Call) -> list[Value]:
    """Follows a convolution: evenly to the group's channels and the real pixels under each window."""
    tensor = call["self"] if call["input"] is None else call["input"]
    weight, value, tape = call.learned(call["weight"]), call.value(tensor), call.tape
    if value is None or weight is None or call.value(call["weight"]) is not None:
        return unknown(call)
    groups, size = call["groups"], weight.shape[2:]
    options = (
        *(call["stride"], call["padding"], call["dilation"], bool(call["transposed"])),
        call["output_padding"] or [0] * len(size),
    )
    bias = call.learned(call["bias"])
    own = [tape.constant(bias.view(-1, *[1] * len(size)))] if tape.accounts and bias is not None else []
    blind = tape.constant(None)  # what windows have that see no real pixel
    shape, each, mass = value.shape, value.shape[1] // groups, value.mass

    def back(g: Tensor, x: Tensor, kernel: Tensor, groups: int) -> Tensor:
        part = torch.ops.aten.convolution_backward(
            *(g.contiguous(), x, kernel.to(g.dtype), None, *options, groups, [True, False, False])
        )
        found: Tensor = part[0]
        return found

    def to_channels(spread: Tensor) -> Tensor:
        whole = scaled(spread, 1 / each)[:, :, None].expand(-1, -1, each, *spread.shape[2:])
        return whole[:, 0] if groups == 1 else whole.flatten(1, 2)

    tiles = (
        *(mass is None, not call["transposed"], tuple(call["stride"]) == size, set(call["dilation"]) == {1}),
        tuple(n * k for n, k in zip(call.out.shape[2:], size, strict=True)) == shape[2:],
    )

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        r = summed(arrived[0].unflatten(1, (groups, -1)), [2])
        if all(tiles):  # as in the first layer of a ViT
            spread = F.interpolate(r.contiguous(), size=shape[2:]) / math.prod(size)
            return [to_channels(spread), r.new_zeros(())]
        one, inside = r.new_ones(1, 1, *size), r.new_ones(1, 1, *shape[2:])
        if mass is not None:
            inside = inside * mass().to(r).expand(shape).mean(1, keepdim=True)
        under: Tensor = torch.ops.aten.convolution(inside, one, None, *options, 1)
        seen = under > _NONE
        share = torch.where(seen, r / torch.where(seen, under, 1), 0)
        x = r.new_empty(()).expand(len(r) * groups, 1, *shape[2:])
        spread = back(share.reshape(-1, 1, *r.shape[2:]), x, one, 1).view(len(r), groups, *shape[2:]) * inside
        return [to_channels(spread), torch.where(seen, 0, r).sum()]

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0]
        found = back(g, g.new_empty(shape), weight, groups)
        return [found, *(fitted(g, o.shape) for o in own)]

    out = tuple(call.out.shape)
    found = call.make(
        [value, blind],
        relevance,
        gradient,
        sources=[value, *own],
        axes=lambda of: ax.channels_at(ax.resized(of[0], out), out, 1),
    )
    if set(size) == {1} and value.kind in ("scores", "weights") and value.dim != 1:  # heads are mixed
        found.kind, found.rounded = value.kind, True
        found.dim = value.dim
    return [found]


@rule("quantized::linear_dynamic", "quantized::linear_dynamic_fp16", "quantized::linear_relu_dynamic")
def quantized(call: Call) -> list[Value]:
    """Follows a linear layer whose weights are whole numbers."""
    tensor, tape = call["X"], call.tape
    shape, out = tensor.shape, tuple(call.out.shape)
    half = "fp16" in call.name
    unpack: Any = torch.ops.quantized.linear_unpack_fp16 if half else torch.ops.quantized.linear_unpack
    weight = unpack(call["W_prepack"])[0] if call.linearised else torch.empty(0)
    weight = weight.dequantize() if weight.is_quantized else weight.float()
    own = [tape.constant(call.out - tensor @ weight.mT)] if tape.accounts else []  # its bias, and rounding
    return [
        call.make(
            call.values,
            lambda r: [scaled(summed(r[0], [-1], keepdim=True), 1 / shape[-1]).expand(shape)],
            lambda g: [g[0] @ weight.to(g[0].dtype), *([g[0]] if own else [])],
            sources=[*call.values, *own],
            axes=lambda of: ax.channels_at(of[0], out, -1),
        )
    ]

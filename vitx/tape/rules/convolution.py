"""Convolutions: evenly to channels and the real pixels under a window."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vitx.tape import axes as ax
from vitx.tape.call import Call, rule, unknown
from vitx.tape.expanded import fitted, reshaped, spread, summed
from vitx.tape.values import Value

CONVOLUTIONS = (
    *("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "convolution_overrideable"),
)
OPTIONS = ("stride", "padding", "dilation", "transposed")
_NONE = 1e-6  # how much of a window counts as none


@rule(*CONVOLUTIONS)
def convolved(call: Call) -> list[Value]:
    """Follows a convolution: evenly to the group's channels and the real pixels under each window."""
    tensor = call["self"] if call["input"] is None else call["input"]
    weight, value, tape = call.learned(call["weight"]), call.value(tensor), call.tape
    if value is None or weight is None or call.value(call["weight"]) is not None:
        return unknown(call)
    groups, size, shape, mass = call["groups"], weight.shape[2:], value.shape, value.mass
    stride, padding, dilation, transposed = (call[name] for name in OPTIONS)
    options = stride, padding, dilation, bool(transposed), call["output_padding"] or [0] * len(size)
    bias = call.learned(call["bias"])
    own = [tape.constant(bias.view(-1, *[1] * len(size)))] if tape.accounts and bias is not None else []
    blind = tape.constant(None)  # what windows have that see no real pixel
    tiles = mass is None and not transposed and tuple(stride) == size and set(dilation) == {1}
    tiles = tiles and tuple(n * k for n, k in zip(call.out.shape[2:], size, strict=True)) == shape[2:]

    def back(g: Tensor, x: Tensor, kernel: Tensor, groups: int) -> Tensor:
        given = g.contiguous(), x, kernel.to(g.dtype), None, *options, groups, [True, False, False]
        found: Tensor = torch.ops.aten.convolution_backward(*given)[0]
        return found

    def to_channels(pixels: Tensor) -> Tensor:
        apart = (len(pixels), groups, shape[1] // groups, *shape[2:])
        return reshaped(spread(pixels[:, :, None], apart, [2]), shape)

    def relevance(arrived: list[Tensor]) -> list[Tensor | None]:
        r = summed(arrived[0].unflatten(1, (groups, -1)), [2])
        if tiles:  # as in the first layer of a ViT
            return [to_channels(F.interpolate(r.contiguous(), size=shape[2:]) / math.prod(size)), None]
        one, inside = r.new_ones(1, 1, *size), r.new_ones(1, 1, *shape[2:])
        if mass is not None:
            inside = inside * mass().to(r).expand(shape).mean(1, keepdim=True)
        under: Tensor = torch.ops.aten.convolution(inside, one, None, *options, 1)
        seen = under > _NONE
        share = torch.where(seen, r / torch.where(seen, under, 1), 0).reshape(-1, 1, *r.shape[2:])
        x = r.new_empty(()).expand(len(share), 1, *shape[2:])
        pixels = back(share, x, one, 1).view(len(r), groups, *shape[2:]) * inside
        return [to_channels(pixels), torch.where(seen, 0, r).sum()]

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0]
        return [back(g, g.new_empty(shape), weight, groups), *(fitted(g, one.shape) for one in own)]

    out = tuple(call.out.shape)
    found = call.make(
        [value, blind],
        relevance,
        gradient,
        sources=[value, *own],
        axes=lambda of: (of[0][0], ax.dimension(out[1], True), *ax.resized(of[0][2:], out[2:])),
    )
    if set(size) == {1} and value.kind in ("scores", "weights") and value.dim != 1:  # heads are mixed
        found.kind, found.dim, found.rounded = value.kind, value.dim, True
    return [found]

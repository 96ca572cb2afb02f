"""Convolutions: evenly to channels and the real pixels under a window."""

import math

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
        axes=lambda of: (of[0][0], ax.dimension(out[1], True), *ax.resized(of[0][2:], out[2:])),
    )
    if set(size) == {1} and value.kind in ("scores", "weights") and value.dim != 1:  # heads are mixed
        found.kind, found.rounded = value.kind, True
        found.dim = value.dim
    return [found]

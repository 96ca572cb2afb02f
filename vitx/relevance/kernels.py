"""Where relevance goes from what a kernel put out that slides over a picture, a film or a sequence."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vitx.relevance.rules import follow

_SUM: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_SPREAD: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


class Kernel(NamedTuple):
    """How a kernel slides.

    Attributes:
        size: along each dimension, as all that follow.
        stride: from one window to the next.
        padding: on both sides; takes nothing.
        dilation: from one position of the kernel to the next.
        groups: of channels.
    """

    size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int = 1

    def sums(self, values: Tensor) -> Tensor:
        """Sums what lies under each window, (B, 1, *size)."""
        one = values.new_ones(1, 1, *self.size)
        return _SUM[len(self.size)](values, one, None, self.stride, self.padding, self.dilation)

    def spreads(self, values: Tensor, output_padding: Sequence[int]) -> Tensor:
        """Gives what each window has, (B, 1, *windows), to all that lies under it."""
        one = values.new_ones(1, 1, *self.size)
        spread = _SPREAD[len(self.size)]
        return spread(values, one, None, self.stride, self.padding, output_padding, 1, self.dilation)

    def left_over(self, size: Sequence[int], windows: Sequence[int]) -> list[int]:
        """Returns how many positions lie behind the last window; below 0 if that reaches over the edge."""
        reach = [(k - 1) * d + 1 for k, d in zip(self.size, self.dilation, strict=True)]
        sizes = zip(size, self.padding, reach, windows, self.stride, strict=True)
        return [length + 2 * p - r - (n - 1) * s for length, p, r, n, s in sizes]

    def tiles(self, left: Sequence[int]) -> bool:
        """Whether each position lies under exactly one window."""
        return not any(self.padding) and not any(left) and list(self.size) == list(self.stride)


def convolved(
    kernel: Kernel, shadow: Tensor, shape: Sequence[int], inside: Tensor | None, own: Tensor
) -> Tensor:
    """A convolution: evenly to the group's channels and the real positions under each window.

    Args:
        kernel: how it slides.
        shadow: of its input, (B, C, *size), or (B, 1, *size) where only the sum over its channels counts.
        shape: of its output; its shadow is thin where there are no groups.
        inside: 1 where the input is real, 0 where the model padded it before, (1, 1, *size); None: all is
            real.
        own: the model's own share of each image, (B,): what windows get that see nothing but padding.
    """
    whole = shadow.shape
    size = list(whole[2:])
    groups, put_out = _groups(kernel, whole, shape)
    left = kernel.left_over(size, shape[2:])
    if inside is not None and list(inside.shape[2:]) != size:
        inside = None
    if inside is None and kernel.tiles(left):
        return follow(
            put_out, lambda relevance: [_tiled(kernel, relevance, groups, whole), None], shadow, own
        )
    beyond = [side for rest in reversed(left) for side in (0, max(0, -rest))]  # as by ceil_mode
    behind = [max(0, rest) for rest in left]

    def back(relevance: Tensor) -> list[Tensor | None]:
        real = relevance.new_ones(1, 1, *size) if inside is None else inside.to(relevance)
        real = F.pad(real, beyond)
        under = kernel.sums(real)
        blind = relevance.masked_fill(under > 0, 0).flatten(1).sum(1) if inside is not None else None
        per = _of_groups(relevance, groups) / under.clamp(min=1)
        spread = kernel.spreads(per.reshape(-1, 1, *per.shape[2:]), behind)
        if inside is not None:
            spread = spread * real
        for dim, length in enumerate(size, 2):
            spread = spread.narrow(dim, 0, length)
        return [_to_channels(spread, whole, groups), blind]

    return follow(put_out, back, shadow, own)


def transposed(
    kernel: Kernel, shadow: Tensor, shape: Sequence[int], output_padding: Sequence[int], own: Tensor
) -> Tensor:
    """A transposed convolution: evenly to the group's channels and the positions that reach each output.

    Args:
        kernel: how the outputs of neighbours lie; its padding is cut off on both sides.
        shadow: as for `convolved`.
        shape: as for `convolved`.
        output_padding: what is added at the end.
        own: the model's own share of each image, (B,): what no input reaches.
    """
    whole = shadow.shape
    groups, put_out = _groups(kernel, whole, shape)

    def back(relevance: Tensor) -> list[Tensor | None]:
        over = kernel.spreads(relevance.new_ones(1, 1, *whole[2:]), output_padding)
        blind = relevance.masked_fill(over > 0, 0).flatten(1).sum(1)
        per = _of_groups(relevance, groups) / over.clamp(min=1)
        spread = kernel.sums(per.reshape(-1, 1, *shape[2:]))
        return [_to_channels(spread, whole, groups), blind]

    return follow(put_out, back, shadow, own)


def _groups(kernel: Kernel, whole: torch.Size, shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Returns how many groups count, and the shape of the output's shadow."""
    groups = 1 if whole[1] == 1 else kernel.groups
    return groups, (whole[0], 1, *shape[2:]) if groups == 1 else tuple(shape)


def _tiled(kernel: Kernel, relevance: Tensor, groups: int, whole: torch.Size) -> Tensor:
    """What `convolved` gives where each position lies under one window, as in the first layer of a ViT."""
    batch, channels, *size = whole
    share = _of_groups(relevance, groups) / (channels // groups * math.prod(kernel.size))
    apart = [n for pair in zip(share.shape[2:], kernel.size, strict=True) for n in pair]
    for dim in range(len(size)):
        share = share.unsqueeze(3 + 2 * dim)
    spread = share.expand(batch, groups, *apart).reshape(batch, groups, 1, *size)
    return spread.expand(batch, groups, channels // groups, *size).reshape(whole)


def _of_groups(relevance: Tensor, groups: int) -> Tensor:
    """Sums over the channels of each group, (B, groups, *size)."""
    return relevance if groups == 1 else relevance.unflatten(1, (groups, -1)).sum(2)


def _to_channels(relevance: Tensor, whole: torch.Size, groups: int) -> Tensor:
    """Shares out what groups have among their channels."""
    batch, channels, *size = whole
    share = relevance.reshape(batch, groups, 1, *size) / (channels // groups)
    return share.expand(batch, groups, channels // groups, *size).reshape(whole)

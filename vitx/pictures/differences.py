"""Differences of two maps, laid over the image."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vitx.pictures.render import overlays


def differences(pixels: Tensor, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Colors images, (B, H, W, 3) uint8: red where the second maps are higher than the first, else blue.

    Each image has a map, (1, h, w), in both; the grids may differ. Maps are compared as shares of a whole of
    1; each difference is scaled to its own largest value.
    """
    size = (pixels.shape[1], pixels.shape[2])
    before, after = (torch.cat([_shares(one, size) for one in maps]) for maps in (first, second))
    change = after - before
    largest = change.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(change.dtype).tiny)
    grey = pixels.float().mean(-1, keepdim=True).to(torch.uint8).expand_as(pixels)  # the map has the colours
    return overlays(grey, (change / largest + 1) / 2, "coolwarm")


def _shares(maps: Tensor, size: tuple[int, int]) -> Tensor:
    maps = F.interpolate(maps[:, None], size, mode="bilinear")[:, 0]
    return maps / maps.sum((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)

"""Numbers that say what a picture shows; each one is given per image."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def entropy(maps: Tensor) -> Tensor:
    """How spread out each map is: Shannon entropy over that of a uniform map.

    Args:
        maps: (B, h, w), >= 0.

    Returns:
        (B,) in [0, 1]: 0 for a single patch, 1 for a constant map (zeros included).

    Example:
        >>> entropy(torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[2.0, 2.0], [2.0, 2.0]]]))
        tensor([0., 1.])
    """
    share = _shares(maps)
    nats: Tensor = torch.special.entr(share).sum(1)
    return nats / math.log(share.shape[1])


def drift(maps: Tensor, before: Tensor) -> Tensor:
    """How far each map moved: 1 - cosine similarity.

    Args:
        maps: (B, h, w), >= 0.
        before: the maps of the same images at another time, (B, h, w).

    Returns:
        (B,) in [0, 1]: 0 for the same map up to a factor, 1 for maps without a common patch.
    """
    return (1 - F.cosine_similarity(_shares(maps), _shares(before.to(maps)), dim=1)).clamp(0, 1)


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Whether the brightest point of each heat map lies on the object (Zhang et al. 2018).

    Args:
        maps: (B, h, w), >= 0.
        masks: (B, H, W), True on the object (or in its box).

    Returns:
        (B,) of 0 and 1, in the precision of the maps.
    """
    brightest = _scaled(maps, masks).argmax(1, keepdim=True)
    return masks.flatten(1).gather(1, brightest)[:, 0].to(maps.dtype)


def energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Which share of each heat map lies on the object (Wang et al. 2020, Score-CAM).

    Args:
        maps: (B, h, w), >= 0.
        masks: (B, H, W), True on the object (or in its box).

    Returns:
        (B,) in [0, 1].
    """
    heat = _scaled(maps, masks)
    return (heat * masks.flatten(1)).sum(1) / heat.sum(1)


def _shares(maps: Tensor) -> Tensor:
    """Flattens maps to shares that sum to 1; a map of zeros counts as uniform."""
    flat = maps.flatten(1)
    flat = torch.where(flat.sum(1, keepdim=True) > 0, flat, torch.ones_like(flat))
    return flat / flat.sum(1, keepdim=True)


def _scaled(maps: Tensor, masks: Tensor) -> Tensor:
    """Scales the shares of the maps to the size of the masks, (B, H * W)."""
    shares = _shares(maps).view_as(maps)
    size = (masks.shape[1], masks.shape[2])
    return F.interpolate(shares[:, None], size, mode="bilinear", align_corners=False).flatten(1)

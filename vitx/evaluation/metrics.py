"""Metrics of maps, (B, h, w) and >= 0, or of maps and masks, (B, H, W), with one value per image."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vitx.errors import VitxError


def entropy(maps: Tensor) -> Tensor:
    """Return the Shannon entropy of each map, (B, h, w), divided by that of a uniform map: (B,) in [0, 1].

    It is 0 for a single patch and 1 for a constant map (including all zeros).

    Example:
        >>> entropy(torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[2.0, 2.0], [2.0, 2.0]]]))
        tensor([0., 1.])
    """
    share = _shares(maps)
    nats: Tensor = torch.special.entr(share).sum(1)
    return nats / math.log(share.shape[1])


def drift(maps: Tensor, before: Tensor) -> Tensor:
    """Return 1 - cosine similarity of maps, (B, h, w), and earlier ones: (B,) in [0, 1].

    It is 0 for maps that are equal up to a factor, and 1 for maps that have no patch in common.
    """
    return (1 - F.cosine_similarity(_shares(maps), _shares(before.to(maps)), dim=1)).clamp(0, 1)


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    """Test whether the center of the brightest patch of each map lies on the object (Zhang et al. 2018).

    Args:
        maps: (B, h, w), >= 0.
        masks: (B, H, W), True on the object (or in its box).

    Returns:
        (B,) in [0, 1], usually 0 or 1; of several equally bright patches, the share on the object.

    Example:
        >>> corner = torch.zeros(1, 8, 8, dtype=torch.bool)
        >>> corner[:, 1:4, 1:4] = True  # but not the first pixel
        >>> pointing_game(torch.tensor([[[3.0, 1.0], [1.0, 1.0]]]), corner)
        tensor([1.])
    """
    masks = _checked(maps, masks)
    rows, columns = (
        ((torch.arange(count, device=maps.device) + 0.5) * size / count).long()
        for count, size in zip(maps.shape[1:], masks.shape[1:], strict=True)
    )
    brightest = (maps == maps.amax((1, 2), keepdim=True)).to(maps.dtype)
    on_object = masks[:, rows][:, :, columns]
    return (brightest * on_object).sum((1, 2)) / brightest.sum((1, 2))


def energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the share of each heat map that lies on the object, (B,) (Wang et al. 2020, Score-CAM).

    The arguments are those of `pointing_game`.
    """
    heat, masks = _scaled(maps, masks)
    return (heat * masks).sum(1) / heat.sum(1)


def mean_iou(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the mean intersection over union of the object and each heat map, thresholded at its mean, (B,).

    The mean is over object and background of each image, where Chefer et al. 2021 (arXiv 2012.09838) add up
    the data set; a part absent from map and mask counts as 1. The arguments are those of `pointing_game`.
    """
    heat, wanted = _scaled(maps, masks)
    found = heat > heat.mean(1, keepdim=True)
    return (_iou(found, wanted) + _iou(~found, ~wanted)) / 2


def information(maps: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of each normalized map, (B, h, w), from their mean map.

    The mean over images is the generalized Jensen-Shannon divergence of the maps (Lin 1991), the mutual
    information of image and place. It is small if all maps are bright in one place, as on a fixed watermark,
    or everywhere, as with a color cast; large if objects are in different places. Use 64 images or more.

    Returns:
        (B,) in nats, >= 0; their mean is at most log(B).

    Example:
        >>> information(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([0.6931, 0.6931])
        >>> information(torch.tensor([[[0.5, 0.5]], [[3.0, 3.0]]]))
        tensor([0., 0.])
    """
    shares = _shares(maps)
    common = shares.mean(0, keepdim=True)
    return (torch.xlogy(shares, shares) - torch.xlogy(shares, common)).sum(1).clamp(min=0)


def rank_correlation(maps: Tensor, others: Tensor) -> Tensor:
    """Return Spearman's rank correlation of pairs of maps, (B, h, w): how similarly they rank the patches.

    Returns:
        (B,) in [-1, 1]: 1 for the same order, 0 for unrelated orders or a constant map. Equal values share
        their mean rank. NaN if a map contains NaN.

    Example:
        >>> rank_correlation(torch.tensor([[[1.0, 2.0, 9.0]]]), torch.tensor([[[0.3, 0.2, 0.1]]]))
        tensor([-1.])
    """
    if maps.shape != others.shape:
        raise VitxError(f"maps must have one shape, found {tuple(maps.shape)} and {tuple(others.shape)}")
    first, second = _centered_ranks(maps), _centered_ranks(others.to(maps.device))
    scale = (first.square().sum(1) * second.square().sum(1)).sqrt()
    found = torch.where(scale > 0, (first * second).sum(1) / scale, 0).clamp(-1, 1)
    unordered = maps.isnan().flatten(1).any(1) | others.isnan().flatten(1).any(1).to(maps.device)
    return found.masked_fill(unordered, torch.nan)


def box_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Draw boxes as masks, (B, H, W) bool: True where the center of a pixel lies in a box of the image.

    Args:
        boxes: (B, 4) or (B, K, 4): x1, y1, x2, y2 in pixels. Boxes without area are empty, so images with
            fewer boxes can be padded with zeros.
        size: height and width of the images.

    Example:
        >>> box_masks(torch.tensor([[0.0, 0.0, 2.0, 1.0]]), (2, 3)).int()
        tensor([[[1, 1, 0], [0, 0, 0]]], dtype=torch.int32)
    """
    boxes = boxes.view(len(boxes), -1, 4, 1).float()
    x1, y1, x2, y2 = boxes.unbind(2)  # (B, K, 1)
    y, x = (torch.arange(length, device=boxes.device) + 0.5 for length in size)
    rows, columns = (y1 <= y) & (y < y2), (x1 <= x) & (x < x2)
    return (rows[..., None] & columns[:, :, None]).any(1)


def _checked(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the masks as bool, or raise a VitxError unless there is one for each map, without NaN."""
    if maps.ndim != 3 or masks.ndim != 3 or len(maps) != len(masks):
        found = f"{tuple(maps.shape)} and {tuple(masks.shape)}"
        raise VitxError(f"maps must be (B, h, w) and masks (B, H, W), one for each map, found {found}")
    if maps.isnan().any():
        raise VitxError("the maps hold NaN")
    return masks.bool().to(maps.device)


def _iou(found: Tensor, wanted: Tensor) -> Tensor:
    union = (found | wanted).sum(1)
    return torch.where(union > 0, (found & wanted).sum(1) / union.clamp_min(1), 1.0)


def _centered_ranks(maps: Tensor) -> Tensor:
    """Return the rank of each patch within its map, minus the mean rank, (B, h * w)."""
    values = maps.flatten(1).contiguous()
    ordered = values.sort(1).values
    below, up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    dtype = torch.promote_types(maps.dtype, torch.float32)  # squares of ranks overflow half precision
    return ((below + up_to).to(dtype) - values.shape[1]) / 2


def _shares(maps: Tensor) -> Tensor:
    """Flatten maps and normalize them to sum to 1; a map of zeros becomes uniform."""
    flat = maps.flatten(1)
    flat = torch.where(flat.sum(1, keepdim=True) > 0, flat, torch.ones_like(flat))
    return flat / flat.sum(1, keepdim=True)


def _scaled(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normalized maps, resized to the masks, and the masks as bool, both (B, H * W)."""
    masks, shares = _checked(maps, masks), _shares(maps).view_as(maps)
    heat = F.interpolate(shares[:, None], masks.shape[1:], mode="bilinear", align_corners=False)
    return heat.flatten(1), masks.flatten(1)

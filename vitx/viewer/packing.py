"""Compact encoding of an attention matrix A, from which a page computes rows and columns.

The scores of an attention are q k^T, so log A has a low rank: that of q, plus one for the row sums, plus that
of a bias. Two thin integer matrices hold it, however the model computes A. If they are not smaller, as in
windows, or not exact, as with masks, A itself is stored as float16.
"""

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_PRECISION = 1 / 600  # of log A: the ratio of two entries of A is then right within 1/255
_SPARE = 8  # columns beyond the channels of a head: for row sums, and to find the others reliably
_TOP = 2.0**15  # scale of the largest number: float16 also holds nine orders of magnitude below it


def packed(weights: Tensor, channels: int) -> dict[str, Any]:
    """Pack A of all heads, (T, H, Q, K), with this many channels each, for `page.html.jinja` to unpack."""
    flat = weights.flatten(0, 1).float().cpu()
    return {"heads": weights.shape[1], **(_factors(flat, channels + _SPARE) or halves(flat))}


def most_bytes(shape: Sequence[int], channels: int) -> int:
    """Return the most bytes of base64 that A of this shape, (T, H, Q, K), can take."""
    windows, heads, queries, keys = shape
    entries = min(queries * keys, (queries + keys) * (channels + _SPARE))
    return windows * heads * entries * 2 * 4 // 3


def _factors(weights: Tensor, rank: int) -> dict[str, Any] | None:
    """Return log A as a product of two thin matrices; None if that is not smaller, or not exact."""
    _, queries, keys = weights.shape
    if rank * (queries + keys) >= queries * keys or bool((weights <= 0).any()):
        return None
    logs = weights.log()
    sides = _thin(logs, rank)
    sizes = [side.abs().amax(1, keepdim=True).clamp(min=1e-30) / (2**15 - 1) for side in sides]
    left, right = ((side / size).round() for side, size in zip(sides, sizes, strict=True))
    units = sizes[0] * sizes[1]
    if float((left * units @ right.mT - logs).abs().amax()) > _PRECISION:
        return None
    matrices = {"left": encoded(left.short()), "right": encoded(right.short())}
    return {"columns": left.shape[2], "units": encoded(units[:, 0]), **matrices}


def _thin(logs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return two thin matrices whose product approximates this one.

    They are found by a random projection (Halko et al. 2011), if the rank is below the given one.
    """
    probes = torch.randn(len(logs), logs.shape[2], rank, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(logs @ probes).Q
    left, sizes, right = torch.linalg.svd(basis.mT @ logs, full_matrices=False)
    left, right = basis @ left * sizes.sqrt()[:, None], right.mT * sizes.sqrt()[:, None]
    kept = (left.abs().amax(1) * right.abs().amax(1)).amax(0) > _PRECISION / 20
    return left[..., kept], right[..., kept]


def halves(numbers: Tensor) -> dict[str, Any]:
    """Pack numbers as float16, with the unit in which they are stored."""
    numbers = numbers.detach().float().cpu()
    largest = float(numbers.abs().amax()) or 1.0
    return {"unit": largest / _TOP, "whole": encoded((numbers * (_TOP / largest)).half())}


def encoded(numbers: Tensor) -> str:
    """Return the little-endian bytes of numbers in base64."""
    array = numbers.detach().cpu().contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()

"""A of an attention in few bytes, from which a page computes its rows and columns.

The scores of an attention are q k^T, so log A has a low rank: that of q, one more for the sum of each row,
and that of a bias. Two thin matrices of whole numbers hold it, however the model computes A. Where that is no
smaller, as in windows, or not exact, as with masks, A itself is kept as float16.
"""

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_PRECISION = 1 / 600  # of each entry: a quotient of two of them is then right within 1/255
_COARSE = 0.3, 0.1, 0.03, 0.0  # of a logarithm: columns that add less take one byte, if that is exact enough
_SPARE = 8  # more columns than the head has channels: the sums of the rows, and what finds the others
_TOP = 2.0**15  # float16 holds the largest weight, and nine orders of magnitude below


def packed(weights: Tensor, channels: int) -> dict[str, Any]:
    """Pack A of all heads, (T, H, Q, K), each of so many channels, as `page.html.jinja` unpacks it."""
    flat = weights.flatten(0, 1).float().cpu()
    return {"heads": weights.shape[1], **(_factors(flat, channels + _SPARE) or halves(flat))}


def most_bytes(shape: Sequence[int], channels: int) -> int:
    """Return how many bytes A of such a shape, (T, H, Q, K), takes at most, in base64."""
    windows, heads, queries, keys = shape
    entries = min(queries * keys, (queries + keys) * (channels + _SPARE))
    return windows * heads * entries * 2 * 4 // 3


def _factors(weights: Tensor, rank: int) -> dict[str, Any] | None:
    """Return log A as the product of two thin matrices; None where that does not pay, or is not exact."""
    _, queries, keys = weights.shape
    if rank * (queries + keys) >= queries * keys or bool((weights <= 0).any()):
        return None
    logs = weights.log()
    left, right, adds = _thin(logs, rank)
    for limit in _COARSE:
        fine = adds >= limit
        steps = torch.where(fine, 2.0**15 - 1, 2.0**7 - 1)
        sizes = [side.abs().amax(1, keepdim=True).clamp(min=1e-30) / steps for side in (left, right)]
        numbers = [(side / size).round() for side, size in zip((left, right), sizes, strict=True)]
        units = sizes[0] * sizes[1]
        if float((numbers[0] * units @ numbers[1].mT - logs).abs().amax()) <= _PRECISION:
            count = int(fine.sum())
            parts = [[encoded(one[..., :count].short()), encoded(one[..., count:].char())] for one in numbers]
            sides = {"left": parts[0], "right": parts[1]}
            return {"fine": count, "coarse": len(adds) - count, "units": encoded(units[:, 0]), **sides}
    return None


def _thin(logs: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return two matrices whose product is nearly this one, and what each of their columns adds at most.

    By a random projection (Halko et al. 2011), which finds a rank below the given one.
    """
    probes = torch.randn(len(logs), logs.shape[2], rank, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(logs @ probes).Q
    left, sizes, right = torch.linalg.svd(basis.mT @ logs, full_matrices=False)
    left, right = basis @ left * sizes.sqrt()[:, None], right.mT * sizes.sqrt()[:, None]
    adds, order = (left.abs().amax(1) * right.abs().amax(1)).amax(0).sort(descending=True)
    order = order[adds > _PRECISION / 20]
    return left[..., order], right[..., order], adds[: len(order)]


def halves(numbers: Tensor) -> dict[str, Any]:
    """Pack numbers as float16, with the unit in which they are kept."""
    numbers = numbers.detach().float().cpu()
    largest = float(numbers.abs().amax()) or 1.0
    return {"unit": largest / _TOP, "whole": encoded((numbers * (_TOP / largest)).half())}


def encoded(numbers: Tensor) -> str:
    """Return the bytes of numbers in base64, lowest byte first."""
    array = numbers.detach().cpu().contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()

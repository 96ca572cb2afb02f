"""A of an attention in few bytes, from which a page computes its rows and columns.

The scores of an attention are q k^T, so log A has a low rank: that of q, one more for the sum of each row,
and that of a bias. Two thin matrices of whole numbers hold it, however the model computes A. Where that is no
smaller, as in windows, or not exact, as with masks, A itself is kept as float16.
"""

import base64
from typing import Any

import torch
from torch import Tensor

_PRECISION = 1 / 600  # of each entry: a quotient of two of them is then right within 1/255
_COARSE = 0.3, 0.1, 0.03, 0.0  # of a logarithm: what adds less is kept in one byte, if that is exact enough
_SPARE = 8  # more columns than the head has channels: the sums of the rows, and what finds the others
_TOP = 2.0**15  # float16 holds the largest weight, and nine orders of magnitude below


def packed(weights: Tensor, channels: int) -> dict[str, Any]:
    """Packs A of all heads.

    Args:
        weights: (T, H, Q, K).
        channels: of a head.

    Returns:
        What `page.html.jinja` unpacks.
    """
    flat = weights.flatten(0, 1).float().cpu()
    return {"heads": weights.shape[1], **(_factors(flat, channels + _SPARE) or halves(flat))}


def _factors(weights: Tensor, rank: int) -> dict[str, Any] | None:
    """Returns log A as the product of two thin matrices; None where that does not pay, or is not exact."""
    _, queries, keys = weights.shape
    if rank * (queries + keys) >= queries * keys or bool((weights <= 0).any()):
        return None
    logs = weights.log()
    probes = torch.randn(len(weights), keys, rank, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(logs @ probes).Q
    left, sizes, right = torch.linalg.svd(basis.mT @ logs, full_matrices=False)
    left, right = basis @ left * sizes.sqrt()[:, None], right.mT * sizes.sqrt()[:, None]
    adds = (left.abs().amax(1) * right.abs().amax(1)).amax(0)
    kept = int((adds > _PRECISION / 20).sum())
    for limit in _COARSE:
        fine = int((adds[:kept] >= limit).sum())
        steps = torch.tensor([2.0**15 - 1] * fine + [2.0**7 - 1] * (kept - fine))
        (left_numbers, left_step), (right_numbers, right_step) = (
            _rounded(one[..., :kept], steps) for one in (left, right)
        )
        unit = left_step * right_step
        if float((left_numbers * unit @ right_numbers.mT - logs).abs().amax()) <= _PRECISION:
            both = {"left": left_numbers, "right": right_numbers}
            columns = {
                name: [encoded(one[..., :fine].short()), encoded(one[..., fine:].char())]
                for name, one in both.items()
            }
            return {"fine": fine, "coarse": kept - fine, "units": encoded(unit[:, 0]), **columns}
    return None


def _rounded(matrix: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Returns whole numbers, each column from minus to plus so many steps, and the size of a step."""
    scale = matrix.abs().amax(1, keepdim=True).clamp(min=1e-30) / steps
    return (matrix / scale).round(), scale


def halves(numbers: Tensor) -> dict[str, Any]:
    """Packs numbers as float16, with the unit in which they are kept."""
    numbers = numbers.detach().float().cpu()
    largest = float(numbers.abs().amax()) or 1.0
    return {"unit": largest / _TOP, "whole": encoded((numbers * (_TOP / largest)).half())}


def encoded(numbers: Tensor) -> str:
    """Returns the bytes of numbers in base64, lowest byte first."""
    array = numbers.detach().cpu().contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()

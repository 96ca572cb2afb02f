"""The check on every map: all of the relevance, or all of the score, must be accounted for."""

from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.tape.expanded import ratio

_TOLERANCE = 1e-3  # of what was accounted for
_NEGATIVE = -1e-6


def share_of_images(arrived: Tensor, own: Tensor) -> Tensor:
    """Return the share of each image's relevance that was accounted for, (B,).

    What arrived at the model's own tokens is split among the images in proportion to what each one lacks.
    """
    missing = 1 - arrived
    return arrived + ratio(missing * own, missing.sum())


def share_of_sum(expected: Tensor, found: Tensor, size: Tensor) -> Tensor:
    """Return the share of a sum that was found, (1,); a difference is relative to the size of its parts."""
    return (1 + ratio(found - expected, size))[None]


def check_score(share: Tensor, dtype: torch.dtype) -> None:
    """Raise a VitxError unless image and constants add up to the score, up to the rounding of this dtype."""
    rounding = 2 * torch.finfo(dtype).eps  # larger in half precision
    if not abs(share.item() - 1) <= max(_TOLERANCE, rounding):
        double = dtype == torch.float64
        raise VitxError(
            f"{share.item():.1%} of the score was accounted for by the image and the constants of the "
            "model, not all of it: the model computes something whose part in the score is not known"
            + ("" if double else "; or rounding is to blame: try model.double() and images.double()")
        )


def check(
    conservation: Tensor, pixels: Tensor, own: Tensor, lost: Mapping[str, float], *, positive: bool
) -> None:
    """Raise a VitxError if relevance was lost, or is below 0 although all should be `positive`.

    `lost` lists what operators without a rule got; `pixels` and the model's `own` tokens, (n,), got the rest.
    """
    worst = conservation[(conservation - 1).abs().argmax()]
    # Read all at once: each transfer has to wait for the GPU.
    share, *smallest, whole = torch.stack([worst, pixels.amin(), own.amin(), pixels.sum()]).tolist()
    if not isfinite(share):
        if isfinite(whole):  # otherwise the maps are not finite either, which is reported elsewhere
            raise VitxError("the relevance of the model's own tokens is not finite: the map would be wrong")
        return
    check_lost(lost)
    if abs(share - 1) > _TOLERANCE:
        raise VitxError(
            f"{share:.1%} of the relevance arrived at the image and the model's own tokens, not all of "
            "it: the model computes something that vitx did not see, and the map would be wrong"
        )
    if positive and min(smallest) < _NEGATIVE:
        raise VitxError(
            f"relevance below 0 was found ({min(smallest):.2g}): an attention gave back more than the "
            "residual around it had, and the map would be wrong"
        )


def check_lost(lost: Mapping[str, float]) -> None:
    """Raise a VitxError if relevance reached an operator without a rule."""
    name = max(lost, key=lost.__getitem__, default=None)
    if name is not None and lost[name] > _TOLERANCE:
        raise VitxError(
            f"{lost[name]:.1%} of the relevance reached {name}, and no rule takes it through that "
            "call: the map would be wrong"
        )

"""The check on every map: all of the relevance, or all of a score, is accounted for."""

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.relevance.shadow import Shadow

_TOLERANCE = 1e-3  # of what was accounted for
_NEGATIVE = -1e-6


def share_of_images(arrived: Tensor, common: Tensor, grown: Tensor | float) -> Tensor:
    """Returns the share of each image, (B,), where what arrived in common makes up what each one lacks."""
    whole = 1 + grown / len(arrived)
    if isinstance(grown, Tensor):  # in which image a layer handed on more is not known
        return ((arrived.sum() + common) / (len(arrived) * whole)).expand(len(arrived))
    missing = whole - arrived
    return arrived + missing * common / torch.where(missing.sum() == 0, 1, missing.sum())


def share_of_score(score: Tensor, added: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what share of a score all that adds to it makes up, (1,).

    Args:
        score: summed over the images, ().
        added: what each part adds, (parts,).
        dtype: in which the model computed.

    Raises:
        VitxError: That is not all: the model computes something that was not linearised.
    """
    size = added.abs().sum()
    share = 1 + (added.sum() - score) / torch.where(size == 0, 1, size)
    rounding = 2 * torch.finfo(dtype).eps  # which is more in half precision
    if abs(share.item() - 1) > max(_TOLERANCE, rounding):
        double = dtype == torch.float64
        raise VitxError(
            f"{share.item():.1%} of the score was accounted for by the image and the constants of the "
            "model, not all of it: the model computes something whose part in the score is not known"
            + ("" if double else "; or rounding is to blame: try model.double() and images.double()")
        )
    return share[None]


def check(watched: Shadow, conservation: Tensor, pixels: Tensor, own: Tensor, *, positive: bool) -> None:
    """Raises a VitxError if relevance was lost, or is below 0; all values are read at once."""
    worst = conservation[(conservation - 1).abs().argmax()]
    finite = torch.stack([conservation.isfinite().all(), pixels.isfinite().all()])
    astray = torch.as_tensor(watched.attentions.astray).to(worst)
    least = torch.stack([worst, astray, pixels.amin(), own.amin()])
    known, pixels_known, share, astray, *smallest = torch.cat([finite.to(least.dtype), least]).tolist()
    if not known:
        if pixels_known:  # else the maps are not finite either, which is said elsewhere
            raise VitxError("the relevance of the model's own tokens is not finite: the map would be wrong")
        return
    check_lost(watched, astray)
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


def check_lost(watched: Shadow, astray: float) -> None:
    """Raises a VitxError if relevance reached a call without a rule, or other tokens than the rules say."""
    if astray > _TOLERANCE:
        raise VitxError(
            "an attention puts out at other tokens than its queries came from (they are shared, or a "
            "convolution follows), so what a token keeps by the residual cannot be known: take rollout "
            "with head_fusion='mean' and no discard_ratio"
        )
    lost = watched.lost
    name = max(lost, key=lost.__getitem__, default=None)
    if name is not None and lost[name] > _TOLERANCE:
        raise VitxError(
            f"{lost[name]:.1%} of the relevance reached {name}, and no rule takes it through that "
            "call: the map would be wrong"
        )

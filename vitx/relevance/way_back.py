"""The way back from the logits to the pixels, and the check that nothing was lost on it."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.relevance.attending import Carrier
from vitx.relevance.grid import in_grid
from vitx.relevance.shadow import Shadow

_TOLERANCE = 1e-3  # of what was accounted for
_NEGATIVE = -1e-6


@dataclass(frozen=True)
class Found:
    """What one method found.

    Attributes:
        maps: (B, h, w).
        conservation: (B,), what share of the relevance was accounted for.
    """

    maps: Tensor
    conservation: Tensor


@contextmanager
def shadowed(
    model: nn.Module, image: Tensor, *, gradients: bool, head_fusion: str | None
) -> Iterator[Shadow]:
    """Yields a shadow for the pass that begins with this image; it is to be entered for that pass alone."""

    def brought() -> Iterator[Tensor]:
        yield from model.parameters()
        yield from model.buffers()

    watched = Shadow(image, brought, gradients=gradients, head_fusion=head_fusion)
    with ExitStack() as stack:
        stack.callback(watched.close)
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield watched


def way_back(watched: Shadow, carrier: Carrier, logits: Tensor, score: Tensor | None) -> Found:
    """Takes relevance from the logits to the image: 1 for each image, spread evenly over its logits.

    Args:
        watched: the pass.
        carrier: the method.
        logits: what the model put out, (B, ...).
        score: the sum over the images of what is explained, for methods that read its gradient.

    Raises:
        VitxError: Relevance was lost, or is negative: the map would be wrong.
    """
    end = _end(watched, logits)
    watched.lost.clear()
    watched.attentions.begin(carrier)
    start = torch.full(end.shape, 1 / end[0].numel(), dtype=end.dtype, device=end.device)
    ends: list[Tensor] = [end]
    starts: list[Tensor | None] = [start]
    if score is not None:
        if not score.requires_grad:
            raise VitxError(
                "the score does not depend on any attention in a differentiable way (reentrant checkpointing "
                "hides it): compute it from the model's output, with gradients enabled"
            )
        ends, starts = [end, score], [start, None]
    stem = [] if watched.first is None else watched.first.stem
    inputs = [watched.image, watched.own, watched.common, *stem]
    with torch.autocast(logits.device.type, enabled=False):
        found = torch.autograd.grad(ends, inputs, starts, retain_graph=True, allow_unused=True)
    pixels, own, common, *tokens = (
        torch.zeros_like(i) if part is None else part for part, i in zip(found, inputs, strict=True)
    )
    pixels = pixels.sum(1)
    conservation = _accounted(pixels.sum((1, 2)) + own, common, watched.attentions.grown)
    _check(watched, carrier, pixels, own, conservation)
    return Found(in_grid(watched.image, pixels, watched.first, tokens), conservation)


def _accounted(arrived: Tensor, common: Tensor, grown: Tensor | float) -> Tensor:
    """Returns the share of each image, (B,), where what arrived in common makes up what each one lacks."""
    whole = 1 + grown / len(arrived)
    if isinstance(grown, Tensor):  # in which image a layer handed on more is not known
        return ((arrived.sum() + common) / (len(arrived) * whole)).expand(len(arrived))
    missing = whole - arrived
    return arrived + missing * common / torch.where(missing.sum() == 0, 1, missing.sum())


def _end(watched: Shadow, logits: Tensor) -> Tensor:
    live = watched.get(logits)
    if live is None:
        raise VitxError(
            "the model's output does not come from the image by any torch function that was seen: code that "
            "is scripted, compiled in another process, or not torch's cannot be followed"
        )
    if live.lineage.kind in ("scores", "weights"):
        raise VitxError(
            "the output comes from a product of two tensors that both depend on the image, with no softmax "
            "behind it (linear attention): no rule takes relevance through it"
        )
    if not watched.attentions.calls:
        raise VitxError(
            "no attention between tokens was found: vitx explains Vision Transformers whose attention "
            "is scaled_dot_product_attention, nn.MultiheadAttention or a softmax times the values"
        )
    return live.shadow


def _check(watched: Shadow, carrier: Carrier, pixels: Tensor, own: Tensor, conservation: Tensor) -> None:
    if not bool(conservation.isfinite().all()):
        if bool(pixels.isfinite().all()):  # else the maps are not finite either, which is said elsewhere
            raise VitxError("the relevance of the model's own tokens is not finite: the map would be wrong")
        return
    lost = max(watched.lost, key=lambda name: watched.lost[name], default=None)
    off = (conservation - 1).abs().max().item()
    if lost is not None and watched.lost[lost] > _TOLERANCE:
        raise VitxError(
            f"{watched.lost[lost]:.1%} of the relevance reached {lost}, and no rule takes it through that "
            "call: the map would be wrong"
        )
    if off > _TOLERANCE:
        share = conservation[(conservation - 1).abs().argmax()].item()
        raise VitxError(
            f"{share:.1%} of the relevance arrived at the image and the model's own tokens, not all of it: "
            "the model computes something that vitx did not see, and the map would be wrong"
        )
    least = min(pixels.min().item(), own.min().item())
    if not carrier.grows and least < _NEGATIVE:
        raise VitxError(
            f"relevance below 0 was found ({least:.2g}): an attention gave back more than the residual "
            "around it had, and the map would be wrong"
        )

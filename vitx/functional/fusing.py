"""What methods share: heads are fused, relevance is carried through a layer, input is checked."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitx.errors import VitxError

HEAD_FUSIONS = ("mean", "max", "min")


class HeadFusion:
    """Fuses heads that come a few at a time, so that no more of them need to stay in the cache."""

    def __init__(self, head_fusion: str) -> None:
        self._head_fusion = head_fusion
        self._fused: Tensor | None = None
        self._seen = 0

    def add(self, weights: Tensor, gradient: Tensor | None, of_heads: int) -> Tensor | None:
        """Takes in A or A * G of some heads; returns that of all heads, fused, after the last ones.

        Args:
            weights: A, (b, g, n, N).
            gradient: G, of the same shape; None: A alone is fused.
            of_heads: how many heads there are.

        Returns:
            (b, n, N), or None: there are more heads to come.
        """
        if self._fused is None:
            start = {"mean": 0.0, "max": -torch.inf, "min": torch.inf}[self._head_fusion]
            self._fused = torch.full_like(weights[:, 0], start)
        for number, head in enumerate(weights.unbind(1)):
            outer = None if gradient is None else gradient[:, number]
            if self._head_fusion == "mean" and outer is not None:
                self._fused.addcmul_(head, outer, value=1 / of_heads)
            elif self._head_fusion == "mean":
                self._fused.add_(head, alpha=1 / of_heads)
            else:
                combine = torch.maximum if self._head_fusion == "max" else torch.minimum
                combine(self._fused, head if outer is None else head * outer, out=self._fused)
        self._seen += weights.shape[1]
        if self._seen < of_heads:
            return None
        fused, self._fused, self._seen = self._fused, None, 0
        return fused


def carry(relevance: Tensor, matrix: Tensor) -> Tensor:
    """Takes the relevance of some tokens, (b, n), through their rows of a matrix, (b, n, N), to (b, N)."""
    return (relevance[:, None] @ matrix)[:, 0]


def carry_heads(relevance: Tensor, heads: Tensor) -> Tensor:
    """The same through the sum of some heads, (b, g, n, N)."""
    return (relevance[:, None, None] @ heads).sum((1, 2))


def check_options(head_fusion: str, discard_ratio: float = 0.0) -> None:
    """Raises a VitxError unless both options are in range."""
    if head_fusion not in HEAD_FUSIONS:
        raise VitxError(f"head_fusion must be one of {', '.join(HEAD_FUSIONS)}, found {head_fusion!r}")
    number = isinstance(discard_ratio, (int, float)) and not isinstance(discard_ratio, bool)
    if not number or not 0 <= discard_ratio < 1:
        raise VitxError(f"discard_ratio must be at least 0 and below 1, found {discard_ratio!r}")


def first_layer(start_layer: Any, layers: int) -> int:
    """Returns the number of the first of some layers that counts, or raises a VitxError if there is none."""
    if isinstance(start_layer, bool) or not hasattr(start_layer, "__index__"):
        raise VitxError(f"start_layer must be a whole number, found {start_layer!r}")
    first = operator.index(start_layer)
    if not 0 <= first < layers:
        raise VitxError(
            f"start_layer must be from 0 to {layers - 1}, as the model has {layers} layers, found {first}"
        )
    return first


def check_layers(layers: Sequence[Tensor], name: str) -> None:
    """Raises a VitxError unless the layers are (B, heads, N, N) with the same B and N."""
    shapes = [tuple(getattr(layer, "shape", ())) for layer in layers]
    if not shapes:
        raise VitxError(f"{name} is empty: give one (B, heads, N, N) tensor per layer")
    for before, found in zip([shapes[0], *shapes], shapes, strict=False):
        if len(found) != 4 or found[2] != found[3]:
            raise VitxError(f"{name} must be (B, heads, N, N) tensors, found shape {found}")
        if (found[0], found[2]) != (before[0], before[2]):
            raise VitxError(f"{name} differ in batch or token count: found {before} and {found}")


def check_readout(readout: Tensor | None, layer: Tensor) -> Tensor:
    """Returns the read-out as (B, N) in the precision of the maps; token 0 where there is none."""
    batch, tokens = layer.shape[0], layer.shape[2]
    dtype = torch.promote_types(layer.dtype, torch.float32)
    if readout is None:
        readout = torch.eye(1, tokens)[0]
    shape = tuple(readout.shape)
    if shape not in ((tokens,), (batch, tokens)):
        raise VitxError(f"readout must have shape ({tokens},) or ({batch}, {tokens}), found {shape}")
    return readout.detach().to(layer.device, dtype).expand(batch, tokens)

"""What methods share: heads are fused, relevance is carried through a layer, input is checked."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitx.errors import VitxError

HEAD_FUSIONS = ("mean", "max", "min")
_COMBINE: dict[str, Callable[..., Tensor]] = {"max": torch.maximum, "min": torch.minimum}


def fuse_heads(heads: Tensor, head_fusion: str) -> Tensor:
    """Reduces the heads, dimension 1."""
    if head_fusion == "mean":
        return heads.mean(1)
    return heads.amax(1) if head_fusion == "max" else heads.amin(1)


def fuse_into(fused: Tensor, head: Tensor, head_fusion: str, of_heads: int, *, first: bool) -> None:
    """Fuses a head, or the sum of some, into those before it, of the same shape; `first`: there are none."""
    if head_fusion == "mean":
        torch.mul(head, 1 / of_heads, out=fused) if first else fused.add_(head, alpha=1 / of_heads)
    else:
        fused.copy_(head) if first else _COMBINE[head_fusion](fused, head, out=fused)


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
        first = self._fused is None
        if self._fused is None:
            self._fused = torch.empty_like(weights[:, 0])
        if gradient is not None and self._head_fusion == "mean":
            if first:
                self._fused.zero_()
            for head, outer in zip(weights.unbind(1), gradient.unbind(1), strict=True):
                self._fused.addcmul_(head, outer, value=1 / of_heads)
        else:
            heads = weights if gradient is None else weights * gradient
            if heads.shape[1] == 1:
                part = heads[:, 0]  # as on a CPU, where a sum would be a copy
            else:
                part = heads.sum(1) if self._head_fusion == "mean" else fuse_heads(heads, self._head_fusion)
            fuse_into(self._fused, part, self._head_fusion, of_heads, first=first)
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
    start_layer = operator.index(start_layer)
    if not 0 <= start_layer < layers:
        raise VitxError(
            f"start_layer must be from 0 to {layers - 1}, as the model has {layers} layers, "
            f"found {start_layer}"
        )
    return int(start_layer)


def check_layers(layers: Sequence[Tensor], name: str) -> None:
    """Raises a VitxError unless the layers are (B, heads, N, N) with the same B and N."""
    if len(layers) == 0:
        raise VitxError(f"{name} is empty: give one (B, heads, N, N) tensor per layer")
    shape: tuple[int, ...] | None = None
    for layer in layers:
        found = tuple(getattr(layer, "shape", ()))
        if len(found) != 4 or found[2] != found[3]:
            raise VitxError(f"{name} must be (B, heads, N, N) tensors, found shape {found}")
        if shape is not None and (found[0], found[2]) != (shape[0], shape[2]):
            raise VitxError(f"{name} differ in batch or token count: found {shape} and {found}")
        shape = found


def check_readout(readout: Tensor | None, layer: Tensor) -> Tensor:
    """Returns the read-out as (B, N) in the precision of the maps; token 0 where there is none."""
    batch, tokens = layer.shape[0], layer.shape[2]
    dtype = torch.promote_types(layer.dtype, torch.float32)
    if readout is None:
        readout = torch.zeros(tokens)
        readout[0] = 1
    if tuple(readout.shape) not in ((tokens,), (batch, tokens)):
        raise VitxError(
            f"readout must have shape ({tokens},) or ({batch}, {tokens}), found {tuple(readout.shape)}"
        )
    return readout.detach().to(layer.device, dtype).expand(batch, tokens)

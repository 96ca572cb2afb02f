"""Steps that methods share: fusing heads, carrying relevance through a layer, and checking arguments."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.functional.tiles import Tile

HEAD_FUSIONS = ("mean", "max", "min")


def fused(
    tiles: Iterable[Tile], head_fusion: str, out: Tensor | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Fuse the heads of consecutive tiles one by one, so that only one tile at a time occupies the cache.

    Args:
        tiles: tiles of A, and of G if the gradient is known; the heads of the same rows are consecutive.
        head_fusion: "mean", "max" or "min".
        out: tensor for the result, (B, Q, K); by default, new tensors are allocated.

    Yields:
        Slices of images and rows, and A, or A * G if the gradient is known, fused there, (b, n, K).
    """
    found: Tensor | None = None
    for tile in tiles:
        if found is None:
            start = {"mean": 0.0, "max": -torch.inf, "min": torch.inf}[head_fusion]
            first = tile.weights[:, 0]
            found = torch.empty_like(first) if out is None else out[tile.images, tile.rows]
            found.fill_(start)
        for number, head in enumerate(tile.weights.unbind(1)):
            outer = None if tile.compute_gradient is None else tile.gradient[:, number]
            if head_fusion == "mean" and outer is not None:
                found.addcmul_(head, outer, value=1 / tile.of_heads)
            elif head_fusion == "mean":
                found.add_(head, alpha=1 / tile.of_heads)
            else:
                combine = torch.maximum if head_fusion == "max" else torch.minimum
                combine(found, head if outer is None else head * outer, out=found)
        if tile.heads.stop in (None, tile.of_heads):
            yield tile.images, tile.rows, found
            found = None


def carry(relevance: Tensor, heads: Tensor) -> Tensor:
    """Carry the relevance of tokens, (b, n), through the sum of heads, (b, g, n, K), to (b, K)."""
    return (relevance[:, None, None] @ heads).sum((1, 2))


def check_options(head_fusion: str, discard_ratio: float = 0.0) -> None:
    """Raise a VitxError unless both options are valid."""
    if head_fusion not in HEAD_FUSIONS:
        raise VitxError(f"head_fusion must be one of {', '.join(HEAD_FUSIONS)}, found {head_fusion!r}")
    number = isinstance(discard_ratio, (int, float)) and not isinstance(discard_ratio, bool)
    if not number or not 0 <= discard_ratio < 1:
        raise VitxError(f"discard_ratio must be at least 0 and below 1, found {discard_ratio!r}")


def first_layer(start_layer: Any, layers: int) -> int:
    """Return `start_layer` as an int, or raise a VitxError unless it is the index of a layer."""
    if isinstance(start_layer, bool) or not hasattr(start_layer, "__index__"):
        raise VitxError(f"start_layer must be a whole number, found {start_layer!r}")
    first = operator.index(start_layer)
    if not 0 <= first < layers:
        raise VitxError(
            f"start_layer must be from 0 to {layers - 1}, as the model has {layers} layers, found {first}"
        )
    return first


def check_layers(layers: Sequence[Tensor], name: str) -> None:
    """Raise a VitxError unless the layers are (B, heads, N, N) with the same B and N."""
    shapes = [tuple(getattr(layer, "shape", ())) for layer in layers]
    if not shapes:
        raise VitxError(f"{name} is empty: give one (B, heads, N, N) tensor per layer")
    for found in shapes:
        if len(found) != 4 or found[2] != found[3]:
            raise VitxError(f"{name} must be (B, heads, N, N) tensors, found shape {found}")
        if (found[0], found[2]) != (shapes[0][0], shapes[0][2]):
            raise VitxError(f"{name} differ in batch or token count: found {shapes[0]} and {found}")


def check_readout(readout: Tensor | None, layer: Tensor) -> Tensor:
    """Return the read-out as (B, N) in the precision of the maps; None stands for token 0."""
    batch, tokens = layer.shape[0], layer.shape[2]
    dtype = torch.promote_types(layer.dtype, torch.float32)
    if readout is None:
        readout = torch.eye(1, tokens, device="cpu")[0]
    shape = tuple(readout.shape)
    if shape not in ((tokens,), (batch, tokens)):
        raise VitxError(f"readout must have shape ({tokens},) or ({batch}, {tokens}), found {shape}")
    return readout.detach().to(layer.device, dtype).expand(batch, tokens)

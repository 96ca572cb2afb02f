"""What methods share: heads are fused, relevance is carried through a layer, input is checked."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitx.errors import VitxError

HEAD_FUSIONS = ("mean", "max", "min")


def fuse_heads(heads: Tensor, head_fusion: str) -> Tensor:
    """Reduces the heads, dimension 1."""
    if head_fusion == "mean":
        return heads.mean(1)
    return heads.amax(1) if head_fusion == "max" else heads.amin(1)


def carry(relevance: Tensor, matrix: Tensor) -> Tensor:
    """Takes the relevance of some tokens, (b, n), through their rows of a matrix, (b, n, N), to (b, N)."""
    return (relevance[:, None] @ matrix)[:, 0]


def check_options(head_fusion: str, discard_ratio: float = 0.0) -> None:
    """Raises a VitxError unless both options are in range."""
    if head_fusion not in HEAD_FUSIONS:
        raise VitxError(f"head_fusion must be one of {', '.join(HEAD_FUSIONS)}, found {head_fusion!r}")
    number = isinstance(discard_ratio, (int, float)) and not isinstance(discard_ratio, bool)
    if not number or not 0 <= discard_ratio < 1:
        raise VitxError(f"discard_ratio must be at least 0 and below 1, found {discard_ratio!r}")


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

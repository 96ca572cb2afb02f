"""The attention of the last layer, as the pictures of DINO show it."""

import torch
from torch import Tensor

from vitx.methods.registry import Observation, register
from vitx.propagation import Propagation
from vitx.relevance.fusing import HeadFusion, carry, check_options
from vitx.tiles import Tile


class LastAttention:
    """readout^T fuse(A) of the last layer alone: where the token that is read out attends to.

    Caron et al. 2021, arXiv 2104.14294, figure 1, the heads fused.
    """

    def __init__(self, readout: Tensor, head_fusion: str, layers: int) -> None:
        self.start_layer = layers - 1
        self.relevance = torch.zeros_like(readout)
        self._readout = readout
        self._fusion = HeadFusion(head_fusion)

    def read(self, tile: Tile) -> None:
        """Takes in some rows of the layer."""
        matrix = self._fusion.add(tile.weights, None, tile.of_heads)
        if matrix is not None:
            self.relevance[tile.images] += carry(self._readout[tile.images][:, tile.rows], matrix)

    def end_layer(self) -> None:
        """There is no layer below."""


@register("attention", fused_heads=True, title="last attention")
def attention(seen: Observation, *, head_fusion: str = "mean") -> Propagation:
    """The attention of the last layer, see `LastAttention`."""
    check_options(head_fusion)
    return LastAttention(seen.readout(head_fusion), head_fusion, len(seen.trace.layers))

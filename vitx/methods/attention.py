"""The attention of the last layer, as the pictures of DINO show it."""

from torch import Tensor

from vitx.attention.fusing import HeadFusion, carry, check_options
from vitx.attention.tiles import Tile
from vitx.methods.registry import register
from vitx.relevance.way_back import Found, Way


@register("attention", fused_heads=True)
def attention(way: Way, *, head_fusion: str = "mean") -> Found:
    """readout^T fuse(A) of the last layer alone: where the tokens that are read out attend to.

    Caron et al. 2021, arXiv 2104.14294, figure 1, the heads fused.
    """
    check_options(head_fusion)
    found = []
    for layer, readout in way.read_out(head_fusion):
        if head_fusion != "mean":
            layer.call.check_heads()
        fusion = HeadFusion(head_fusion)

        def attended(tile: Tile, readout: Tensor = readout, fusion: HeadFusion = fusion) -> Tensor | None:
            matrix = fusion.add(tile.weights, None, tile.of_heads)
            return None if matrix is None else carry(readout[tile.images][:, tile.rows], matrix)

        found.append(way.add_up(layer, attended))
    return way.place(found)

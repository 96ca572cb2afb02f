"""The attention of the last layer, as the pictures of DINO show it."""

from torch import Tensor

from vitx.functional.fusing import HeadFusion, carry, check_options
from vitx.functional.tiles import Tile
from vitx.methods.registry import register
from vitx.tape.backward import Attribution, Backward


@register("attention", fused_heads=True)
def attention(back: Backward, *, head_fusion: str = "mean") -> Attribution:
    """readout^T fuse(A) of the last layer alone: where the tokens that are read out attend to.

    Caron et al. 2021, arXiv 2104.14294, figure 1, the heads fused.
    """
    check_options(head_fusion)
    found = []
    for one, readout in back.read_out():
        fusion = HeadFusion(head_fusion)

        def attended(tile: Tile, readout: Tensor = readout, fusion: HeadFusion = fusion) -> Tensor | None:
            matrix = fusion.add(tile.weights, None, tile.of_heads)
            return None if matrix is None else carry(readout[tile.images][:, tile.rows], matrix)

        found.append(back.add_up(one, attended))
    return back.place(found)

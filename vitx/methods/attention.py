"""The attention of the last layer, as the pictures of DINO show it."""

from vitx.functional.fusing import carry, check_options, fused
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
        attended = readout.new_zeros(len(readout), one.weights.shape[3])
        for images, rows, matrix in fused(one.weights.tiles(), head_fusion):
            attended[images] += carry(readout[images][:, rows], matrix[:, None])
        found.append((one.inputs[0], one.to_values(attended)))
    return back.place(found)

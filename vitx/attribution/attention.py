"""The attention of the last layer, and the sensitivity of each layer's own score to its attention."""

from torch import Tensor

from vitx.attribution.registry import register
from vitx.functional.fusing import carry, fused
from vitx.functional.tiles import Tile
from vitx.tape.backward import Attribution, Backward


@register("attention", fused_heads=True)
def attention(back: Backward, *, head_fusion: str = "mean") -> Attribution:
    """Compute readout^T fuse(A) of the last layer alone (Caron et al. 2021, arXiv 2104.14294, figure 1)."""
    found = []
    for one, readout in back.read_out(head_fusion):
        attended = readout.new_zeros(len(readout), one.weights.shape[3])
        weights = one.weights if head_fusion == "mean" else back.heads(one)
        for images, rows, matrix in fused(weights.tiles(), head_fusion):
            attended[images] += carry(readout[images][:, rows], matrix[:, None])
        found.append((one.inputs[0], one.to_values(attended)))
    return back.place(found, head_fusion)


@register("legrad", gradient="layer scores", title="LeGrad")
def legrad(back: Backward, *, start_layer: int = 0, gradient: str = "linearised") -> Attribution:
    """Average relu(d s_l / d A_l) over layers l, heads and queries, where s_l is the layer's own score.

    See Bousselham et al. 2025, arXiv 2404.03214, eq. 6 to 9. Only the gradient enters, not A_l itself.
    """
    layers = back.counting(start_layer)

    def raised(tile: Tile) -> Tensor:
        return tile.gradient.relu().sum((1, 2)) / (len(layers) * tile.of_heads * tile.gradient.shape[3])

    attentions = [one for layer in layers for one in layer.attentions]
    return back.place([back.add_up(one, raised, gradient=True) for one in attentions])

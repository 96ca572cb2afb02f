"""LeGrad: the sensitivity of each layer's own score to its attention."""

from torch import Tensor

from vitx.functional.tiles import Tile
from vitx.methods.registry import register
from vitx.tape.backward import Attribution, Backward


@register("legrad", gradient="layer scores", title="LeGrad")
def legrad(back: Backward, *, start_layer: int = 0, gradient: str = "linearised") -> Attribution:
    """The mean over layers, heads and queries of relu(d s_l / d A_l), for s_l the score of layer l itself.

    Bousselham et al. 2025, arXiv 2404.03214, eq. 6 to 9. The attention does not enter, but for its gradient.
    """
    layers = back.counting(start_layer)

    def raised(tile: Tile) -> Tensor:
        terms = len(layers) * tile.of_heads * tile.gradient.shape[3]
        return tile.gradient.relu().sum((1, 2)) / terms

    attentions = [one for layer in layers for one in layer.attentions]
    return back.place([back.add_up(one, raised, gradient=True) for one in attentions])

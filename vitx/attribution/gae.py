"""Generic attention explainability: rollout of what raises the score, head by head."""

from torch import Tensor

from vitx.attribution.registry import register
from vitx.functional.tiles import Tile
from vitx.functional.weights import Weights
from vitx.tape.backward import Attribution, Backward
from vitx.tape.relevance import Rule


class Gae(Rule):
    """readout^T R for R = prod_l (I + E[relu(A_l * G_l)]), last layer on the left.

    Chefer et al. 2021, arXiv 2103.15679, eq. 5 and 6: E is the mean over the heads, and no row is scaled.
    """

    reads_gradient = of_heads = grows = True

    def __init__(self, start_layer: int) -> None:
        self.start_layer = start_layer

    def layer(self, relevance: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """An attention inside a residual: what a token has, it keeps."""

        def raising(tile: Tile) -> Tensor:
            return (tile.weights * tile.gradient).relu_()

        return weights.carry(relevance / weights.shape[1], raising), relevance


@register("gae", gradient="score", title="GAE")
def gae(back: Backward, *, start_layer: int = 0, gradient: str = "linearised") -> Attribution:
    """Generic attention explainability (Chefer et al. 2021), see `Gae`."""
    return back.propagate(Gae(start_layer))

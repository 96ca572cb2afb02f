"""Generic attention explainability: rollout of what raises the score, head by head."""

from dataclasses import dataclass

from torch import Tensor

from vitx.functional.fusing import carry_heads
from vitx.functional.tiles import Tile
from vitx.methods.registry import register
from vitx.tape.backward import Attribution, Backward
from vitx.tape.relevance import AllStays, Rule


class GaeLayer(AllStays):
    """Relevance through I + E[relu(A * G)]: what a token has, it keeps."""

    def read(self, tile: Tile) -> None:
        """Takes in some rows of the layer."""
        assert tile.gradient is not None
        heads = (tile.weights * tile.gradient).relu_()
        share = self.stays[tile.images][:, tile.rows] / tile.of_heads
        self.values[tile.images] += carry_heads(share, heads)


@dataclass(frozen=True)
class Gae(Rule):
    """readout^T R for R = prod_l (I + E[relu(A_l * G_l)]), last layer on the left.

    Chefer et al. 2021, arXiv 2103.15679, eq. 5 and 6: E is the mean over the heads, and no row is scaled.
    """

    start_layer: int
    reads_gradient = True
    of_heads = True
    grows = True

    def layer(self, relevance: Tensor, keys: int) -> GaeLayer:
        """An attention inside a residual."""
        return GaeLayer(relevance, keys)


@register("gae", gradient="score", title="GAE")
def gae(back: Backward, *, start_layer: int = 0, gradient: str = "linearised") -> Attribution:
    """Generic attention explainability (Chefer et al. 2021), see `Gae`."""
    return back.propagate(Gae(start_layer))

"""Generic attention explainability: rollout of what raises the score, head by head."""

from torch import Tensor

from vitx.methods.registry import Observation, register
from vitx.propagation import Propagation
from vitx.relevance import carry_heads
from vitx.tiles import Tile


class Gae:
    """readout^T R for R = prod_l (I + E[relu(A_l * G_l)]), last layer on the left.

    Chefer et al. 2021, arXiv 2103.15679, eq. 5 and 6: E is the mean over the heads, and no row is scaled.
    """

    def __init__(self, readout: Tensor, start_layer: int) -> None:
        self.start_layer = start_layer
        self._begin(readout)

    def read(self, tile: Tile) -> None:
        """Takes in some rows of the layer."""
        assert tile.gradient is not None
        heads = (tile.weights * tile.gradient).relu_()
        share = self.relevance[tile.images][:, tile.rows] / tile.of_heads
        self._below[tile.images] += carry_heads(share, heads)

    def end_layer(self) -> None:
        """Goes on to the layer below."""
        self._begin(self._below)

    def _begin(self, relevance: Tensor) -> None:
        self.relevance = relevance
        self._below = relevance.clone()  # the identity: what a token has, it keeps


@register("gae", gradient="score", title="GAE")
def gae(seen: Observation, *, start_layer: int = 0) -> Propagation:
    """Generic attention explainability (Chefer et al. 2021), see `Gae`."""
    return Gae(seen.readout("mean"), seen.first_layer(start_layer))

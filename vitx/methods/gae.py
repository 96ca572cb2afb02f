"""Generic attention explainability: rollout of what raises the score, head by head."""

from dataclasses import dataclass

from torch import Tensor

from vitx.attention.fusing import carry_heads
from vitx.attention.layer import Attention
from vitx.attention.tiles import Tile
from vitx.methods.registry import register
from vitx.relevance.carrier import Carrier
from vitx.relevance.chain import RolloutLayer
from vitx.relevance.way_back import Found, Way


class GaeLayer:
    """Relevance through I + E[relu(A * G)]: what a token has, it keeps.

    Attributes:
        values: what the tokens that are attended to get, (B, K).
        stays: what the tokens that attend keep, (B, Q).
    """

    def __init__(self, relevance: Tensor, keys: int) -> None:
        self.values = relevance.new_zeros(len(relevance), keys)
        self.stays = relevance

    def read(self, tile: Tile) -> None:
        """Takes in some rows of the layer."""
        assert tile.gradient is not None
        heads = (tile.weights * tile.gradient).relu_()
        share = self.stays[tile.images][:, tile.rows] / tile.of_heads
        self.values[tile.images] += carry_heads(share, heads)

    def end(self) -> None:
        """Nothing waits for other rows."""


@dataclass(frozen=True)
class Gae(Carrier):
    """readout^T R for R = prod_l (I + E[relu(A_l * G_l)]), last layer on the left.

    Chefer et al. 2021, arXiv 2103.15679, eq. 5 and 6: E is the mean over the heads, and no row is scaled.
    """

    start_layer: int
    reads_gradient = True
    of_heads = True
    grows = True

    def keeps(self, attention: Attention) -> float:
        """All of it."""
        return 1.0

    def layer(self, relevance: Tensor, keys: int) -> GaeLayer:
        """An attention inside a residual."""
        return GaeLayer(relevance, keys)

    def pooling(self, relevance: Tensor, keys: int) -> RolloutLayer:
        """An attention without one: the mean of its heads alone."""
        return RolloutLayer(relevance, keys, residual=False)


@register("gae", gradient="score", title="GAE")
def gae(way: Way, *, start_layer: int = 0, gradient: str = "linearised") -> Found:
    """Generic attention explainability (Chefer et al. 2021), see `Gae`."""
    return way.through(Gae(start_layer))

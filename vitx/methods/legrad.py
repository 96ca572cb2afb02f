"""LeGrad: the sensitivity of each layer's own score to its attention."""

import torch
from torch import Tensor

from vitx.methods.registry import Observation, register
from vitx.propagation import Propagation
from vitx.tiles import Tile


class LeGrad:
    """The mean over layers, heads and queries of relu(d s_l / d A_l), for s_l the score of layer l itself.

    Bousselham et al. 2025, arXiv 2404.03214, eq. 6 to 9. The attention does not enter, but for its gradient.
    """

    def __init__(self, readout: Tensor, layers: int, start_layer: int) -> None:
        self.start_layer = start_layer
        self.relevance = torch.zeros_like(readout)
        self._layers = layers - start_layer

    def read(self, tile: Tile) -> None:
        """Takes in some rows of the layer."""
        assert tile.gradient is not None
        terms = self._layers * tile.of_heads * tile.gradient.shape[3]
        self.relevance[tile.images] += tile.gradient.relu().sum((1, 2)) / terms

    def end_layer(self) -> None:
        """Each layer counts for itself."""


@register("legrad", gradient="layer scores", title="LeGrad")
def legrad(seen: Observation, *, start_layer: int = 0) -> Propagation:
    """LeGrad (Bousselham et al. 2025), see `LeGrad`."""
    first = seen.first_layer(start_layer)
    return LeGrad(seen.readout("mean"), len(seen.trace.layers), first)

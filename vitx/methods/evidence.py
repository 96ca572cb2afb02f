"""Evidence: what the content of each patch adds to the score where the classifier reads."""

import torch
from torch import Tensor

from vitx.methods.registry import Observation, register
from vitx.propagation import Propagation
from vitx.tiles import Tile


class Evidence:
    """relu(sum_l sum_i E[A_l * G_l](i, j)), over the tokens i that are read out: patch j's contribution.

    G is the gradient of the score while every layer attends as it does, so that attention passes on what
    tokens hold and nothing else (Ali et al. 2022, arXiv 2202.07304, fix it in the same way). Then A(i, j) *
    G(i, j) is what the value of token j, as token i takes it in, adds to the score: to first order for what
    comes after, and negative where it speaks against the class. E is the mean over the heads.

    Nothing is rolled out: what reaches a class token over other tokens does not count. In models that
    average the patches, or pool them by attention, every token is read out: the map then shows what tokens
    take in from each other, and not what each one keeps of its own.
    """

    def __init__(self, readout: Tensor, start_layer: int) -> None:
        self.start_layer = start_layer
        self._read_out = (readout > 0).any(0)  # which tokens
        self._balance = torch.zeros_like(readout)

    def read(self, tile: Tile) -> None:
        """Takes in some rows of the layer."""
        rows = self._read_out[tile.rows].nonzero()[:, 0]
        if len(rows):
            effect = tile.weights[:, :, rows] * tile.gradient_of(rows)
            self._balance[tile.images] += effect.sum((1, 2)) / tile.of_heads

    def end_layer(self) -> None:
        """Each layer adds to what is read out."""

    @property
    def relevance(self) -> Tensor:
        """What speaks for the score in all layers seen so far, less what speaks against it, (B, N), >= 0."""
        return self._balance.relu()


@register("evidence", gradient="score with A fixed")
def evidence(seen: Observation, *, start_layer: int = 0) -> Propagation:
    """What speaks for the class, less what speaks against it, see `Evidence`."""
    return Evidence(seen.readout("mean"), seen.first_layer(start_layer))

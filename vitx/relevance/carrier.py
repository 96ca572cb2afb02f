"""What a method makes of the attentions that its relevance passes."""

from typing import Protocol

from torch import Tensor

from vitx.attention.layer import Attention
from vitx.attention.tiles import Tile


class Layer(Protocol):
    """What a method makes of one attention.

    Attributes:
        values: the relevance of the tokens that were attended to, (B, K).
        stays: what the tokens that attended keep by the residual, (B, Q).
    """

    values: Tensor
    stays: Tensor

    def read(self, tile: Tile) -> None:
        """Takes in some rows."""

    def end(self) -> None:
        """All rows were read."""


class Carrier:
    """A method that takes relevance through one attention after another.

    Attributes:
        start_layer: the first attention inside a residual that counts; what is below keeps its place.
        reads_gradient: whether it reads the gradient of A.
        of_heads: whether the map changes with which dimension holds the heads.
        grows: whether a layer hands on more than it got, as GAE's does.
    """

    start_layer: int = 0
    reads_gradient: bool = False
    of_heads: bool = False
    grows: bool = False

    def keeps(self, attention: Attention) -> float | None:
        """What share of its relevance a token keeps by the residual; None if that depends on A."""
        return None

    def layer(self, relevance: Tensor, keys: int) -> Layer:
        """Begins with an attention inside a residual, from the relevance of its queries, (B, Q)."""
        raise NotImplementedError

    def pooling(self, relevance: Tensor, keys: int) -> Layer:
        """Begins with an attention without a residual, whose rows are the fused A alone."""
        raise NotImplementedError

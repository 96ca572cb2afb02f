"""Formulas of the methods on plain tensors, without a model, and the tiles in which they are computed."""

from vitx.functional.fusing import carry, fused
from vitx.functional.tiles import Tile
from vitx.functional.weights import Weights

__all__ = ["Tile", "Weights", "carry", "fused"]

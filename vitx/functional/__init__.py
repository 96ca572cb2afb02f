"""The maths of the methods on plain tensors, without a model; and the tiles in which it is computed."""

from vitx.functional.fusing import HeadFusion, carry, carry_heads
from vitx.functional.tiles import Tile

__all__ = ["HeadFusion", "Tile", "carry", "carry_heads"]

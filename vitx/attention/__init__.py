"""Seeing attention: what describes A, the tiles in which it is computed, the kernels, and `capture`.

Nothing here knows a method, or how relevance travels.
"""

from vitx.attention.tiles import Tile

__all__ = ["Tile"]

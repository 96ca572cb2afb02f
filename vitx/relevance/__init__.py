"""How relevance travels: back through what a forward pass computed, from the logits to the pixels.

`shadow` watches the pass, `rules` says where the relevance of each call goes, `lineage` tells a residual
from any other sum, `attending` stands for one attention, `grid` makes a map of relevant pixels, and `fusing`
is what methods share. Nothing here reads what a model declares.
"""

from vitx.relevance.fusing import HeadFusion, carry, carry_heads

__all__ = ["HeadFusion", "carry", "carry_heads"]

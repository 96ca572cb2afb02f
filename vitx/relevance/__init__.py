"""How relevance travels: back through what a forward pass computed, from the logits to the pixels.

`watching` runs the pass, `shadow` watches it, and `attentions` what in it attends; `live` is what is known
of a tensor. `calls` says which rule each function follows, `names` and `equations` read its arguments, and
`rules`, `shapes`, `sliding` and `kernels` are the rules. `linearised`, with `gates` and `norms`, is the
network of which gradients are taken. `lineage` tells a residual from any other sum, `residual` says what it
gives to whom, `attending` stands for one attention, and `heads` says how it lies in its tensors. `carrier`
is what a method makes of it. `way_back` takes relevance from the logits to the pixels, `conservation`
checks it, and `grid` makes it a map. `apart` is about memory. Nothing here reads what a model declares.
"""

from vitx.attention.fusing import HeadFusion, carry, carry_heads

__all__ = ["HeadFusion", "carry", "carry_heads"]

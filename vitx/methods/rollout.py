"""Attention rollout and gradient rollout."""

from vitx.methods.registry import Observation, register
from vitx.propagation import Propagation
from vitx.relevance import check_options
from vitx.rollout import Rollout


# The lower line registers first. A gradient, where there is one, comes with the tiles.
@register("grad_rollout", gradient="score", title="gradient rollout")
@register("rollout", fused_heads=True, title="attention rollout")
def rollout(
    seen: Observation, *, head_fusion: str = "mean", discard_ratio: float = 0.0, start_layer: int = 0
) -> Propagation:
    """Both rollouts, see `vitx.attention_rollout` and `vitx.gradient_rollout`."""
    check_options(head_fusion, discard_ratio)
    readout = seen.readout(head_fusion)
    return Rollout(readout, head_fusion, discard_ratio, seen.first_layer(start_layer))

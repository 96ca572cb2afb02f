"""Attention flow."""

from vitx.flow import Flow
from vitx.methods.registry import Observation, register
from vitx.propagation import Propagation
from vitx.relevance.fusing import check_options


@register("flow", fused_heads=True, title="attention flow", slow=True)
def flow(seen: Observation, *, head_fusion: str = "mean", start_layer: int = 0) -> Propagation:
    """Attention flow, see `vitx.attention_flow`."""
    check_options(head_fusion)
    readout, first = seen.readout(head_fusion), seen.first_layer(start_layer)
    return Flow(readout, head_fusion, first, seen.tokens.prefix)

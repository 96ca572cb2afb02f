"""Attention rollout and gradient rollout."""

from dataclasses import dataclass

from torch import Tensor

from vitx.methods.registry import register
from vitx.relevance.attending import Carrier
from vitx.relevance.fusing import check_options
from vitx.rollout import RolloutLayer


@dataclass(frozen=True)
class Rollouts:
    """Both rollouts: each attention inside a residual is rownorm(W + I), see `RolloutLayer`."""

    gradient: bool
    head_fusion: str
    discard_ratio: float
    start_layer: int
    grows = False

    @property
    def of_heads(self) -> bool:
        """Whether heads apart give another map than heads together: not where only their mean counts."""
        return self.gradient or self.head_fusion != "mean" or self.discard_ratio > 0

    def layer(self, relevance: Tensor, keys: int) -> RolloutLayer:
        """An attention inside a residual."""
        return RolloutLayer(relevance, keys, self.head_fusion, self.discard_ratio)

    def pooling(self, relevance: Tensor, keys: int) -> RolloutLayer:
        """An attention without one: the fused A alone."""
        return RolloutLayer(relevance, keys, self.head_fusion, residual=False)


# The lower line registers first.
@register("grad_rollout", carries=True, gradient="score", title="gradient rollout")
@register("rollout", carries=True, fused_heads=True, title="attention rollout")
def rollout(
    gradient: bool, *, head_fusion: str = "mean", discard_ratio: float = 0.0, start_layer: int = 0
) -> Carrier:
    """Both rollouts, see `vitx.attention_rollout` and `vitx.gradient_rollout`."""
    check_options(head_fusion, discard_ratio)
    return Rollouts(gradient, head_fusion, discard_ratio, start_layer)

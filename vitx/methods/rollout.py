"""Attention rollout and gradient rollout."""

from dataclasses import dataclass

from torch import Tensor

from vitx.attention.fusing import check_options
from vitx.attention.layer import Attention
from vitx.methods.registry import register
from vitx.relevance.carrier import Carrier
from vitx.relevance.chain import RolloutLayer
from vitx.relevance.way_back import Found, Way


@dataclass(frozen=True)
class Rollouts(Carrier):
    """Both rollouts: each attention inside a residual is rownorm(W + I), see `RolloutLayer`."""

    head_fusion: str
    discard_ratio: float
    start_layer: int
    reads_gradient: bool = False

    def __post_init__(self) -> None:
        """Checks the options."""
        check_options(self.head_fusion, self.discard_ratio)

    @property
    def of_heads(self) -> bool:  # type: ignore[override]
        """Whether heads apart give another map than heads together: not where only their mean counts."""
        return self.reads_gradient or self.head_fusion != "mean" or self.discard_ratio > 0

    def keeps(self, attention: Attention) -> float | None:
        """A half where the rows of the fused A sum to 1."""
        fixed = not self.of_heads and attention.sums_to_1
        return 0.5 if fixed else None

    def layer(self, relevance: Tensor, keys: int) -> RolloutLayer:
        """An attention inside a residual."""
        return RolloutLayer(relevance, keys, self.head_fusion, self.discard_ratio)

    def pooling(self, relevance: Tensor, keys: int) -> RolloutLayer:
        """An attention without one: the fused A alone."""
        return RolloutLayer(relevance, keys, self.head_fusion, residual=False)


@register("rollout", fused_heads=True, title="attention rollout")
def rollout(
    way: Way, *, head_fusion: str = "mean", discard_ratio: float = 0.0, start_layer: int = 0
) -> Found:
    """Attention rollout, see `vitx.attention_rollout`."""
    return way.through(Rollouts(head_fusion, discard_ratio, start_layer))


@register("grad_rollout", gradient="score", title="gradient rollout")
def grad_rollout(
    way: Way,
    *,
    head_fusion: str = "mean",
    discard_ratio: float = 0.0,
    start_layer: int = 0,
    gradient: str = "linearised",
) -> Found:
    """Gradient rollout, see `vitx.gradient_rollout`."""
    return way.through(Rollouts(head_fusion, discard_ratio, start_layer, reads_gradient=True))

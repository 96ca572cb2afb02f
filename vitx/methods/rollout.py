"""Attention rollout and gradient rollout."""

from dataclasses import dataclass

from torch import Tensor

from vitx.functional.fusing import check_options
from vitx.functional.rollout import RolloutLayer
from vitx.methods.registry import register
from vitx.tape.backward import Attribution, Backward
from vitx.tape.relevance import Rule
from vitx.tape.weights import Weights


@dataclass(frozen=True)
class Rollouts(Rule):
    """Both rollouts: each attention inside a residual is rownorm(W + I), see `RolloutLayer`."""

    head_fusion: str
    discard_ratio: float
    start_layer: int
    reads_gradient: bool = False

    def __post_init__(self) -> None:
        check_options(self.head_fusion, self.discard_ratio)

    @property
    def of_heads(self) -> bool:  # type: ignore[override]
        """Whether heads apart give another map than heads together: not where only their mean counts."""
        return self.reads_gradient or self.head_fusion != "mean" or self.discard_ratio > 0

    @property
    def whole(self) -> bool:  # type: ignore[override]
        """Whether entries of a whole A are compared."""
        return self.discard_ratio > 0

    def keeps_half(self, weights: Weights) -> bool:
        """Returns whether the rows of the fused A sum to 1."""
        return not self.of_heads and weights.sums_to_1

    def layer(self, relevance: Tensor, keys: int) -> RolloutLayer:
        """An attention inside a residual."""
        return RolloutLayer(relevance, keys, self.head_fusion, self.discard_ratio)

    def pooling(self, relevance: Tensor, keys: int) -> RolloutLayer | None:
        """An attention without one: the fused A alone."""
        if self.head_fusion == "mean":
            return None
        return RolloutLayer(relevance, keys, self.head_fusion, residual=False)


@register("rollout", fused_heads=True, title="attention rollout")
def rollout(
    back: Backward, *, head_fusion: str = "mean", discard_ratio: float = 0.0, start_layer: int = 0
) -> Attribution:
    """Attention rollout, see `vitx.attention_rollout`."""
    return back.propagate(Rollouts(head_fusion, discard_ratio, start_layer))


@register("grad_rollout", gradient="score", title="gradient rollout")
def grad_rollout(
    back: Backward,
    *,
    head_fusion: str = "mean",
    discard_ratio: float = 0.0,
    start_layer: int = 0,
    gradient: str = "linearised",
) -> Attribution:
    """Gradient rollout, see `vitx.gradient_rollout`."""
    return back.propagate(Rollouts(head_fusion, discard_ratio, start_layer, reads_gradient=True))

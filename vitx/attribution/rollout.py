"""Attention rollout, gradient rollout and GAE, which propagate relevance layer by layer."""

from functools import partial

from torch import Tensor

from vitx.attribution.registry import register
from vitx.functional.fusing import check_options, fused
from vitx.functional.rollout import through_layer
from vitx.functional.tiles import Tile
from vitx.functional.weights import Weights
from vitx.tape.backward import Attribution, Backward
from vitx.tape.relevance import Rule


class Rollouts(Rule):
    """The rule of both rollouts: an attention inside a residual is rownorm(W + I), see `through_layer`."""

    def __init__(
        self, head_fusion: str, discard_ratio: float, start_layer: int, reads_gradient: bool = False
    ) -> None:
        check_options(head_fusion, discard_ratio)
        super().__init__(head_fusion)
        self.discard_ratio, self.start_layer = discard_ratio, start_layer
        self.reads_gradient, self.whole = reads_gradient, discard_ratio > 0
        self.of_heads = reads_gradient or self.whole or head_fusion != "mean"
        self.halves = not self.of_heads
        self.fuse = partial(fused, head_fusion=head_fusion)

    def layer(self, relevance: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """Take relevance back through an attention inside a residual."""
        return through_layer(relevance, weights, self.head_fusion, self.discard_ratio)


@register("rollout", fused_heads=True, title="attention rollout")
def rollout(
    back: Backward,
    *,
    head_fusion: str = "mean",
    discard_ratio: float = 0.0,
    start_layer: int = 0,
    without_sinks: bool = False,
) -> Attribution:
    """Compute attention rollout, see `vitx.attention_rollout`."""
    return back.propagate(Rollouts(head_fusion, discard_ratio, start_layer), without_sinks=without_sinks)


@register("grad_rollout", gradient="score", title="gradient rollout")
def grad_rollout(
    back: Backward,
    *,
    head_fusion: str = "mean",
    discard_ratio: float = 0.0,
    start_layer: int = 0,
    gradient: str = "linearised",
    without_sinks: bool = False,
) -> Attribution:
    """Compute gradient rollout, see `vitx.gradient_rollout`."""
    rule = Rollouts(head_fusion, discard_ratio, start_layer, reads_gradient=True)
    return back.propagate(rule, without_sinks=without_sinks)


class Gae(Rule):
    """The rule of GAE: readout^T R for R = prod_l (I + E[relu(A_l * G_l)]), last layer on the left.

    See Chefer et al. 2021, arXiv 2103.15679, eq. 5 and 6. E is the mean over heads; rows are not normalized.
    """

    reads_gradient = of_heads = grows = True

    def __init__(self, start_layer: int) -> None:
        super().__init__()
        self.start_layer = start_layer

    def layer(self, relevance: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        """Take relevance back through an attention inside a residual; each query also keeps all it has."""

        def raising(tile: Tile) -> Tensor:
            return (tile.weights * tile.gradient).relu_()

        return weights.carry(relevance / weights.shape[1], raising), relevance


@register("gae", gradient="score", title="GAE")
def gae(back: Backward, *, start_layer: int = 0, gradient: str = "linearised") -> Attribution:
    """Compute generic attention explainability (Chefer et al. 2021), see `Gae`."""
    return back.propagate(Gae(start_layer))

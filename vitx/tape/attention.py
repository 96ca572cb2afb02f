"""An attention of the pass, and the layers that residuals make of attentions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vitx.functional.weights import Weights
from vitx.tape.contraction import Layout
from vitx.tape.expanded import scaled, summed
from vitx.tape.values import Step, Value

if TYPE_CHECKING:
    from vitx.tape.sums import Sum


class Scores(Step):
    """A product of two live values, as q k^T, which is to become the weights of an attention.

    Attributes:
        contracts_channels: tells whether it is summed over channels: it compares tokens, and mixes none.
    """

    def __init__(self, *step: Any, contracts_channels: Callable[[], bool]) -> None:
        super().__init__(*step)
        self.contracts_channels = contracts_channels


class Mixture(Step):
    """A product of weights and weights."""


class Attention(Step):
    """Weights times values.

    Attributes:
        inputs: the values, and what asked: the weights, or the queries of a fused kernel.
        weights: A.
        layout: how it lies in the tensors of the model.
        residuals: the residuals around it.
        origin: the number of the last residual, or of the image, that its values were made from.
    """

    def __init__(self, *step: Any, weights: Weights, layout: Layout, origin: int) -> None:
        super().__init__(*step)
        self.relevance = lambda arrived: [self.shared(arrived[0])]
        self.weights, self.layout, self.origin = weights, layout, origin
        self.residuals: set[Sum] = set()

    @property
    def value(self) -> Value:
        """What it put out."""
        return self.outputs[0]

    @property
    def rows_of_heads(self) -> int:
        """How many rows A has in all, which counts its heads where it has some of a layer's tokens alone."""
        return self.weights.shape[0] * self.layout.count("H") * self.weights.shape[2]

    def arrived(self, r: Tensor) -> Tensor:
        """Brings relevance or a gradient of what it put out to (T, H, Q, d)."""
        return self.layout.grouped(r, "THQD")

    def shared(self, r: Tensor) -> Tensor:
        """Takes relevance of what it put out through rows that sum to 1, to the values."""
        r = self.arrived(r)
        if self.weights.shape[1] < r.shape[1]:  # its heads were fused
            tokens = summed(r, [1, 3])
            return self.to_values(self.weights.shared(tokens[:, None, :, None])[:, 0, :, 0])
        found = self.weights.shared(r[..., :1] if r.stride(-1) == 0 else r)
        return self.layout.to_values(found.expand(*found.shape[:3], r.shape[3]))

    def to_values(self, found: Tensor) -> Tensor:
        """Shares what the keys have, (T, K), out evenly among their values, in the shape of the model."""
        heads, channels = self.layout.count("H"), self.layout.count("D")
        found = scaled(found[:, None, :, None].expand(-1, heads, -1, channels), 1 / (heads * channels))
        return self.layout.to_values(found)


@dataclass(eq=False)
class Layer:
    """The attentions that one residual closes.

    Attributes:
        number: layers are counted from 0, in the order in which they ran.
        attentions: in the order in which they ran.
        residuals: the sums that close them: more than one where the tokens are added in parts.
    """

    number: int
    attentions: Sequence[Attention]
    residuals: frozenset["Sum"]


def layers_of(attentions: Sequence[Attention]) -> list[Layer]:
    """Groups the attentions that have a residual in common; those without any are in no layer."""
    groups: list[tuple[list[Attention], set[Sum]]] = []
    for attention in attentions:
        if attention.residuals:
            members, around = [attention], set(attention.residuals)
            for group in [group for group in groups if group[1] & around]:
                groups.remove(group)
                members, around = group[0] + members, group[1] | around
            groups.append((members, around))
    groups.sort(key=lambda group: group[0][0].value.number)
    return [Layer(n, members, frozenset(around)) for n, (members, around) in enumerate(groups)]

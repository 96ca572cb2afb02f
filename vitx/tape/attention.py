"""The attentions of a pass, and the scores that their weights are computed from."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vitx.functional.weights import Weights
from vitx.tape.contraction import Layout
from vitx.tape.expanded import scaled, summed
from vitx.tape.values import Step, Value


class Scores(Step):
    """A product of two live values, such as q k^T, that is to become the weights of an attention.

    Attributes:
        contracts_channels: returns whether the sum is over channels: it compares tokens without mixing them.
    """

    def __init__(self, *step: Any, contracts_channels: Callable[[], bool]) -> None:
        super().__init__(*step)
        self.contracts_channels = contracts_channels


class Mixture(Step):
    """A product of attention weights with attention weights."""


class Attention(Step):
    """Attention weights times values.

    Attributes:
        inputs: the values, and the source of A: the weights themselves, or the queries of a fused kernel.
        weights: A.
        layout: its layout in the tensors of the model.
        residuals: the residuals around it, each a `vitx.tape.sums.Sum`.
        last_residual: the number of the last residual, or of the image, that its values were computed from.
        divided: whether A was divided by its sums after it had multiplied the values.
    """

    divided = False

    def __init__(self, *step: Any, weights: Weights, layout: Layout, last_residual: int) -> None:
        super().__init__(*step)
        self.relevance = lambda arrived: [self.shared(arrived[0])]
        self.weights, self.layout, self.last_residual = weights, layout, last_residual
        self.residuals: set[Any] = set()

    @property
    def value(self) -> Value:
        """The value of its output."""
        return self.outputs[0]

    @property
    def rows_of_heads(self) -> int:
        """The number of rows of A in all heads: fewer if it holds only part of a layer's tokens."""
        return self.weights.shape[0] * self.layout.count("H") * self.weights.shape[2]

    def arrived(self, r: Tensor) -> Tensor:
        """Bring a gradient of the output to (T, H, Q, d)."""
        return self.layout.grouped(r, "THQD")

    def rows(self, r: Tensor) -> Tensor:
        """Return the relevance of each row of A, (T, Q), given that of the output."""
        return summed(self._relevance(r), [1, 3])

    def shared(self, r: Tensor) -> Tensor:
        """Take relevance of the output to the values, through rows of A that are scaled to sum to 1."""
        if self.weights.shape[1] < self.layout.count("H"):  # its heads were fused
            return self.to_values(self.weights.shared(self.rows(r)[:, None, :, None])[:, 0, :, 0])
        r = self._relevance(r)
        found = self.weights.shared(r[..., :1] if r.stride(-1) == 0 else r)
        return self.layout.to_values(found.expand(*found.shape[:3], r.shape[3]))

    def _relevance(self, r: Tensor) -> Tensor:
        """Bring relevance to (T, H, Q, d); heads that are added up share it evenly."""
        added = self.layout.added_heads
        return self.arrived(r) if added == 1 else scaled(self.arrived(r), 1 / added)

    def to_values(self, found: Tensor) -> Tensor:
        """Distribute what the keys got, (T, K), evenly among their values, in the shape of the model."""
        heads, channels = self.layout.count("H"), self.layout.count("D")
        found = scaled(found[:, None, :, None].expand(-1, heads, -1, channels), 1 / (heads * channels))
        return self.layout.to_values(found)

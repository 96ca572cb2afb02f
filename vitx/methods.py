"""The methods by name: each one turns a trace into the relevance of every token.

To add one, write a function like those below and decorate it; `vitx.explain`, the callback and every
error message then know it.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitx.errors import VitxError
from vitx.relevance import chain, check_options, layer_matrix
from vitx.tokens import Tokens
from vitx.trace import Attention, Trace


@dataclass(frozen=True)
class Evidence:
    """What a method works on.

    Attributes:
        trace: the attention of the forward pass.
        tokens: prefix, grid and read-out.
        output_gradients: the gradient of the score with respect to each layer's output, first layer
            first; empty for methods that need none.
    """

    trace: Trace
    tokens: Tokens
    output_gradients: Sequence[Tensor] = ()

    def readout(self, head_fusion: str) -> Tensor:
        """Returns the read-out as (B, N), in the precision of the maps."""
        layer = self.trace.layers[-1]
        row = self.tokens.readout(head_fusion)
        return row.to(layer.dtype).to(layer.device).expand(layer.shape[0], -1)

    def attentions(self, start_layer: int) -> Iterator[Tensor]:
        """Computes A of each layer, last layer first, one at a time."""
        return (layer.weights() for layer in reversed(self._from(start_layer)))

    def gradients(self, start_layer: int) -> Iterator[Tensor]:
        """Computes the gradient of the score with respect to A, last layer first, one at a time."""
        pairs = zip(self._from(start_layer), self.output_gradients[start_layer:], strict=True)
        return (layer.weights_gradient(gradient) for layer, gradient in reversed(list(pairs)))

    def _from(self, start_layer: int) -> Sequence[Attention]:
        layers = self.trace.layers
        if isinstance(start_layer, bool) or not isinstance(start_layer, int):
            raise VitxError(f"start_layer must be a whole number, found {start_layer!r}")
        if not 0 <= start_layer < len(layers):
            raise VitxError(
                f"start_layer must be from 0 to {len(layers) - 1}, as the model has {len(layers)} layers, "
                f"found {start_layer}"
            )
        return layers[start_layer:]


@dataclass(frozen=True)
class Method:
    """A method: a function of the evidence and its options, which are its keyword arguments."""

    compute: Callable[..., Tensor]
    needs_gradients: bool

    def check(self, name: str, options: dict[str, Any]) -> None:
        """Raises a VitxError if the method does not know an option."""
        known = [
            p.name for p in inspect.signature(self.compute).parameters.values() if p.kind == p.KEYWORD_ONLY
        ]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise VitxError(f"{name} has no option {unknown[0]!r}: its options are {', '.join(known)}")


_METHODS: dict[str, Method] = {}


def register(name: str, *, needs_gradients: bool) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Makes a function a method of that name."""

    def add(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _METHODS[name] = Method(compute, needs_gradients)
        return compute

    return add


def methods() -> list[str]:
    """Returns the names of the methods.

    Example:
        >>> methods()
        ['rollout', 'grad_rollout']
    """
    return list(_METHODS)


def find_method(name: str) -> Method:
    """Returns the method of that name, or raises a VitxError that lists them."""
    if name not in _METHODS:
        raise VitxError(f"there is no method {name!r}: the methods are {', '.join(_METHODS)}")
    return _METHODS[name]


@register("rollout", needs_gradients=False)
def rollout(
    evidence: Evidence, *, head_fusion: str = "mean", discard_ratio: float = 0.0, start_layer: int = 0
) -> Tensor:
    """Attention rollout, see `vitx.attention_rollout`."""
    check_options(head_fusion, discard_ratio)
    matrices = (
        layer_matrix(attention, head_fusion=head_fusion, discard_ratio=discard_ratio)
        for attention in evidence.attentions(start_layer)
    )
    return chain(matrices, evidence.readout(head_fusion))


@register("grad_rollout", needs_gradients=True)
def grad_rollout(
    evidence: Evidence, *, head_fusion: str = "mean", discard_ratio: float = 0.0, start_layer: int = 0
) -> Tensor:
    """Gradient rollout, see `vitx.gradient_rollout`."""
    check_options(head_fusion, discard_ratio)
    pairs = zip(evidence.attentions(start_layer), evidence.gradients(start_layer), strict=True)
    matrices = (
        layer_matrix(attention, gradient, head_fusion=head_fusion, discard_ratio=discard_ratio)
        for attention, gradient in pairs
    )
    return chain(matrices, evidence.readout(head_fusion))

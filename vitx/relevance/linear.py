"""What a value of the pass is on the way back: a linear function, or a constant."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitx.relevance.live import Live, Watched
from vitx.relevance.names import Function, replaced

# Makes a call of the model so that it is linear on the way back.
Held = Callable[[Watched, Function, Any, dict[str, Any], list[Live]], Any]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        constant: Tensor | None,
        value: Callable[[], Tensor],
        back: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.set_materialize_grads(False)  # else a way back of relevance alone would compute with zeros
        ctx.back, ctx.dtype = back, x.dtype
        ctx.adds = None if constant is None else constant.shape
        return value()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        adds = gradient.sum_to_size(ctx.adds) if ctx.needs_input_grad[1] else None
        into = ctx.back(gradient).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return into, adds, None, None


def linear(
    x: Tensor, value: Tensor, back: Callable[[Tensor], Tensor], constant: Tensor | None = None
) -> Tensor:
    """A value as a linear function of x, whose transpose is known, and a constant, where that counts."""
    found: Tensor = _Linear.apply(x, constant, lambda: value, back)
    return found


def constant(watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]) -> Any:
    """Makes a call whose value is a constant."""
    given, named = replaced((args, kwargs), held)
    return func(*given, **named)


def held(value: Any) -> Any:
    """Returns a tensor as a constant, and anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value

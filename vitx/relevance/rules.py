"""Where relevance goes on its way back: one rule for each kind of call.

A *shadow* stands beside each tensor that depends on the image; its gradient is the tensor's relevance. It has
the tensor's shape and strides of 0, so it costs no memory. It is *thin* where only the sum over a dimension
counts, as over the channels that a weight put out: there it has size 1, and relevance is one number for each
token. A shape operation is simply done to the shadow, too. Any other call is a `follow`: the shadow of its
output, and a function that shares out its relevance among the inputs.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

Back = Callable[[Tensor], Sequence[Tensor | None]]


def blank(shape: Sequence[int], like: Tensor) -> Tensor:
    """A shadow: a tensor of this shape that takes no memory."""
    return _zero(like.dtype, like.device).expand(tuple(shape))


@cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device)


class _Follow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: Sequence[int], back: Back, *shadows: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.back, ctx.inputs = back, len(shadows)
        return blank(shape, shadows[0])

    @staticmethod
    def backward(ctx: Any, relevance: Tensor | None) -> tuple[Any, ...]:
        shares = [None] * ctx.inputs if relevance is None else ctx.back(relevance)
        return None, None, *shares


def follow(shape: Sequence[int], back: Back, *shadows: Tensor) -> Tensor:
    """The shadow of an output: `back` takes its relevance to that of each input's shadow."""
    found: Tensor = _Follow.apply(shape, back, *shadows)
    return found


def evenly(shadow: Tensor, dim: int) -> Tensor:
    """A product with a weight over `dim`: what all outputs of a token have goes evenly to its inputs.

    Returns:
        A shadow that is thin along `dim`.
    """
    whole, size = shadow.shape, shadow.shape[dim]
    if size == 1:
        return shadow

    def back(relevance: Tensor) -> list[Tensor]:
        return [(relevance / size).expand(whole)]

    return follow([n if d != dim % len(whole) else 1 for d, n in enumerate(whole)], back, shadow)


def unchanged(shadow: Tensor, shape: Sequence[int]) -> Tensor:
    """All of it goes to an input of the same shape, or one that was broadcast to it."""
    whole = shadow.shape
    if whole == tuple(shape):
        return shadow
    return follow(shape, lambda relevance: [fitting(relevance, whole)], shadow)


def shared(relevance: Tensor, shares: Sequence[float], shadows: Sequence[Tensor]) -> list[Tensor | None]:
    """Gives each summand its share; one that was broadcast gets the sum, one without a share nothing."""
    return [
        fitting(relevance if share == 1 else relevance * share, shadow.shape) if share else None
        for share, shadow in zip(shares, shadows, strict=True)
    ]


def spread(relevance: Tensor, shape: torch.Size) -> Tensor:
    """Shares out the relevance of tokens, (B, N), among heads and channels, (B, H, N, d)."""
    return (relevance[:, None, :, None] / (shape[1] * shape[3])).expand(shape)


def fitting(relevance: Tensor, shape: torch.Size) -> Tensor:
    """Sums over the dimensions along which an input was broadcast."""
    return relevance if relevance.shape == shape else relevance.sum_to_size(shape)


def averaged(shadow: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    """A mean or a sum: evenly to all that was averaged."""
    whole = shadow.shape
    dims = sorted(dim % len(whole) for dim in dims)
    size = math.prod(whole[dim] for dim in dims)
    kept = [1 if dim in dims else n for dim, n in enumerate(whole) if keepdim or dim not in dims]

    def back(relevance: Tensor) -> list[Tensor]:
        if not keepdim:
            for dim in dims:
                relevance = relevance.unsqueeze(dim)
        return [(relevance / size).expand(whole)]

    return follow(kept, back, shadow)


def selected(
    shadows: Sequence[Tensor], shape: Sequence[int], again: Callable[..., Tensor], reals: Sequence[Tensor]
) -> Tensor:
    """What a maximum or a sort picked: relevance goes where the values came from.

    Args:
        shadows: of the live inputs.
        shape: of the output.
        again: the call as a function of its live inputs.
        reals: their values.
    """
    kept = [real.detach() for real in reals]

    def back(relevance: Tensor) -> Sequence[Tensor]:
        with torch.enable_grad():
            leaves = [real.clone().requires_grad_() for real in kept]
            out = again(*leaves)
            found = torch.autograd.grad(out, leaves, relevance.to(out.dtype))
        return [part.to(relevance.dtype) for part in found]

    return follow(shape, back, *shadows)


def filled(shadow: Tensor, own: Tensor, inside: Tensor) -> Tensor:
    """Adds to a padded shadow that what falls on the padding is the model's own.

    Args:
        shadow: of the padded tensor.
        own: the model's own share of each element, of the same shape.
        inside: what of it is no padding, 1 or 0.
    """

    def back(relevance: Tensor) -> list[Tensor]:
        outside = relevance * (1 - inside)
        return [relevance - outside, outside]

    return follow(shadow.shape, back, shadow, own)

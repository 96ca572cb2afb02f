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
from torch.nn import functional as F

Back = Callable[[Tensor], Sequence[Tensor | None]]
_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


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


def convolved(
    shadow: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    inside: Tensor | None,
    own: Tensor,
) -> Tensor:
    """A convolution: evenly to the group's channels and the real positions under each window.

    Args:
        shadow: of its input, (B, C, *size), or (B, 1, *size) where only the sum over its channels counts.
        shape: of its output; its shadow is thin where there are no groups.
        kernel: its size.
        stride: of the windows.
        padding: on both sides; takes nothing.
        dilation: of the kernel.
        groups: of channels.
        inside: 1 where the input is real, 0 where the model padded it before, (1, 1, *size); None: all is
            real.
        own: the model's own share of each image, (B,): what windows get that see nothing but padding.
    """
    whole, dims = shadow.shape, len(kernel)
    batch, channels, *size = whole
    groups = 1 if channels == 1 else groups
    put_out = (batch, 1, *shape[2:]) if groups == 1 else tuple(shape)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    left = [
        length + 2 * p - r - (n - 1) * s
        for length, p, r, n, s in zip(size, padding, reach, shape[2:], stride, strict=True)
    ]

    beyond = [max(0, -rest) for rest in left]  # ceil_mode: the last window reaches over the edge
    if inside is not None and list(inside.shape[2:]) != size:
        inside = None
    tiled = inside is None and not any(padding) and list(kernel) == list(stride) and not any(left)

    def back(relevance: Tensor) -> list[Tensor | None]:
        per = _of_groups(relevance, groups)
        if tiled:
            share = per / (channels // groups * math.prod(kernel))
            for dim in range(dims):
                share = share.unsqueeze(3 + 2 * dim)
            apart = [n for pair in zip(shape[2:], kernel, strict=True) for n in pair]
            spread = share.expand(batch, groups, *apart).reshape(batch, groups, 1, *size)
            return [spread.expand(batch, groups, channels // groups, *size).reshape(whole), None]
        one = relevance.new_ones(1, 1, *kernel)
        real = relevance.new_ones(1, 1, *size) if inside is None else inside.to(relevance)
        real = F.pad(real, [side for more in reversed(beyond) for side in (0, more)])
        under = _CONVOLVE[dims](real, one, None, stride, padding, dilation)
        blind = relevance.masked_fill(under > 0, 0).flatten(1).sum(1) if inside is not None else None
        under = under.clamp(min=1)
        per = per / under
        spread = _TRANSPOSED[dims](
            per.reshape(-1, 1, *per.shape[2:]),
            one,
            None,
            stride,
            padding,
            [max(0, rest) for rest in left],
            1,
            dilation,
        )
        if inside is not None:
            spread = spread * real
        for dim, length in enumerate(size, 2):
            spread = spread.narrow(dim, 0, length)
        return [_to_channels(spread, whole, groups), blind]

    return follow(put_out, back, shadow, own)


def transposed(
    shadow: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    own: Tensor,
) -> Tensor:
    """A transposed convolution: evenly to the group's channels and the positions that reach each output.

    Args:
        shadow: as for `convolved`.
        shape: as for `convolved`.
        kernel: its size.
        stride: of the outputs of neighbours.
        padding: what is cut off on both sides.
        output_padding: what is added at the end.
        dilation: of the kernel.
        groups: of channels.
        own: the model's own share of each image, (B,): what no input reaches.
    """
    whole, dims = shadow.shape, len(kernel)
    groups = 1 if whole[1] == 1 else groups
    put_out = (whole[0], 1, *shape[2:]) if groups == 1 else tuple(shape)

    def back(relevance: Tensor) -> list[Tensor | None]:
        one, real = relevance.new_ones(1, 1, *kernel), relevance.new_ones(1, 1, *whole[2:])
        over = _TRANSPOSED[dims](real, one, None, stride, padding, output_padding, 1, dilation)
        blind = relevance.masked_fill(over > 0, 0).flatten(1).sum(1)
        per = _of_groups(relevance, groups) / over.clamp(min=1)
        spread = _CONVOLVE[dims](per.reshape(-1, 1, *shape[2:]), one, None, stride, padding, dilation)
        return [_to_channels(spread, whole, groups), blind]

    return follow(put_out, back, shadow, own)


def _of_groups(relevance: Tensor, groups: int) -> Tensor:
    """Sums over the channels of each group, (B, groups, *size)."""
    return relevance if groups == 1 else relevance.unflatten(1, (groups, -1)).sum(2)


def _to_channels(relevance: Tensor, whole: torch.Size, groups: int) -> Tensor:
    """Shares out what groups have among their channels."""
    batch, channels, *size = whole
    share = relevance.reshape(batch, groups, 1, *size) / (channels // groups)
    return share.expand(batch, groups, channels // groups, *size).reshape(whole)


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

"""Where relevance goes on its way back: one rule for each kind of call.

A *shadow* stands beside each tensor that depends on the image. It has the tensor's shape and strides of 0,
so it costs no memory; its gradient is the tensor's relevance. A shape operation is simply done to the
shadow, too. Any other call is a `follow`: the shadow of its output, and a function that shares out its
relevance among the inputs.
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


def total(relevance: Tensor, dims: Sequence[int]) -> Tensor:
    """Sums over some dimensions, which stay with size 1; those in which all is alike are not read."""
    sizes = relevance.shape
    dims = [dim % len(sizes) for dim in dims]
    alike = [dim for dim in dims if relevance.stride(dim) == 0 and relevance.shape[dim] > 1]
    for dim in alike:
        relevance = relevance.narrow(dim, 0, 1)
    others = [dim for dim in dims if relevance.shape[dim] != 1]
    if others:
        relevance = (
            compact(relevance)
            .sum(others, keepdim=True)
            .expand([1 if dim in others else size for dim, size in enumerate(relevance.shape)])
        )
    size = math.prod(sizes[dim] for dim in alike)
    return scaled(relevance, size)


def compact(relevance: Tensor, among: Sequence[Tensor] = ()) -> Tensor:
    """Returns it with size 1 wherever it, and all others of its shape, have a stride of 0."""
    for dim in range(relevance.ndim):
        if relevance.shape[dim] and all(one.stride(dim) == 0 for one in (relevance, *among)):
            relevance = relevance.narrow(dim, 0, 1)
    return relevance


def scaled(relevance: Tensor, factor: float) -> Tensor:
    """Multiplies, and keeps the strides of 0."""
    return relevance if factor == 1 else (compact(relevance) * factor).expand(relevance.shape)


def unbound(shadow: Tensor, dim: int) -> tuple[Tensor, ...]:
    """`unbind`, which keeps the strides of 0 on the way back."""
    parts: tuple[Tensor, ...] = _Unbind.apply(shadow, dim)
    return parts


class _Unbind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shadow: Tensor, dim: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dim = shadow.shape, dim
        shape = [size for place, size in enumerate(shadow.shape) if place != dim]
        return tuple(blank(shape, shadow) for _ in range(shadow.shape[dim]))

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor | None) -> tuple[Tensor | None, None]:
        there = [part for part in relevance if part is not None]
        if not there:
            return None, None
        thin = [None if part is None else compact(part, there) for part in relevance]
        like = next(part for part in thin if part is not None)
        whole = torch.stack([like.new_zeros(like.shape) if part is None else part for part in thin], ctx.dim)
        return whole.expand(ctx.shape), None


def divided_channels(shadow: Tensor, shape: Sequence[int]) -> Tensor:
    """Some of the channels of what a weight put out, or all of them, in dimensions of their own.

    The weight's own rule will sum over them, so that only their sum counts.
    """
    whole = shadow.shape
    lead = len(whole) - 1

    def back(relevance: Tensor) -> list[Tensor]:
        share = total(relevance, range(lead, relevance.ndim)) / whole[-1]
        return [share.reshape(*whole[:-1], 1).expand(whole)]

    return follow(shape, back, shadow)


def evenly(shadow: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """A product with a weight over `dim`: what all outputs of a token have goes evenly to its inputs."""
    size, whole = shadow.shape[dim], shadow.shape

    def back(relevance: Tensor) -> list[Tensor]:
        share = total(relevance, [dim]) / size
        found = share.expand(*share.shape[: share.ndim + dim], size, *share.shape[share.ndim + dim + 1 :])
        return [fitting(found, whole)]

    return follow(shape, back, shadow)


def unchanged(shadow: Tensor, shape: Sequence[int], share: float = 1.0) -> Tensor:
    """All of it, or a share, goes to an input of the same shape, or one that was broadcast to it."""
    whole = shadow.shape
    if share == 1 and whole == tuple(shape):
        return shadow

    def back(relevance: Tensor) -> list[Tensor]:
        return [fitting(scaled(relevance, share), whole)]

    return follow(shape, back, shadow)


def shared(relevance: Tensor, shares: Sequence[float], shadows: Sequence[Tensor]) -> list[Tensor | None]:
    """Gives each summand its share; one that was broadcast gets the sum, one without a share nothing."""
    return [
        fitting(scaled(relevance, share), shadow.shape) if share else None
        for share, shadow in zip(shares, shadows, strict=True)
    ]


def fitting(relevance: Tensor, shape: torch.Size) -> Tensor:
    """Sums over the dimensions along which an input was broadcast."""
    return relevance if relevance.shape == shape else relevance.sum_to_size(shape)


def averaged(shadow: Tensor, shape: Sequence[int], dims: Sequence[int], keepdim: bool) -> Tensor:
    """A mean or a sum: evenly to all that was averaged."""
    whole = shadow.shape
    dims = sorted(dim % len(whole) for dim in dims)
    size = math.prod(whole[dim] for dim in dims)

    def back(relevance: Tensor) -> list[Tensor]:
        if not keepdim:
            for dim in dims:
                relevance = relevance.unsqueeze(dim)
        return [(relevance / size).expand(whole)]

    return follow(shape, back, shadow)


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
        shadow: of its input, (B, C, *size).
        shape: of its output.
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
        per = total(relevance.unflatten(1, (groups, -1)), [2]).squeeze(2)
        if per.stride(1) == 0:
            per = per.narrow(1, 0, 1)  # all groups are alike
        alike = per.shape[1]
        if tiled:
            share = per / (channels // groups * math.prod(kernel))
            for dim in range(dims):
                share = share.unsqueeze(3 + 2 * dim)
            apart = [n for pair in zip(shape[2:], kernel, strict=True) for n in pair]
            spread = share.expand(batch, alike, *apart).reshape(batch, alike, 1, *size)
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
        spread = spread.reshape(batch, alike, 1, *size) / (channels // groups)
        return [spread.expand(batch, groups, channels // groups, *size).reshape(whole), blind]

    return follow(shape, back, shadow, own)


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

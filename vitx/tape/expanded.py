"""Arithmetic on expanded tensors: relevance is equal along most channels, and is stored once.

An expanded dimension has stride 0. These functions compute on the core, which has size 1 there, and expand
the result, so relevance of shape (B, N, C) costs as much as (B, N).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Shape = Sequence[int]


def core(tensor: Tensor) -> Tensor:
    """Return the tensor with size 1 in its expanded dimensions."""
    strides = tensor.stride()
    if 0 not in strides:
        return tensor
    if tensor.requires_grad:  # the backward pass of slices takes a tenth of the time
        return tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in strides)]
    sizes = [1 if stride == 0 else size for size, stride in zip(tensor.shape, strides, strict=True)]
    return tensor.as_strided(sizes, strides, tensor.storage_offset())


def scaled(tensor: Tensor, factor: Tensor | float) -> Tensor:
    """Multiply by a number, or by a tensor that broadcasts to the same shape."""
    if isinstance(factor, (int, float)) and factor == 1:
        return tensor
    return (core(tensor) * factor).expand(tensor.shape)


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Divide, but by 1 where the whole is 0."""
    return part / torch.where(whole == 0, 1, whole)


def shared(r: Tensor, whole: Tensor, none: float = 0) -> tuple[Tensor, Tensor]:
    """Divide relevance by the total of those that share it; also return the sum that has no recipient."""
    some = whole.abs() > none
    return torch.where(some, r / torch.where(some, whole, 1), 0), torch.where(some, 0, r).sum()


def refilled(r: Tensor, real: Tensor, dims: Sequence[int]) -> Tensor:
    """Move relevance from constants to the `real` elements along some dimensions, if there are any."""
    whole, left, count = (summed(one, dims, keepdim=True) for one in (r, r * real, real))
    moved = torch.where(left == 0, ratio(whole, count), r * ratio(whole, left)) * real
    return torch.where(count == 0, r, moved)


def added(first: Tensor, second: Tensor) -> Tensor:
    """Add two tensors of one shape."""
    return (core(first) + core(second)).expand(first.shape)


def summed(tensor: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """Sum over dimensions."""
    if not dims:
        return tensor
    inner = core(tensor)
    dims = [dim % tensor.ndim for dim in dims]
    copies = math.prod(tensor.shape[dim] for dim in dims if inner.shape[dim] < tensor.shape[dim])
    wide = [dim for dim in dims if inner.shape[dim] > 1]
    total = inner.sum(wide, keepdim=True) if wide else inner
    total = total if copies == 1 else total * copies
    total = total.expand([1 if dim in dims else n for dim, n in enumerate(tensor.shape)])
    if keepdim:
        return total
    for dim in sorted(dims, reverse=True):
        total = total.squeeze(dim)
    return total


def fitted(tensor: Tensor, shape: Shape) -> Tensor:
    """Sum over the dimensions along which a tensor of this shape was broadcast."""
    if tensor.shape == tuple(shape):
        return tensor
    extra = tensor.ndim - len(shape)
    found = summed(tensor, list(range(extra)))
    return summed(found, [dim for dim, n in enumerate(shape) if n == 1 != found.shape[dim]], keepdim=True)


def spread(part: Tensor, shape: Shape, dims: Shape) -> Tensor:
    """Distribute the relevance of a sum over dimensions evenly among its terms, which have this shape."""
    count = max(1, math.prod(shape[dim] for dim in dims))  # a sum over an empty slice shares nothing
    return scaled(fitted(part, [1 if d in dims else n for d, n in enumerate(shape)]), 1 / count).expand(
        tuple(shape)
    )


def reshaped(tensor: Tensor, shape: Shape) -> Tensor:
    """Reshape, and keep dimensions expanded where possible: always, but between merged dimensions."""
    shape = tuple(shape)
    try:
        return tensor.view(shape)
    except RuntimeError:  # merged dimensions have to be copied: only those, and what lies between them
        first = _alike(tensor.shape, shape)
        last = _alike(tensor.shape[first:][::-1], shape[first:][::-1])
        outer = [*range(first), *range(tensor.ndim - last, tensor.ndim)]
        once = [slice(1 if dim in outer and tensor.stride(dim) == 0 else None) for dim in range(tensor.ndim)]
        inner = tensor[tuple(once)]
        middle = shape[first : len(shape) - last]
        return inner.reshape(*inner.shape[:first], *middle, *inner.shape[tensor.ndim - last :]).expand(shape)


def _alike(before: Shape, after: Shape) -> int:
    """Return the number of leading dimensions of equal size."""
    return next((n for n, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), 0)

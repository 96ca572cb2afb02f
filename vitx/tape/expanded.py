"""Arithmetic on expanded tensors: relevance is equal along most channels, and is stored once.

An expanded dimension has stride 0. These functions compute on the core, which has size 1 there, and expand
the result, so relevance of shape (B, N, C) costs as much as (B, N).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from operator import itemgetter

import torch
from torch import Size, Tensor

from vitx.tape import axes as ax

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


def over(part: Tensor, whole: Tensor) -> Tensor:
    """Divide, but by 1 where the whole is 0."""
    return part / torch.where(whole == 0, 1, whole)


def shared(r: Tensor, whole: Tensor, none: float = 0) -> tuple[Tensor, Tensor]:
    """Divide relevance by the total of those that share it; also return the sum that has no recipient."""
    some = whole.abs() > none
    return torch.where(some, r / torch.where(some, whole, 1), 0), torch.where(some, 0, r).sum()


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
    """Reshape, and keep dimensions expanded that do not merge with others."""
    shape = tuple(shape)
    if tensor.shape == shape:
        return tensor
    if 0 not in tensor.stride():
        return tensor.reshape(shape)
    inner = core(tensor)
    kept, sizes = apart(inner.shape, tensor.shape, shape)
    return inner.expand(kept).reshape(sizes).expand(shape)


@lru_cache(4096)
def apart(inner: Size, before: Size, after: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of a core before and after a reshape; merged dimensions are no longer expanded.

    Example:
        >>> apart((2, 1, 9, 1), (2, 3, 9, 4), (6, 9, 4))
        ((2, 3, 9, 1), (6, 9, 1))
    """
    kept, sizes = tuple(before), after
    for dim, (own, size) in enumerate(zip(inner, before, strict=True)):
        trial = (*kept[:dim], own, *kept[dim + 1 :])
        if own < size and (found := core_sizes(trial, tuple(before), after)) is not None:
            kept, sizes = trial, found
    return kept, sizes


def core_sizes(inner: Shape, before: Shape, after: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of a core after a reshape; None if expanded dimensions merge with others.

    Example:
        >>> core_sizes((2, 9, 1), (2, 9, 12), (2, 3, 3, 4, 3))
        (2, 3, 3, 1, 1)
        >>> core_sizes((2, 9, 1), (2, 9, 12), (2, 108))
    """
    wide = [(size, size != one) for size, one in zip(before, inner, strict=True) if size > 1]
    groups = [(expanded, list(group)) for expanded, group in groupby(wide, itemgetter(1))]
    parts = (ax.dimension(math.prod(size for size, _ in group), expanded) for expanded, group in groups)
    found = ax.reshaped(tuple(parts), after)
    if found is None or any(len({factor.channels for factor in part}) > 1 for part in found):
        return None
    return tuple(1 if part and part[0].channels else size for part, size in zip(found, after, strict=True))

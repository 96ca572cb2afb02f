"""Arithmetic on expanded tensors: relevance is the same along most channels, and is kept once.

An expanded dimension has the stride 0. These functions compute on the core, which has size 1 there, and
expand what comes out, so relevance of shape (B, N, C) costs as much as (B, N).
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Size, Tensor

Shape = Sequence[int]


def core(tensor: Tensor) -> Tensor:
    """Returns the tensor with size 1 in its expanded dimensions."""
    strides = tensor.stride()
    if 0 not in strides:
        return tensor
    if tensor.requires_grad:  # autograd goes back through slices in a tenth of the time
        return tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in strides)]
    sizes = [1 if stride == 0 else size for size, stride in zip(tensor.shape, strides, strict=True)]
    return tensor.as_strided(sizes, strides, tensor.storage_offset())


def scaled(tensor: Tensor, factor: Tensor | float) -> Tensor:
    """Multiplies by a number, or by a tensor that broadcasts to the same shape."""
    if isinstance(factor, (int, float)) and factor == 1:
        return tensor
    return (core(tensor) * factor).expand(tensor.shape)


def over(part: Tensor, whole: Tensor) -> Tensor:
    """Divides, but by 1 where the whole is 0."""
    return part / torch.where(whole == 0, 1, whole)


def added(first: Tensor, second: Tensor) -> Tensor:
    """Adds two tensors of one shape."""
    return (core(first) + core(second)).expand(first.shape)


def summed(tensor: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """Sums over dimensions."""
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
    """Sums over the dimensions along which something of this shape was broadcast."""
    if tensor.shape == tuple(shape):
        return tensor
    extra = tensor.ndim - len(shape)
    found = summed(tensor, list(range(extra)))
    return summed(found, [dim for dim, n in enumerate(shape) if n == 1 != found.shape[dim]], keepdim=True)


def reshaped(tensor: Tensor, shape: Shape) -> Tensor:
    """Reshapes, and leaves expanded what stays apart."""
    shape = tuple(shape)
    if tensor.shape == shape:
        return tensor
    if 0 in tensor.stride():
        inner = core(tensor)
        sizes = core_sizes(inner.shape, tensor.shape, shape)
        if sizes is not None:
            return inner.reshape(sizes).expand(shape)
    return tensor.reshape(shape)


@lru_cache(4096)
def core_sizes(inner: Size, before: Size, after: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the shape of a core after a reshape; None where expanded dimensions merge with others.

    Example:
        >>> core_sizes((2, 9, 1), (2, 9, 12), (2, 3, 3, 4, 3))
        (2, 3, 3, 1, 1)
        >>> core_sizes((2, 9, 1), (2, 9, 12), (2, 108))
    """
    sizes: list[int] = []
    left, right = 0, 0
    while left < len(before) or right < len(after):
        start, begin = left, right
        left, right = min(left + 1, len(before)), min(right + 1, len(after))
        while (here := math.prod(before[start:left])) != (there := math.prod(after[begin:right])):
            left, right = (left + 1, right) if here < there else (left, right + 1)
            if left > len(before) or right > len(after):
                return None
        whole = [inner[dim] == before[dim] for dim in range(start, left) if before[dim] != 1]
        if any(whole) and not all(whole):
            return None
        sizes += [after[dim] if all(whole) else 1 for dim in range(begin, right)]
    return tuple(sizes)

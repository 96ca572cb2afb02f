"""The contents of a value's dimensions: tokens, or channels of the same token.

The heads of an attention are channels of its values' tokens. Each dimension is a product of factors, the
outermost first, since a reshape may merge heads with images or windows. All of this follows from sizes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Factor(NamedTuple):
    """A part of a dimension."""

    size: int  # at least 2
    channels: bool  # whether it counts channels, or copies, of the same token


Dimension = tuple[Factor, ...]
Axes = tuple[Dimension, ...]


def tokens(shape: Sequence[int]) -> Axes:
    """Return axes whose dimensions all count tokens."""
    return tuple(dimension(size, False) for size in shape)


def dimension(size: int, channels: bool) -> Dimension:
    """Return a dimension of one factor, or of no factors if its size is 1."""
    return (Factor(size, channels),) if size != 1 else ()


def channel_dims(axes: Axes, *, some: bool = False) -> list[int]:
    """Return the dimensions that count nothing but channels; with `some`, also those with some channels."""
    of = any if some else all
    return [dim for dim, part in enumerate(axes) if part and of(factor.channels for factor in part)]


def resized(axes: Axes, shape: Sequence[int]) -> Axes:
    """Return the axes after slicing or joining along some dimensions."""
    return tuple(
        part
        if math.prod(f.size for f in part) == size
        else dimension(size, bool(part) and all(f.channels for f in part))
        for size, part in zip(shape, axes, strict=True)
    )


def broadcast(axes: Axes, shape: Sequence[int]) -> Axes:
    """Return the axes after a broadcast: dimensions that were added, or had size 1, count copies."""
    axes = ((),) * (len(shape) - len(axes)) + axes
    return tuple(part or dimension(size, True) for size, part in zip(shape, axes, strict=True))


def merged(first: Axes, second: Axes) -> Axes:
    """Return the axes of a combination of two values of one shape: channels where both have channels."""
    return tuple(
        one if one == other or not any(f.channels for f in one) else other
        for one, other in zip(first, second, strict=True)
    )


def reshaped(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """Return the axes after a reshape; None if a factor is split unevenly.

    Example:
        >>> inside = tokens((2, 9)) + (dimension(12, True),)
        >>> [[f.size for f in part if f.channels] for part in reshaped(inside, (18, 3, 4))]
        [[], [3], [4]]
    """
    left = [factor for part in axes for factor in part][::-1]
    found: list[Dimension] = []
    for size in shape:
        part: list[Factor] = []
        while size > 1:
            if not left:
                return None
            factor = left.pop()
            taken = math.gcd(size, factor.size)
            if taken not in (size, factor.size):
                return None
            part.append(Factor(taken, factor.channels))
            if taken < factor.size:
                left.append(Factor(factor.size // taken, factor.channels))
            size //= taken
        found.append(tuple(part))
    return tuple(found)


def by_place(axes: Axes, move: Callable[[Tensor], Tensor]) -> Axes:
    """Return the axes after any rearrangement, found by tracing the token that each element comes from."""
    factors = [factor for part in axes for factor in part]
    whole = [1 if factor.channels else factor.size for factor in factors]
    marks = torch.arange(math.prod(whole), dtype=torch.float64, device="cpu").view(whole)
    marks = marks.expand([factor.size for factor in factors])
    moved = move(marks.reshape([math.prod(f.size for f in part) for part in axes]).contiguous())
    same = [bool((moved == moved.narrow(dim, 0, 1)).all()) for dim in range(moved.ndim)]
    return tuple(dimension(size, one) for size, one in zip(moved.shape, same, strict=True))


def dimensions(given: Any, ndim: int) -> tuple[int, ...]:
    """Return the dimensions over which an operator works, in order; all of them if none is given."""
    if given in (None, [], ()):
        return tuple(range(ndim))
    return tuple(sorted(dim % max(1, ndim) for dim in ([given] if isinstance(given, int) else given)))

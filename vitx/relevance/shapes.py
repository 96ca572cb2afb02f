"""Operations on shapes, which are done to a shadow as they are to its tensor.

A thin shadow has size 1 in some dimensions. Most operations do not mix these with others, and can be done to
it as well; where one does, it is done to the shadow in full.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vitx.relevance.live import Live, Watched
from vitx.relevance.names import (
    CONCATENATED,
    DIVIDED_UP,
    LAID_OUT,
    TURNED,
    UNBOUND,
    Function,
    argument,
    replaced,
    tensors,
)

Rule = Callable[[Watched, Any, Any, dict[str, Any], list[Live]], Any]


def natural(func: Function) -> Rule:
    """An operation on the shape of one tensor."""

    def rule(watched: Watched, out: Any, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
        if any(isinstance(value, torch.dtype) for value in args):  # bits read as another type
            return None
        live = watched.get(args[0]) if args else None
        if live is not None and live.thin.shape != live.shape and live.thin.numel():
            found = _thinly(func, live, out, args, kwargs)
            if found is not None:
                return found

        def beside(tensor: Tensor) -> Tensor:
            live = watched.get(tensor)
            return tensor if live is None else live.shadow

        given, named = replaced((args, kwargs), beside)
        if func is Tensor.view or func is Tensor.view_as:  # the shadow has strides of its own
            return given[0].reshape(out.shape)
        return func(*given, **named)

    return rule


def joined(func: Function) -> Rule:
    """Several tensors that become one; what is not live among them is the model's own."""

    def rule(watched: Watched, out: Any, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
        thin = _thin_dims(inputs[0])
        along = argument(args, kwargs, 1, "dim", 0)
        thinly = func in CONCATENATED and isinstance(along, int) and along % out.ndim not in thin
        thinly = thinly and all(_thin_dims(one) == thin for one in inputs)

        def beside(tensor: Tensor) -> Tensor:
            live = watched.get(tensor)
            if live is not None:
                return live.thin if thinly else live.shadow
            if not tensor.is_floating_point():
                return tensor
            sizes = [1 if thinly and dim in thin else n for dim, n in enumerate(tensor.shape)]
            return watched.of_model(sizes)

        given, named = replaced((args, kwargs), beside)
        return func(*given, **named)

    return rule


def _thin_dims(live: Live) -> list[int]:
    pairs = zip(live.thin.shape, live.shape, strict=True)
    return [dim for dim, (thin, size) in enumerate(pairs) if thin != size]


def _thinly(func: Function, live: Live, out: Any, args: Any, kwargs: Any) -> Any:
    """Does an operation to a thin shadow; None if it mixes thin dimensions with others."""
    if func in TURNED:
        return func(live.thin, *args[1:], **kwargs)
    if func in LAID_OUT:
        sizes = _laid_out(tuple(live.thin.shape), tuple(live.shape), tuple(out.shape))
        return None if sizes is None else live.thin.reshape(sizes)
    if func in DIVIDED_UP:
        dim = argument(args, kwargs, 1 if func in UNBOUND else 2, "dim", 0) % len(live.shape)
        if dim not in _thin_dims(live):
            return func(live.thin, *args[1:], **kwargs)
        part = live.thin.squeeze(dim) if tensors(out)[0].ndim < len(live.shape) else live.thin
        return [part] * len(out) if all(t.numel() for t in out) else None
    if func is Tensor.__getitem__:
        return _item(live, args[1], out)
    return None


def _item(live: Live, index: Any, out: Tensor) -> Tensor | None:
    """`tensor[1:, 0]`: of a thin dimension, any part is as good as the whole."""
    places = index if isinstance(index, tuple) else (index,)
    if not out.numel() or not all(type(place) in (int, slice) for place in places):
        return None
    thin = _thin_dims(live)
    return live.thin[
        tuple(
            place if dim not in thin else 0 if isinstance(place, int) else slice(None)
            for dim, place in enumerate(places)
        )
    ]


@lru_cache  # the layers of a model are alike
def _laid_out(
    thin: tuple[int, ...], before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Returns the sizes of a thin shadow after its tensor's were laid out anew; None if thin ones are mixed.

    Example:
        >>> _laid_out((2, 9, 1), (2, 9, 12), (2, 3, 3, 4, 3))
        (2, 3, 3, 1, 1)
        >>> _laid_out((2, 9, 1), (2, 9, 12), (2, 108))
    """
    sizes: list[int] = []
    for left, right in _factors(before, after):
        some = [thin[dim] == before[dim] for dim in left if before[dim] != 1]
        if all(some):
            sizes += [after[dim] for dim in right]
        elif not any(some):
            sizes += [1 for _ in right]
        else:
            return None
    return tuple(sizes)


def _factors(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the smallest runs of dimensions that hold the same elements before and after."""
    left, right = 0, 0
    while left < len(before) or right < len(after):
        ends = [min(left + 1, len(before)), min(right + 1, len(after))]
        while True:
            sizes = math.prod(before[left : ends[0]]), math.prod(after[right : ends[1]])
            if sizes[0] == sizes[1]:
                break
            ends[sizes[0] > sizes[1]] += 1
        yield list(range(left, ends[0])), list(range(right, ends[1]))
        left, right = ends

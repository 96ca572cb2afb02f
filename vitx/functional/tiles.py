"""Tiles, in which attention is computed: some rows of A for some images and heads, as fit into the caches."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

Cut = tuple[slice, slice, slice]  # images, heads and rows
Part = Callable[[Cut], Tensor]
ALL = slice(None)
_CORE = 2**20  # entries of A for each core of a CPU
_MOST_CORES = 8  # more of them share a tile, which would take too much memory otherwise
_LARGE_TILE = 2**26  # entries that keep a GPU busy
_FEWEST_ROWS = 64  # with fewer, matrix products read more than they compute
_BLOCK = 2**25  # bytes: the least that glibc always takes from the system, which counts pages when touched
_ALIGNMENT = 64  # bytes, as torch aligns what it allocates


@dataclass(eq=False)
class Tile:
    """A part of A and of its gradient, computed when it is read, and valid until the next one is."""

    images: slice  # b of the B images
    heads: slice  # g of the H heads
    rows: slice  # n of the Q queries
    of_heads: int  # H
    compute: Part
    compute_gradient: Part | None = None

    @cached_property
    def weights(self) -> Tensor:
        """A, (b, g, n, K), at least float32."""
        return self.compute((self.images, self.heads, self.rows))

    @cached_property
    def gradient(self) -> Tensor:
        """The gradient of the score with respect to A, (b, g, n, K), where it is known."""
        assert self.compute_gradient is not None
        return self.compute_gradient((self.images, self.heads, self.rows))


def multiply(left: Tensor, right: Tensor, out: Tensor, factor: float = 1) -> Tensor:
    """Multiply (b, g, n, m) and (b, g, m, k) for each image and head, into `out`, (b, g, n, k)."""
    out.view(-1, *out.shape[2:]).baddbmm_(left.flatten(0, 1), right.flatten(0, 1), beta=0, alpha=factor)
    return out


class Memory:
    """The memory of one pass: room that one tile after another uses, and blocks for what stays."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[Any, ...], Tensor] = {}
        self._block = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._filled = 0

    def take(self, use: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return an uninitialised tensor, valid until the next one is taken for the same use."""
        size, key = math.prod(shape), (use, like.dtype, like.device, torch.is_inference_mode_enabled())
        if key not in self._rooms or self._rooms[key].numel() < size:
            self._rooms[key] = like.new_empty(size)
        return self._rooms[key][:size].view(*shape)

    def products(self, use: str, left: Tensor, right: Tensor, factor: float = 1) -> Tensor:
        """Multiply (b, g, n, m) and (b, g, m, k) for each image and head, into such room."""
        return multiply(left, right, self.take(use, (*left.shape[:-1], right.shape[-1]), left), factor)

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return an uninitialised tensor that stays.

        On a CPU, these lie in blocks: one by one they would break up the memory that the next layer uses.
        """
        if like.device.type != "cpu" or torch.is_inference_mode_enabled():
            return like.new_empty(shape)
        size = math.prod(shape) * like.element_size()
        if self._filled + size > len(self._block):
            self._block, self._filled = torch.empty(max(size, _BLOCK), dtype=torch.uint8, device="cpu"), 0
        part = self._block[self._filled : self._filled + size]
        self._filled += -(-size // _ALIGNMENT) * _ALIGNMENT
        return part.view(like.dtype).view(shape)

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy that stays."""
        return self.empty(tensor.shape, tensor).copy_(tensor)


def split(shape: tuple[int, ...], device: torch.device, rows: slice = ALL) -> Iterator[Cut]:
    """Divide images, heads and some rows of A, (B, H, Q, K), into tiles that fit; heads follow one another.

    On a CPU, a tile has one head: for several of several images, queries, keys and values would have to be
    copied before a product. So what is found of an image does not depend on those beside it.
    """
    images, heads, queries, keys = shape
    room = _room(device)
    first, last, _ = rows.indices(queries)
    count = min(last - first, max(_FEWEST_ROWS, room // keys))
    some = min(images, max(1, room // (count * keys)))
    group = 1 if device.type == "cpu" else min(heads, max(1, room // (some * count * keys)))
    for image, row in product(_parts(0, images, some), _parts(first, last, count)):
        for head in _parts(0, heads, group):
            yield image, head, row


def _parts(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def full(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32: half precision is for the model, not for the maps."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _room(device: torch.device) -> int:
    """Return how many entries of A a tile may have."""
    return _CORE * min(torch.get_num_threads(), _MOST_CORES) if device.type == "cpu" else _LARGE_TILE


def is_zero(rows: Tensor) -> bool:
    """Return whether nothing arrived at some rows; False on a GPU, which would have to be waited for."""
    return rows.device.type == "cpu" and not rows.requires_grad and not rows.count_nonzero()

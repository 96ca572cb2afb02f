"""Tiles, in which attention is computed: rows of A for some images and heads that fit into the caches."""

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
_CORE = 2**20  # entries of A per CPU core
_MOST_CORES = 8  # beyond this, a tile stops growing with the cores, as it would take too much memory
_LARGE_TILE = 2**26  # entries that keep a GPU busy
_FEWEST_ROWS = 64  # with fewer, matrix products are bound by memory bandwidth
_BLOCK = 2**25  # bytes: from this size on, glibc always maps new pages, which take no memory until touched
_ALIGNMENT = 64  # bytes, the alignment of torch's own allocations


@dataclass(eq=False)
class Tile:
    """A part of A and of its gradient, computed when it is read, and valid until the next tile is read."""

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
        """The gradient of the score with respect to A, (b, g, n, K), if it is known."""
        assert self.compute_gradient is not None
        return self.compute_gradient((self.images, self.heads, self.rows))


def multiply(left: Tensor, right: Tensor, out: Tensor, factor: float = 1) -> Tensor:
    """Multiply (b, g, n, m) by (b, g, m, k) for each image and head, into `out`, (b, g, n, k)."""
    out.view(-1, *out.shape[2:]).baddbmm_(left.flatten(0, 1), right.flatten(0, 1), beta=0, alpha=factor)
    return out


class Memory:
    """The memory of one pass: buffers that successive tiles reuse, and blocks for tensors that are kept."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[Any, ...], Tensor] = {}
        self._block = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._filled = 0

    def take(self, use: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return an uninitialized tensor, valid until the next one is taken for the same use."""
        size, key = math.prod(shape), (use, like.dtype, like.device, torch.is_inference_mode_enabled())
        if key not in self._rooms or self._rooms[key].numel() < size:
            self._rooms[key] = like.new_empty(size)
        return self._rooms[key][:size].view(*shape)

    def products(self, use: str, left: Tensor, right: Tensor, factor: float = 1) -> Tensor:
        """Multiply (b, g, n, m) by (b, g, m, k) for each image and head, into a tensor from `take`."""
        return multiply(left, right, self.take(use, (*left.shape[:-1], right.shape[-1]), left), factor)

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return an uninitialized tensor whose memory is not reused.

        On a CPU, such tensors share blocks: one by one, they would fragment the memory of the next layer.
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
        """Return a contiguous copy whose memory is not reused."""
        return self.empty(tensor.shape, tensor).copy_(tensor)


def split(shape: tuple[int, ...], device: torch.device, rows: slice = ALL) -> Iterator[Cut]:
    """Divide images, heads and some rows of A, (B, H, Q, K), into tiles that fit; heads vary fastest.

    On a CPU, a tile has one head: with several heads of several images, queries, keys and values would be
    copied before each product. So the result for an image does not depend on the others of its batch.
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
    """Convert a tensor to at least float32: half precision is for the model, not for the maps."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _room(device: torch.device) -> int:
    """Return the maximum number of entries of A in a tile."""
    return _CORE * min(torch.get_num_threads(), _MOST_CORES) if device.type == "cpu" else _LARGE_TILE


def is_zero(rows: Tensor) -> bool:
    """Return True if all rows are known to be zero; False on a GPU, where testing would synchronize."""
    return rows.device.type == "cpu" and not rows.requires_grad and not rows.count_nonzero()

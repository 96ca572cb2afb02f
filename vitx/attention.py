"""The attention of one layer, computed when it is asked for, in tiles.

A tile is some rows of A for some images, small enough to stay in the processor's cache while it is used, so
no N x N matrix is kept. Where the kernel of the forward pass told the log-sum-exp of each row, the softmax
is not run again: A = exp(q k^T * scale - lse).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Part = Callable[[slice, slice], Tensor]  # of images and rows
ALL = slice(None)
_TILE = {"cpu": 2**21}  # entries of A; more would leave the cache
_LARGE_TILE = 2**26  # what keeps a GPU busy
_LARGE_PRODUCT = 2**23  # multiplications that are worth a call
_FEWEST_ROWS = 64  # with fewer, matrix products read more than they compute


@dataclass(frozen=True)
class Tile:
    """Some rows of the attention of one layer.

    Attributes:
        images: which of the B images, b of them.
        rows: which of the Q queries, n of them.
        weights: A, (b, H, n, K), at least float32.
        gradient: of the score with respect to A, (b, H, n, K); None where it was not asked for.
    """

    images: slice
    rows: slice
    weights: Tensor
    gradient: Tensor | None = None


class Attention:
    """One attention call: B images, H heads, Q queries, K keys.

    Attributes:
        shape: (B, H, Q, K).
        dtype: of the tiles: float32, or float64 in a float64 model.
        device: of the model.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        value: Tensor,
        *,
        gradients: bool,
        to_heads: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Describes a call.

        Args:
            shape: (B, H, Q, K).
            value: what A multiplies, (B, H, K, d), detached.
            gradients: keep what the gradient of A needs.
            to_heads: turns a gradient of the output into one of A V, (B, H, Q, d), if they differ.
        """
        self.shape = shape
        self.dtype = torch.promote_types(value.dtype, torch.float32)
        self.device = value.device
        self._value = value if gradients else None
        self._to_heads = to_heads

    def tiles(self, gradient: Tensor | None = None) -> Iterator[Tile]:
        """Computes A tile by tile and, from a gradient of the output, the gradient of A.

        Args:
            gradient: of the score with respect to the output.
        """
        weights = self._weights()
        outer = None if gradient is None else self._outer(gradient)
        for images, part in split(self.shape, self.device):
            yield Tile(images, part, weights(images, part), outer and outer(images, part))

    def weights(self) -> Tensor:
        """Computes A as a whole, (B, H, Q, K)."""
        return self._whole(lambda tile: tile.weights)

    def weights_gradient(self, gradient: Tensor) -> Tensor:
        """Computes the gradient of A as a whole, (B, H, Q, K), from that of the output."""
        return self._whole(lambda tile: tile.gradient, gradient)

    def _weights(self) -> Part:
        """Prepares what computes A for some images and rows."""
        raise NotImplementedError

    def _outer(self, gradient: Tensor) -> Part:
        """Prepares what computes the gradient of A for some images and rows: O = A V, so dA = dO V^T."""
        assert self._value is not None
        if self._to_heads is not None:
            gradient = self._to_heads(gradient)
        gradient, value = full(gradient).contiguous(), full(self._value).contiguous()
        return lambda images, rows: products(gradient[images][:, :, rows], value[images].mT)

    def _whole(self, part: Callable[[Tile], Tensor | None], gradient: Tensor | None = None) -> Tensor:
        whole = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for tile in self.tiles(gradient):
                found = part(tile)
                assert found is not None
                whole[tile.images, :, tile.rows] = found
        return whole


class StoredAttention(Attention):
    """Attention whose A the model itself computed."""

    def __init__(self, weights: Tensor, value: Tensor, *, gradients: bool) -> None:
        super().__init__(tuple(weights.shape), value, gradients=gradients)
        self._stored = weights

    def _weights(self) -> Part:
        return lambda images, rows: full(self._stored[images][:, :, rows])


class DotProductAttention(Attention):
    """softmax(Q K^T * scale + mask), Vaswani et al. 2017, eq. 1, computed anew from Q and K."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        gradients: bool,
        mask: Tensor | None = None,
        scale: float | None = None,
        log_sum_exp: Tensor | None = None,
        to_heads: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Describes a call.

        Args:
            query: (B, H, Q, d), detached.
            key: (B, H, K, d), detached.
            value: as for `Attention`.
            gradients: as for `Attention`.
            mask: what is added to the scores, or True where attention is allowed.
            scale: of the scores, d^-1/2 by default.
            log_sum_exp: of each row of scores, (B, H, Q), if it is known.
            to_heads: as for `Attention`.
        """
        super().__init__((*query.shape[:-1], key.shape[-2]), value, gradients=gradients, to_heads=to_heads)
        self._mask = None if mask is None else mask.expand(self.shape)
        self._scale = query.shape[-1] ** -0.5 if scale is None else scale
        self._log_sum_exp = None if log_sum_exp is None else log_sum_exp[..., None]
        prepare = partial(_operands, query, key, self._scale)
        # Copies let go of what shares memory with query and key. With gradients, autograd keeps it anyway.
        self._operands = prepare if gradients else _constant(prepare())

    def _weights(self) -> Part:
        query, key = self._operands()

        def weights(images: slice, rows: slice) -> Tensor:
            scores = products(query[images][:, :, rows], key[images])
            if self._mask is not None:
                _add_mask(scores, self._mask[images][:, :, rows])
            if self._log_sum_exp is None:
                return scores.softmax(-1)
            return scores.sub_(self._log_sum_exp[images][:, :, rows]).exp_()

        return weights


def products(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiplies matrices for each image and head; adds to `out`, in place, if it is given.

    The cores of a processor divide a batch matrix by matrix, which leaves some idle if the matrices are few:
    large ones, which the cores divide well, are multiplied one after another.
    """
    shape = (*left.shape[:-1], right.shape[-1])
    batches = left.flatten(0, 1), right.flatten(0, 1)
    if left.device.type != "cpu" or left.shape[-2] * left.shape[-1] * right.shape[-1] < _LARGE_PRODUCT:
        if out is None:
            return torch.bmm(*batches).view(shape)
        out.flatten(0, 1).baddbmm_(*batches)
        return out
    fresh = out is None
    out = left.new_empty(shape) if out is None else out
    for total, one, other in zip(out.flatten(0, 1), *batches, strict=True):
        total.addmm_(one, other, beta=0 if fresh else 1)
    return out


def full(tensor: Tensor) -> Tensor:
    """At least float32: half precision is for the model, not for the maps."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def budget(device: torch.device) -> int:
    """Returns how many entries of A a tile may have."""
    return _TILE.get(device.type, _LARGE_TILE)


def _operands(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Copies of Q * scale and K^T, contiguous and in the precision of the maps."""
    copies = [torch.empty(t.shape, dtype=full(t[:0]).dtype, device=t.device) for t in (query, key.mT)]
    return copies[0].copy_(query).mul_(scale), copies[1].copy_(key.mT)


def _constant(value: T) -> Callable[[], T]:
    return lambda: value


def _add_mask(scores: Tensor, mask: Tensor) -> None:
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores += mask


def split(shape: tuple[int, ...], device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Divides images and rows: as many whole images as fit into a tile, or as many rows of one image."""
    images, heads, queries, keys = shape
    some = max(1, budget(device) // (heads * queries * keys))
    step = max(_FEWEST_ROWS, budget(device) // (heads * keys))
    for first in range(0, images, some):
        for start in range(0, queries, step):
            yield slice(first, first + some), slice(start, start + step)

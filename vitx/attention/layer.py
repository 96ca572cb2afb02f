"""The attention of one layer, computed when it is asked for, in tiles.

Where the kernel of the forward pass told the log-sum-exp of each row, the softmax is not run again:
A = exp(q k^T * scale - lse).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vitx.attention.tiles import ALL, Memory, Part, Tile, full, split
from vitx.models.isolation import without_autocast


class Attention:
    """One attention call: B images, H heads, Q queries, K keys.

    Attributes:
        shape: (B, H, Q, K).
        dtype: of the tiles: float32, or float64 in a float64 model.
        device: of the model.
        sums_to_1: whether each row of A is known to, up to the rounding of single precision.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        value: Tensor,
        *,
        gradients: bool,
        to_heads: Callable[[Tensor], Tensor] | None = None,
        memory: Memory | None = None,
        sums_to_1: bool = False,
    ) -> None:
        """Describes a call.

        Args:
            shape: (B, H, Q, K).
            value: what A multiplies, (B, H, K, d), detached.
            gradients: keep what the gradient of A needs.
            to_heads: turns a gradient of the output into one of A V, (B, H, Q, d), if they differ.
            memory: what other calls share with this one.
            sums_to_1: whether each row of A is known to.
        """
        self.shape = shape
        self.dtype = torch.promote_types(value.dtype, torch.float32)
        self.device = value.device
        self._value = value if gradients else None
        self._to_heads = to_heads
        self._memory = memory or Memory()
        self.sums_to_1 = sums_to_1

    def tiles(self, gradient: Tensor | None = None, apart: slice = ALL) -> Iterator[Tile]:
        """Computes A tile by tile and, from a gradient of the output, the gradient of A.

        Args:
            gradient: of the score with respect to the output.
            apart: rows that share no tile with others.
        """
        weights = self._weights()
        outer = None if gradient is None else self._outer(gradient)
        for part in split(self.shape, self.device, apart):
            yield Tile(*part, self.shape[1], weights, outer, self.sums_to_1)

    def weights(self) -> Tensor:
        """Computes A as a whole, (B, H, Q, K)."""
        return self._whole(lambda tile: tile.weights)

    def weights_gradient(self, gradient: Tensor) -> Tensor:
        """Computes the gradient of A as a whole, (B, H, Q, K), from that of the output."""
        return self._whole(lambda tile: tile.gradient, gradient)

    def _weights(self) -> Part:
        """Prepares what computes A for some images, heads and rows."""
        raise NotImplementedError

    def _outer(self, gradient: Tensor) -> Part:
        """Prepares what computes the gradient of A for some of it: O = A V, so dA = dO V^T."""
        assert self._value is not None
        if self._to_heads is not None:
            gradient = self._to_heads(gradient)
        gradient, value = full(gradient), full(self._value)

        def outer(images: slice, heads: slice, rows: slice | Tensor) -> Tensor:
            left, right = gradient[images, heads, rows], value[images, heads].mT
            return self._memory.products("gradient", left, right)

        return outer

    def _whole(self, part: Callable[[Tile], Tensor | None], gradient: Tensor | None = None) -> Tensor:
        whole = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        with torch.no_grad(), without_autocast(self.device):
            for tile in self.tiles(gradient):
                found = part(tile)
                assert found is not None
                whole[tile.images, tile.heads, tile.rows] = found
        return whole


class StoredAttention(Attention):
    """Attention whose A the model itself computed."""

    def __init__(
        self,
        weights: Tensor,
        value: Tensor,
        *,
        gradients: bool,
        to_heads: Callable[[Tensor], Tensor] | None = None,
        sums_to_1: bool = False,
    ) -> None:
        """Describes a call.

        Args:
            weights: A, (B, H, Q, K), detached.
            value: as for `Attention`.
            gradients: as for `Attention`.
            to_heads: as for `Attention`.
            sums_to_1: as for `Attention`; half precision rounds too much.
        """
        super().__init__(
            tuple(weights.shape), value, gradients=gradients, to_heads=to_heads, sums_to_1=sums_to_1
        )
        self._stored = weights

    def _weights(self) -> Part:
        return lambda images, heads, rows: full(self._stored[images, heads, rows])


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
        memory: Memory | None = None,
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
            memory: as for `Attention`.
        """
        shape = (*query.shape[:-1], key.shape[-2])
        super().__init__(shape, value, gradients=gradients, to_heads=to_heads, memory=memory, sums_to_1=True)
        self._mask = None if mask is None else mask.expand(self.shape)
        self._scale = query.shape[-1] ** -0.5 if scale is None else scale
        if not gradients:  # else autograd keeps them anyway, and all that shares memory with them
            query, key = self._memory.keep(query), self._memory.keep(key)
            log_sum_exp = None if log_sum_exp is None else self._memory.keep(log_sum_exp)
        self._query, self._key, self._log_sum_exp = query, key, log_sum_exp

    def _weights(self) -> Part:
        query, key = self._operands()

        def weights(images: slice, heads: slice, rows: slice | Tensor) -> Tensor:
            scores = self._memory.products("weights", query[images, heads, rows], key[images, heads])
            if self._mask is not None:
                _add_mask(scores, self._mask[images, heads, rows])
            if self._log_sum_exp is None:
                return torch.softmax(scores, -1, out=scores)
            return scores.exp_()

        return weights

    def _operands(self) -> tuple[Tensor, Tensor]:
        """Returns Q * scale and K^T, contiguous and in the precision of the maps.

        If the log-sum-exp of the rows is known, one more column and a row of ones subtract it in the product.
        """
        *batch, queries, dim = self._query.shape
        dims, like = dim + (self._log_sum_exp is not None), full(self._query[:0])
        query = self._memory.take("query", (*batch, queries, dims), like)
        key = self._memory.take("key", (*batch, dims, self.shape[-1]), like)
        query[..., :dim].copy_(self._query).mul_(self._scale)
        key[..., :dim, :].copy_(self._key.mT)
        if self._log_sum_exp is not None:
            query[..., dim] = -self._log_sum_exp
            key[..., dim, :] = 1
        return query, key


def _add_mask(scores: Tensor, mask: Tensor) -> None:
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores += mask

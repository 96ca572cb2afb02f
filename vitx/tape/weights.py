"""A of one attention, computed when it is asked for, in tiles.

Where the kernel of the forward pass told the log-sum-exp of each row, the softmax is not run again:
A = exp(q k^T * scale - lse).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vitx.functional.tiles import ALL, Memory, Part, Tile, full, split
from vitx.models.isolation import without_autocast
from vitx.tape.kept import Keeper

Gradient = Any  # a tensor, or one for each of several attentions


class Weights:
    """The A of one attention: T images or windows, H heads, Q queries, K keys.

    Attributes:
        shape: (T, H, Q, K).
        dtype: of the tiles: float32, or float64 in a float64 model.
        device: of the model.
        sums_to_1: whether each row of A does.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        value: Tensor,
        *,
        keeps: bool,
        memory: Memory,
        keeper: Keeper,
        sums_to_1: bool,
    ) -> None:
        """Describes A.

        Args:
            shape: (T, H, Q, K).
            value: what A multiplies, (T, H, K, d).
            keeps: whether the values are kept, which the gradient of A is made of.
            memory: what other attentions share with this one.
            keeper: keeps tensors of the pass.
            sums_to_1: whether each row of A does.
        """
        self.shape = shape
        self.dtype = torch.promote_types(value.dtype, torch.float32)
        self.device = value.device
        self.sums_to_1 = sums_to_1
        self._value = keeper.keep(value) if keeps else None
        self._memory = memory

    def tiles(self, gradient: Gradient | None = None, apart: slice = ALL) -> Iterator[Tile]:
        """Computes A tile by tile and, from a gradient of what it put out, the gradient of A.

        Args:
            gradient: of the score with respect to A V, (T, H, Q, d); of several attentions, one for each.
            apart: rows that share no tile with others.
        """
        weights = self._weights()
        outer = None if gradient is None else self._outer(gradient)
        for part in split(self.shape, self.device, apart):
            yield Tile(*part, self.shape[1], weights, outer, self.sums_to_1)

    def matrix(self) -> Tensor:
        """Computes A as a whole, (T, H, Q, K)."""
        return self._whole(lambda tile: tile.weights)

    def gradient(self, gradient: Tensor) -> Tensor:
        """Computes the gradient of A as a whole, (T, H, Q, K), from that of A V."""

        def outer(tile: Tile) -> Tensor:
            assert tile.gradient is not None
            return tile.gradient

        return self._whole(outer, gradient)

    def transposed(self, rows: Tensor) -> Tensor:
        """Multiplies A^T by what the rows have, (T, H, Q, d); returns (T, H, K, d)."""
        return self._carried(rows, lambda weights, part: part.mT @ weights)

    def shared(self, rows: Tensor) -> Tensor:
        """Does the same with rows whose absolute values sum to 1."""

        def share(weights: Tensor, part: Tensor) -> Tensor:
            weights = weights.abs()
            whole = weights.sum(-1, keepdim=True)
            return (part / torch.where(whole == 0, 1, whole)).mT @ weights

        return self.transposed(rows) if self.sums_to_1 else self._carried(rows, share)

    def _carried(self, rows: Tensor, carry: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        rows = full(rows)
        found = rows.new_zeros(*self.shape[:2], self.shape[3], rows.shape[3])
        for tile in self.tiles():
            place = tile.images, tile.heads
            part = rows[tile.images, tile.heads, tile.rows]
            if part.device.type == "cpu" and not part.requires_grad and not part.any():
                continue  # as for all but one row of the last layer; a GPU would have to be waited for
            found[place] += carry(tile.weights, part).mT
        return found

    def _weights(self) -> Part:
        """Prepares what computes A for some images, heads and rows."""
        raise NotImplementedError

    def _outer(self, gradient: Gradient) -> Part:
        """Prepares what computes the gradient of A for some of it: O = A V, so dA = dO V^T."""
        assert self._value is not None
        gradient, value = full(gradient), full(self._value.tensor)

        def outer(images: slice, heads: slice, rows: slice | Tensor) -> Tensor:
            left, right = gradient[images, heads, rows], value[images, heads].mT
            return self._memory.products("gradient", left, right)

        return outer

    def _whole(self, part: Callable[[Tile], Tensor], gradient: Tensor | None = None) -> Tensor:
        whole = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        with torch.no_grad(), without_autocast(self.device):
            for tile in self.tiles(gradient):
                whole[tile.images, tile.heads, tile.rows] = part(tile)
        return whole


class StoredWeights(Weights):
    """A that the model itself computed.

    Attributes:
        normalizes: whether rows are divided by their sum, as half precision rounded them.
    """

    def __init__(
        self,
        weights: Tensor,
        value: Tensor,
        *,
        keeps: bool,
        memory: Memory,
        keeper: Keeper,
        sums_to_1: bool,
    ) -> None:
        """Describes A.

        Args:
            weights: A, (T, H, Q, K); H is 1 where the heads were fused.
            value: as for `Weights`.
            keeps: as for `Weights`.
            memory: as for `Weights`.
            keeper: as for `Weights`.
            sums_to_1: as for `Weights`.
        """
        super().__init__(
            tuple(weights.shape), value, keeps=keeps, memory=memory, keeper=keeper, sums_to_1=sums_to_1
        )
        self._stored = keeper.keep(weights)
        self.normalizes = sums_to_1 and weights.dtype not in (torch.float32, torch.float64)

    def _weights(self) -> Part:
        def weights(images: slice, heads: slice, rows: slice | Tensor) -> Tensor:
            found = full(self._stored.tensor[images, heads, rows])
            return found / found.sum(-1, keepdim=True) if self.normalizes else found

        return weights


class DotProductWeights(Weights):
    """softmax(Q K^T * scale + mask), Vaswani et al. 2017, eq. 1, computed anew from Q and K."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        keeps: bool,
        memory: Memory,
        keeper: Keeper,
        mask: Tensor | None = None,
        scale: float | None = None,
        log_sum_exp: Tensor | None = None,
    ) -> None:
        """Describes A.

        Args:
            query: (T, H, Q, d).
            key: (T, H, K, d).
            value: as for `Weights`.
            keeps: as for `Weights`.
            memory: as for `Weights`.
            keeper: as for `Weights`.
            mask: what is added to the scores, or True where attention is allowed.
            scale: of the scores, d^-1/2 by default.
            log_sum_exp: of each row of scores, (T, H, Q), if it is known.
        """
        shape = (*query.shape[:-1], key.shape[-2])
        super().__init__(shape, value, keeps=keeps, memory=memory, keeper=keeper, sums_to_1=True)
        self._mask = None if mask is None else mask.expand(self.shape)
        self._scale = query.shape[-1] ** -0.5 if scale is None else scale
        if not keeps:  # else they lie beside the values, which are kept anyway
            query, key = self._memory.keep(query), self._memory.keep(key)
            log_sum_exp = None if log_sum_exp is None else self._memory.keep(log_sum_exp)
        self._query, self._key, self._log_sum_exp = keeper.keep(query), keeper.keep(key), log_sum_exp

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
        given = self._query.tensor
        *batch, queries, dim = given.shape
        dims, like = dim + (self._log_sum_exp is not None), full(given[:0])
        query = self._memory.take("query", (*batch, queries, dims), like)
        key = self._memory.take("key", (*batch, dims, self.shape[-1]), like)
        query[..., :dim].copy_(given).mul_(self._scale)
        key[..., :dim, :].copy_(self._key.tensor.mT)
        if self._log_sum_exp is not None:
            query[..., dim] = -self._log_sum_exp
            key[..., dim, :] = 1
        return query, key


def _add_mask(scores: Tensor, mask: Tensor) -> None:
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores += mask

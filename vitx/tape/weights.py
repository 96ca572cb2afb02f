"""A of one attention, computed when it is asked for, in tiles.

Where the kernel of the forward pass told the log-sum-exp of each row, the softmax is not run again:
A = exp(q k^T * scale - lse).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from vitx.functional.tiles import ALL, Memory, Part, Tile, full, split
from vitx.models.isolation import without_autocast
from vitx.tape.expanded import over
from vitx.tape.tensors import Keeper

Gradient = Any  # a tensor, or one for each of several attentions


class Pass(Protocol):
    """What the attentions of a pass share; the tape has it."""

    network: str | None
    memory: Memory
    keeper: Keeper


@dataclass(eq=False)
class Weights:
    """The A of one attention: T images or windows, H heads, Q queries, K keys.

    Attributes:
        shape: (T, H, Q, K).
        dtype: of the tiles: float32, or float64 in a float64 model.
        sums_to_1: whether each row of A does.
        prepare: returns what computes A of some images, heads and rows.
        prepare_gradient: returns what computes the gradient of A, from that of A V.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    sums_to_1: bool
    prepare: Callable[[], Part]
    prepare_gradient: Callable[[Gradient], Part]

    def tiles(self, gradient: Gradient | None = None, apart: slice = ALL) -> Iterator[Tile]:
        """Computes A tile by tile and, from that of A V, its gradient; `apart` is as for `split`.

        Neither is prepared before a tile is read for it: some methods need but one, or none.
        """
        prepare, prepare_gradient = cache(self.prepare), cache(lambda: self.prepare_gradient(gradient))

        def compute(*part: slice) -> Tensor:
            return prepare()(*part)

        def compute_gradient(*part: slice) -> Tensor:
            return prepare_gradient()(*part)

        for part in split(self.shape, self.device, apart):
            known = None if gradient is None else compute_gradient
            yield Tile(*part, self.shape[1], compute, known, self.sums_to_1)

    def matrix(self) -> Tensor:
        """Computes A as a whole, (T, H, Q, K)."""
        return self._whole(self.prepare)

    def gradient(self, gradient: Gradient) -> Tensor:
        """Computes the gradient of A as a whole, (T, H, Q, K), from that of A V."""
        return self._whole(lambda: self.prepare_gradient(gradient))

    def _whole(self, prepare: Callable[[], Part]) -> Tensor:
        whole = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        with torch.no_grad(), without_autocast(self.device):
            compute = prepare()
            for part in split(self.shape, self.device):
                whole[part] = compute(*part)
        return whole

    def shared(self, rows: Tensor) -> Tensor:
        """Does as `transposed`, with rows of A whose absolute values are scaled to sum to 1."""
        return self.transposed(rows, scaled=not self.sums_to_1)

    def transposed(self, rows: Tensor, *, scaled: bool = False) -> Tensor:
        """Multiplies A^T by what the rows have, (T, H, Q, d); returns (T, H, K, d)."""
        rows = full(rows)
        found = rows.new_zeros(*self.shape[:2], self.shape[3], rows.shape[3])
        for tile in self.tiles():
            part = rows[tile.images, tile.heads, tile.rows]
            if part.device.type == "cpu" and not part.requires_grad and not part.any():
                continue  # as for all but one row of the last layer; a GPU would have to be waited for
            weights = tile.weights
            if scaled:
                weights = weights.abs()
                size = weights.sum(-1, keepdim=True)
                part = over(part, size)
            found[tile.images, tile.heads] += (part.mT @ weights).mT
        return found


def stored(tape: Pass, weights: Tensor, value: Tensor, *, sums_to_1: bool) -> Weights:
    """Describes A that the model itself computed; H is 1 where the heads were fused.

    Rows that half precision rounded are divided by their sum.
    """
    kept = tape.keeper.keep(weights)
    rounded = sums_to_1 and weights.dtype not in (torch.float32, torch.float64)

    def compute(*part: slice) -> Tensor:
        found = full(kept.tensor[part])
        return found / found.sum(-1, keepdim=True) if rounded else found

    return _described(tape, weights.shape, value, sums_to_1, lambda: compute)


def dot_product(
    tape: Pass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    log_sum_exp: Tensor | None = None,
) -> Weights:
    """Describes softmax(Q K^T * scale + mask), Vaswani et al. 2017, eq. 1, computed anew from Q and K.

    A boolean mask is True where attention is allowed, any other is added to the scores. The scale is d^-1/2
    by default. The log-sum-exp is that of each row of scores, (T, H, Q), if the kernel told it.
    """
    memory, shape = tape.memory, (*query.shape[:-1], key.shape[-2])
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    added = None if mask is None else mask.expand(shape)
    if tape.network is None:  # else they lie beside the values, which are kept anyway
        query, key = memory.keep(query), memory.keep(key)
        log_sum_exp = None if log_sum_exp is None else memory.keep(log_sum_exp)
    queries, keys, sums = tape.keeper.keep(query), tape.keeper.keep(key), log_sum_exp

    def prepare() -> Part:
        # Q * scale and K^T, contiguous and in the precision of the maps. If the log-sum-exp of the rows is
        # known, one more column and a row of ones subtract it in the product.
        *batch, count, dim = queries.tensor.shape
        dims, like = dim + (sums is not None), full(queries.tensor[:0])
        left = memory.take("query", (*batch, count, dims), like)
        right = memory.take("key", (*batch, dims, shape[-1]), like)
        left[..., :dim].copy_(queries.tensor).mul_(factor)
        right[..., :dim, :].copy_(keys.tensor.mT)
        if sums is not None:
            left[..., dim] = -sums
            right[..., dim, :] = 1

        def compute(images: slice, heads: slice, rows: slice) -> Tensor:
            scores = memory.products("weights", left[images, heads, rows], right[images, heads])
            if added is not None:
                part = added[images, heads, rows]
                scores.masked_fill_(~part, -torch.inf) if part.dtype == torch.bool else scores.add_(part)
            return torch.softmax(scores, -1, out=scores) if sums is None else scores.exp_()

        return compute

    return _described(tape, shape, value, True, prepare)


def _described(
    tape: Pass, shape: Sequence[int], value: Tensor, sums_to_1: bool, prepare: Callable[[], Part]
) -> Weights:
    """Describes A, and its gradient if one is recorded: O = A V, so dA = dO V^T."""
    kept = None if tape.network is None else tape.keeper.keep(value)
    memory = tape.memory

    def prepare_gradient(gradient: Tensor) -> Part:
        assert kept is not None
        left, right = full(gradient), full(kept.tensor).mT

        def compute(images: slice, heads: slice, rows: slice) -> Tensor:
            return memory.products("gradient", left[images, heads, rows], right[images, heads])

        return compute

    dtype = torch.promote_types(value.dtype, torch.float32)
    return Weights(tuple(shape), dtype, value.device, sums_to_1, prepare, prepare_gradient)


def joined(parts: Sequence[Weights]) -> Weights:
    """Puts the heads of attentions with rows and columns of the same shape one behind the other."""
    tokens, _, queries, keys = parts[0].shape
    owners = [(number, head) for number, part in enumerate(parts) for head in range(part.shape[1])]

    def by_head(prepare: Callable[[int], Part]) -> Part:
        def compute(images: slice, heads: slice, rows: slice) -> Tensor:
            owned = owners[heads]
            each = (prepare(number)(images, slice(head, head + 1), rows) for number, head in owned)
            return next(each) if len(owned) == 1 else torch.cat([one.clone() for one in each], 1)

        return compute

    def prepare() -> Part:
        return by_head(lambda number: parts[number].prepare())  # anew: all parts use the same memory

    def prepare_gradient(gradients: Sequence[Tensor]) -> Part:
        computes = [part.prepare_gradient(g) for part, g in zip(parts, gradients, strict=True)]
        return by_head(computes.__getitem__)

    dtype, device, sums_to_1 = parts[0].dtype, parts[0].device, all(part.sums_to_1 for part in parts)
    shape = (tokens, len(owners), queries, keys)
    return Weights(shape, dtype, device, sums_to_1, prepare, prepare_gradient)

"""The weights of the attentions of a pass, as the model wrote them or computed anew.

Where the kernel of the forward pass told the log-sum-exp of each row, the softmax is not run again:
A = exp(q k^T * scale - lse).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from vitx.functional.tiles import Memory, Part, full
from vitx.functional.weights import Weights
from vitx.tape.tensors import Keeper


class Pass(Protocol):
    """What the attentions of a pass share; the tape has it."""

    network: str | None
    memory: Memory
    keeper: Keeper


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

    def differentiate(of_output: Tensor) -> Part:
        assert kept is not None
        left, right = full(of_output), full(kept.tensor).mT
        return lambda images, heads, rows: memory.products(
            "gradient", left[images, heads, rows], right[images, heads]
        )

    dtype = torch.promote_types(value.dtype, torch.float32)
    return Weights(tuple(shape), dtype, value.device, sums_to_1, prepare, differentiate=differentiate)


def joined(parts: Sequence[Weights]) -> Weights:
    """Puts the heads of attentions with rows and columns of the same shape one behind the other."""
    owners = [(part, head) for part in parts for head in range(part.shape[1])]

    def by_head(prepare: Callable[[Weights], Part]) -> Part:
        def compute(images: slice, heads: slice, rows: slice) -> Tensor:
            owned = owners[heads]
            each = (prepare(part)(images, slice(head, head + 1), rows) for part, head in owned)
            return next(each) if len(owned) == 1 else torch.cat([one.clone() for one in each], 1)

        return compute

    def gradient_of(part: Weights) -> Part:
        assert part.prepare_gradient is not None
        return part.prepare_gradient()

    return replace(
        parts[0],
        shape=(parts[0].shape[0], len(owners), *parts[0].shape[2:]),
        sums_to_1=all(part.sums_to_1 for part in parts),
        prepare=lambda: by_head(lambda part: part.prepare()),  # anew: all parts use the same memory
        prepare_gradient=parts[0].prepare_gradient and (lambda: by_head(gradient_of)),
    )

"""The weights of the attentions of a pass, as the model stored them or recomputed.

If the forward kernel returned the log-sum-exp of each row, the softmax is not run again:
A = exp(q k^T * scale - lse).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vitx.functional.tiles import Cut, Part, full
from vitx.functional.weights import Weights
from vitx.tape.tape import Tape


def stored(tape: Tape, weights: Tensor, value: Tensor, *, sums_to_1: bool | Tensor) -> Weights:
    """Describe an A that was computed in the forward pass; H is 1 if its heads were fused.

    Rows that half precision rounded are divided by their sum.
    """
    kept, half = tape.keeper.keep(weights), weights.dtype in (torch.float16, torch.bfloat16)

    def compute(part: Cut) -> Tensor:
        found = full(kept.tensor[part])
        return found / found.sum(-1, keepdim=True) if half and sums_to_1 else found

    return _described(tape, weights.shape, value, sums_to_1, compute)


def dot_product(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    log_sum_exp: Tensor | None = None,
) -> Weights:
    """Describe softmax(Q K^T * scale + mask), Vaswani et al. 2017, eq. 1, recomputed from Q and K.

    A boolean mask is True where attention is allowed; any other mask is added to the scores. The scale is
    d^-1/2 by default. `log_sum_exp` is that of each row of scores, (T, H, Q), if the kernel returned it.
    """
    memory, shape = tape.memory, (*query.shape[:-1], key.shape[-2])
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    added = None if mask is None else tape.keeper.keep(mask)
    if tape.network is None:  # otherwise they lie next to the values, which are kept anyway
        query, key = memory.keep(query), memory.keep(key)
        log_sum_exp = None if log_sum_exp is None else memory.keep(log_sum_exp)
    queries, keys, sums = tape.keeper.keep(query), tape.keeper.keep(key), log_sum_exp

    def compute(part: Cut) -> Tensor:
        right = full(keys.tensor[part[:2]]).mT
        scores = memory.products("weights", full(queries.tensor[part]), right, factor)
        if added is not None:
            shown = added.tensor.expand(shape)[part]
            scores.masked_fill_(~shown, -torch.inf) if shown.dtype == torch.bool else scores.add_(shown)
        if sums is None:
            return torch.softmax(scores, -1, out=scores)
        return scores.sub_(sums[part][..., None]).exp_()

    return _described(tape, shape, value, True, compute)


def alike(found: Tensor, wanted: float) -> Tensor:
    """Return whether all entries are equal up to rounding, as a tensor: reading it would wait for a GPU."""
    rounding = {torch.float64: 1e-10, torch.float32: 1e-5}.get(found.dtype, 1e-2)
    return ((found - wanted).abs() <= rounding).all()


def _described(
    tape: Tape, shape: Sequence[int], value: Tensor, sums_to_1: bool | Tensor, compute: Part
) -> Weights:
    """Describe A, and its gradient if one is recorded: O = A V, so dA = dO V^T."""
    kept = None if tape.network is None else tape.keeper.keep(value)
    memory = tape.memory

    def differentiate(of_output: Tensor) -> Part:
        assert kept is not None
        left, right = full(of_output), full(kept.tensor).mT
        return lambda part: memory.products("gradient", left[part], right[part[:2]])

    dtype = torch.promote_types(value.dtype, torch.float32)
    return Weights(tuple(shape), dtype, value.device, sums_to_1, compute, differentiate=differentiate)


def joined(parts: Sequence[Weights]) -> Weights:
    """Concatenate the heads of attentions whose A have the same numbers of rows and columns."""
    if len(parts) == 1:
        return parts[0]
    owners = [(number, head) for number, part in enumerate(parts) for head in range(part.shape[1])]

    def by_head(computes: Sequence[Part]) -> Part:
        def compute(part: Cut) -> Tensor:
            images, heads, rows = part
            owned = owners[heads]
            each = (computes[number]((images, slice(head, head + 1), rows)) for number, head in owned)
            # All attentions compute in the same memory.
            return next(each) if len(owned) == 1 else torch.cat([one.clone() for one in each], 1)

        return compute

    gradients = [part.compute_gradient for part in parts if part.compute_gradient is not None]
    return replace(
        parts[0],
        shape=(parts[0].shape[0], len(owners), *parts[0].shape[2:]),
        normalized=all(part.sums_to_1 for part in parts),
        compute=by_head([part.compute for part in parts]),
        compute_gradient=by_head(gradients) if gradients else None,
    )

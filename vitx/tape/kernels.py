"""Fused attention as the model runs it, or by way of A, at the same cost, where A is small.

A forward kernel returns the log-sum-exp of each row of scores, from which A is one exponential away.
Where A is small, a kernel that does not store it is no faster. Then A is computed instead, and its fused
heads, which are all that a rollout needs, are kept.
"""

from typing import Any

import torch
from torch import Tensor

from vitx.functional.fusing import fused
from vitx.functional.tiles import ALL, Cut, Tile, multiply, split
from vitx.tape.call import Call

SMALL = 2**21  # entries of A for one image; the fused heads of larger ones would take too much memory


def run(call: Call) -> Any:
    """Run a call unchanged, but small attention by way of A; keep its fused heads in `call.fused`."""
    if call.tape.head_fusion is None or not _is_small(call):
        return call.overload.function(*call.args, **call.kwargs)
    query, key, value = call["query"], call["key"], call["value"]
    (batch, heads, queries, dim), keys = query.shape, key.shape[2]
    scale = dim**-0.5 if call["scale"] is None else call["scale"]
    output = torch.empty_like(query)  # the kernel's layout, in which a graph may view it
    call.fused, memory = value.new_empty(batch, queries, keys), call.tape.memory

    def compute(part: Cut) -> Tensor:
        scores = memory.products("weights", query[part], key[part[:2]].mT, scale)
        weights = torch.softmax(scores, -1, out=scores)
        multiply(weights, value[part[:2]], output[part])
        return weights

    # Either way, heads are fused one after another: the result for an image does not depend on the batch.
    parts = split((batch, heads, queries, keys), query.device)
    if batch < heads:
        parts = ((slice(image, image + 1), ALL, ALL) for image in range(batch))
    tiles = (Tile(*part, heads, compute) for part in parts)
    for _ in fused(tiles, call.tape.head_fusion, call.fused):
        pass  # tiles are fused as they are computed
    return output, query.new_full(query.shape[:3], torch.nan)  # nobody asks for the log-sum-exp


def _is_small(call: Call) -> bool:
    """Return whether A is small and plain; in half precision, it would round differently from the kernel."""
    query, key, value = call["query"], call["key"], call["value"]
    of_values, masked = call.value(value), call["is_causal"] or call["attn_mask"] is not None
    if of_values is None or masked or call["dropout_p"]:
        return False
    of_query, (images, heads, tokens, _) = call.value(query), of_values.axes
    rows = of_query.axes[2] if of_query else ()
    apart = all(factor.channels for factor in heads)
    apart = apart and not any(factor.channels for factor in (*images, *rows, *tokens))
    plain = query.dtype in (torch.float32, torch.float64) and not query.is_inference()
    same = query.shape[:2] == key.shape[:2] == value.shape[:2]
    entries = query.shape[1] * query.shape[2] * key.shape[2]
    return apart and plain and same and type(query) is Tensor and entries <= SMALL

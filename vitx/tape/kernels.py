"""Fused attention as the model runs it, and A for the same work where that is small.

A kernel of the forward pass knows the log-sum-exp of each row of scores; with it, A is one exponential away.
Where A is small, a kernel that does not write it down is no faster than one that does: what a rollout needs
of it, the fused heads, is kept.
"""

from typing import Any

import torch
from torch import Tensor

from vitx.functional.fusing import fuse_into
from vitx.functional.tiles import Memory, without_copies
from vitx.tape.call import Call

_SMALL = 2**21  # entries of the A of an image; the fused heads of larger ones would take too much memory


def run(call: Call) -> Any:
    """Runs a call as it is, or small attention by way of A.

    Returns:
        Its output, the same to the last bit; up to rounding if A was kept, in `call.fused`.
    """
    if call.tape.head_fusion is not None and call.name == "_scaled_dot_product_flash_attention_for_cpu":
        query, key, value = call["query"], call["key"], call["value"]
        if _is_small(call, query, key, value):
            output, call.fused = with_fused_heads(
                *(query, key, value, call["scale"], call.tape.head_fusion, call.tape.memory)
            )
            return output, query.new_empty(query.shape[:3])
    return call.overload.function(*call.args, **call.kwargs)


def with_fused_heads(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, head_fusion: str, memory: Memory
) -> tuple[Tensor, Tensor]:
    """Runs attention by way of A; returns its output, laid out as the kernel does, and the fused heads.

    Heads are fused one after another, so that what is found of an image does not depend on those beside it.
    """
    batch, heads, queries, dim = query.shape
    keys = key.shape[-2]
    scale = dim**-0.5 if scale is None else scale
    output = value.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    fused = value.new_empty(batch, queries, keys)
    for part in without_copies(batch, heads, queries * keys, query.device):
        q, k, v = query[part], key[part], value[part]
        scores = memory.take("weights", (len(q), queries, keys), q).baddbmm_(q, k.mT, beta=0, alpha=scale)
        weights = torch.softmax(scores, -1, out=scores)
        output[part] = weights @ v
        images, some = part
        for head, matrix in enumerate(weights) if isinstance(images, int) else [(some, weights)]:
            fuse_into(fused[images], matrix, head_fusion, heads, first=head == 0)
    return output, fused


def _is_small(call: Call, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Returns whether A is small and plain; half precision would round it otherwise than the kernel."""
    if call["is_causal"] or call["attn_mask"] is not None or call["dropout_p"]:
        return False
    of_values = call.value(value)
    if of_values is None or not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return False
    heads = of_values.axes[1]
    if not all(factor.channels for factor in heads) or any(f.channels for f in of_values.axes[2]):
        return False
    entries = query.shape[1] * query.shape[2] * key.shape[2]
    plain = query.dtype in (torch.float32, torch.float64) and not query.is_inference()
    return plain and type(query) is Tensor and entries <= _SMALL

"""Weights times values: attention, as the model wrote it or as a fused kernel."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from vitx.functional.weights import Weights
from vitx.tape import axes as ax
from vitx.tape.attention import Attention
from vitx.tape.call import Call, rule
from vitx.tape.contraction import Contraction, Given, Layout, Operand
from vitx.tape.expanded import reshaped, summed
from vitx.tape.values import Step, Value
from vitx.tape.weights import dot_product, stored


def attended(
    call: Call, contraction: Contraction, pair: Sequence[Given], factor: float, *, weights_first: bool
) -> Value:
    """Follows weights times values, as the model wrote it."""
    weights, values = contraction.left, contraction.right
    (a, _), (v, _) = pair
    if not weights_first:
        weights, values, a, v = values, weights, v, a
    assert weights.value is not None
    assert values.value is not None
    layout = Layout.of(contraction, weights, values, values.value.axes)
    matrix = layout.weights(weights.aligned(a))
    matrix = matrix if factor == 1 else matrix * factor
    dims = () if weights.value.dim is None else (weights.places[weights.value.dim],)
    sums_to_1 = dims == contraction.summed and factor == 1 and not weights.value.rounded
    described = stored(call.tape, matrix, layout.values(values.aligned(v)), sums_to_1=sums_to_1)
    return attention(call, described, layout, weights.value, values)


def attention(call: Call, weights: Weights, layout: Layout, asking: Value | None, values: Operand) -> Value:
    """Adds the step of an attention; what mixes the channels of each token is none between tokens."""
    tape = call.tape
    asked = tape.constant(None) if asking is None else asking
    assert values.value is not None

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        return [layout.of_values(weights.transposed(layout.outputs(arrived[0])), values)]

    origin = (values.value.above | 1 << values.value.number) & tape.residuals
    last = max(origin.bit_length() - 1, 0)
    kind = partial(Attention, weights=weights, layout=layout, operand=values, origin=last)
    found = call.make([values.value, asked], _by_method, gradient, sources=[values.value], kind=kind)
    if layout.over_channels:
        tape.attentions.pop()
    else:
        found.open = found.open | {found.made_by}
    return found


def _by_method(arrived: list[Tensor]) -> list[Tensor | None]:
    """Never called: what an attention does with relevance is a matter of the method."""
    raise AssertionError


def normalized(call: Call, before: Attention) -> Value:
    """Follows exponentials times values, over the sum of the exponentials: a softmax times the values."""
    whole = before.weights.matrix()
    whole = whole / whole.sum(-1, keepdim=True)
    weights = replace(before.weights, sums_to_1=True, compute=whole.__getitem__)
    call.tape.attentions.remove(before)
    found = attention(call, weights, before.layout, before.inputs[1], before.operand)
    found.open = found.open - {before}
    return found


@rule(*(f"_scaled_dot_product_{name}" for name in (
    "flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention",
    "fused_attention_overrideable",
)))  # fmt: skip
def fused(call: Call) -> list[Value]:
    """Follows the kernels that do not write A down: it is computed anew from queries and keys."""
    query, key, value = (call[name].detach() for name in ("query", "key", "value"))
    of_query, of_value = call.value(call["query"]), call.value(call["value"])
    if of_value is None:
        return [call.make(call.values, None)]
    groups = query.shape[1] // value.shape[1]
    if groups > 1:
        of_value = _repeated(call, of_value, groups)
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    (batch, heads, q, _), k = query.shape, key.shape[2]
    weighing = Operand(of_query, query.shape, (batch, heads, q, k, 1), (0, 1, 2, 3))
    values = Operand(of_value, value.shape, (batch, heads, 1, k, value.shape[3]), (0, 1, 3, 4))
    layout = Layout.of(
        Contraction(weighing, values, (3,), tuple(call.out.shape)), weighing, values, of_value.axes
    )
    weights = _described(call, layout, query, key, value)
    return [attention(call, weights, layout, of_query, values)]


def _repeated(call: Call, value: Value, groups: int) -> Value:
    """Several heads of queries share the keys and values of one."""
    found = call.tape.value((value.shape[0], value.shape[1] * groups, *value.shape[2:]), [value])

    def back(arrived: list[Tensor]) -> list[Tensor]:
        return [summed(reshaped(arrived[0], (*value.shape[:2], groups, *value.shape[2:])), [2])]

    def axes(of: list[ax.Axes]) -> ax.Axes:
        return (of[0][0], (*of[0][1], ax.Factor(groups, True)), *of[0][2:])

    call.tape.append(Step("repeat_interleave", [value], [found], back, back, axes=axes))
    return found


def _described(call: Call, layout: Layout, query: Tensor, key: Tensor, value: Tensor) -> Weights:
    """Says how A is computed: it was kept, or is made anew of queries, keys and log-sum-exps."""
    if call.fused is not None:
        return stored(call.tape, call.fused[:, None], value, sums_to_1=call.tape.head_fusion == "mean")
    mask = call["attn_mask"] if call["attn_mask"] is not None else call["attn_bias"]
    shape = (*query.shape[:3], key.shape[2])
    if call["is_causal"]:
        mask = torch.ones(shape[2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        mask = layout.weights(mask.detach().expand(shape)[..., None])
    first = [_tokens_first(tensor, layout) for tensor in (query, key, value)]
    sums = call.outs[1] if len(call.outs) > 1 and call.outs[1].shape[:3] == query.shape[:3] else None
    if sums is not None:
        sums = _tokens_first(sums[..., None], layout)[..., 0]
    return dot_product(call.tape, *first, mask=mask, scale=call["scale"], log_sum_exp=sums)


def _tokens_first(tensor: Tensor, layout: Layout) -> Tensor:
    """Brings (B, H, N, d) to (T, H, N, d), heads apart from windows."""
    if not layout.factors:
        return tensor.reshape(-1, 1, *tensor.shape[2:]) if layout.heads == 1 != tensor.shape[1] else tensor
    found = tensor.reshape(*layout.factors, *tensor.shape[2:])
    found = found.permute(*layout.order, found.ndim - 2, found.ndim - 1)
    return found.reshape(-1, layout.heads, *tensor.shape[2:])

"""Weights times values: attention, written out in the model or as a fused kernel."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitx.functional.tiles import Part
from vitx.functional.weights import Weights
from vitx.tape import axes as ax
from vitx.tape.attention import Attention
from vitx.tape.call import Call
from vitx.tape.contraction import Contraction, Layout, Operand
from vitx.tape.expanded import ratio
from vitx.tape.registry import RULES, rule
from vitx.tape.rules.elementwise import of_scores
from vitx.tape.tape import Tape
from vitx.tape.values import Value
from vitx.tape.walk import through, walk
from vitx.tape.weights import alike, dot_product, stored

FUSED = """flash_attention_for_cpu flash_attention efficient_attention cudnn_attention
fused_attention_overrideable""".split()  # noqa: SIM905


def attended(call: Call, contraction: Contraction, weights: Operand, values: Operand, factor: float) -> Value:
    """Record weights times values that are written out in the model."""
    assert weights.value is not None
    assert values.value is not None
    layout = Layout.of(contraction, weights, values, weights.value.axes, weights.value.softmax_over)
    layout = replace(layout, learned_queries=layout.learned_queries and not attends(call, weights.value))
    matrix = layout.grouped(weights.tensor.detach(), "THQK")
    matrix = matrix if factor == 1 else matrix * factor
    laid = layout.grouped(values.tensor.detach(), "THKD")
    described = stored(call.tape, matrix, laid, sums_to_1=alike(matrix.sum(-1), 1))
    return attention(call, described, layout, weights.value, values.value)


def has_one_key(call: Call, weights: Value) -> bool:
    """Return whether weights are a softmax over a dimension of size 1."""
    over = call.tape.source_of(weights).softmax_over
    return weights.kind == "weights" and over is not None and not ax.channel_dims(over, some=True)


def attends(call: Call, weights: Value) -> bool:
    """Return whether weights are a softmax of scores, or a part of one."""
    step = call.tape.source_of(weights).made_by
    if step is None or weights.kind != "weights" or weights.softmax_over is None:
        return False
    return any(one.kind == "scores" or of_scores(call, one) for one in step.inputs)


def attention(call: Call, weights: Weights, layout: Layout, asking: Value | None, values: Value) -> Value:
    """Add the step of an attention; if it mixes channels of the same token, it is not listed as one."""
    tape = call.tape
    asked = tape.constant(None) if asking is None else asking
    if values.mass is not None:
        counts = layout.grouped(values.mass().expand(values.shape), "THKD")
        weights = weights.only(counts.amax((1, 3))[:, None, None] != 0)

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        step = found.made_by
        assert isinstance(step, Attention)  # whose weights may be normalized later
        return [layout.to_values(step.weights.transposed(step.arrived(arrived[0])))]

    before = (values.ancestors | 1 << values.number) & tape.residuals
    kind = partial(Attention, weights=weights, layout=layout, last_residual=max(before.bit_length() - 1, 0))
    shape = tuple(call.out.shape)
    found = call.make(
        *([values, asked], None, gradient),
        sources=[values],
        axes=lambda _: ax.reshaped(layout.axes, shape),
        kind=kind,
    )
    if layout.over_channels:
        tape.attentions.pop()
    else:
        found.open = found.open | {found.made_by}
    return found


def _unnormalized(tape: Tape, value: Value) -> Attention | None:
    """Return the attention whose output a value rearranges if no softmax has made its weights."""
    step = tape.source_of(value).made_by
    if not isinstance(step, Attention) or value.rearranges != step.value.rearranges or step.divided:
        return None
    asked = step.inputs[1]
    return step if asked.kind == "exp" or (asked.kind == "weights" and asked.softmax_over is None) else None


def rescaled(call: Call, output: Value, factor: float) -> bool:
    """Count a number that multiplies the output of an attention among its weights, if no softmax made them.

    Its gradient is that of the weights then. Return whether this was done.
    """
    step = _unnormalized(call.tape, output)
    if step is None or step.inputs[1].kind == "exp" or not 0 < factor < math.inf:
        return False
    before, plain = step.weights, call.tape.network == "plain"

    def differentiate(of_output: Tensor) -> Part:
        assert before.differentiate is not None
        return before.differentiate(of_output / factor if plain else of_output)

    step.weights = replace(
        before,
        normalized=alike(before.matrix().sum(-1) * factor, 1),
        compute=lambda part: before.compute(part) * factor,
        differentiate=differentiate,
    )
    return True


def normalized(call: Call, sums: Value, divide_by: Callable[[], Tensor]) -> Value | None:
    """Record a softmax whose exponentials multiply the values before they are divided by their sum.

    `sums` are then the exponentials times the values, possibly rearranged, or some of their channels. The
    divisor may be greater than their sum by one number for all rows. Return None if it is anything else.
    Other weights, such as ReLUs of scores, may take the place of the exponentials.
    """
    tape, shape = call.tape, sums.shape
    step = _unnormalized(tape, sums)
    if step is None or call.out.shape != shape:
        return None
    before, inside = step.weights, range(step.index + 1, len(tape.steps))
    part = walk(tape, {sums: divide_by().detach().expand(shape)}, through, steps=inside).arrived[step.value]
    given, whole = step.arrived(part), before.matrix().sum(-1, keepdim=True)
    divided, divisor = given != 0, given.amax(-1, keepdim=True)
    more = divisor - whole  # such as 1, in a softmax off by one
    if not alike(ratio(more - more.flatten()[0], whole), 0):
        return None
    if not alike(ratio((given - divisor) * divided, whole), 0):
        return None

    def differentiate(of_output: Tensor) -> Part:
        assert before.differentiate is not None
        if tape.network != "plain":
            return before.differentiate(of_output)
        found = before.differentiate(of_output * divided)
        return lambda part: found(part) * divisor[part]

    step.divided = True
    step.weights = replace(
        before,
        normalized=alike(whole / divisor, 1),
        compute=lambda part: before.compute(part) / divisor[part],
        differentiate=differentiate,
    )
    return call.make([sums], lambda r: [r[0]], lambda g: [g[0]], sources=[sums], axes=lambda of: of[0])


@rule(*(f"_scaled_dot_product_{name}" for name in FUSED))
def fused(call: Call) -> list[Value]:
    """Record a kernel that does not store A: it is recomputed from queries and keys."""
    query, key, value = (call[name].detach() for name in ("query", "key", "value"))
    of_query, of_value = call.value(call["query"]), call.value(call["value"])
    assert of_value is not None
    groups = query.shape[1] // value.shape[1]
    if groups > 1:  # several query heads share one head of keys and values
        repeat: Any = torch.ops.aten.repeat_interleave.self_int
        key, value = repeat(key, groups, 1), repeat(value, groups, 1)
        repeated = call.inner(repeat, call["value"], groups, 1, out=value)
        (of_value,) = RULES["repeat_interleave"](repeated)
        assert of_value.made_by is not None
        of_value.made_by.axes = lambda of: (of[0][0], (*of[0][1], ax.Factor(groups, True)), *of[0][2:])
    (batch, heads, q, _), k = query.shape, key.shape[2]
    weighing = Operand(query, of_query, (batch, heads, q, k, 1))
    values = Operand(value, of_value, (batch, heads, 1, k, value.shape[3]))
    asking = (*(of_query.axes[:3] if of_query else ax.tokens((batch, heads, q))), *ax.tokens((k, 1)))
    layout = Layout.of(Contraction(weighing, values, (3,)), weighing, values, asking)
    return [attention(call, _described(call, layout, query, key, value), layout, of_query, of_value)]


def _described(call: Call, layout: Layout, query: Tensor, key: Tensor, value: Tensor) -> Weights:
    """Describe A, by its fused heads if these were kept, else by queries, keys and log-sum-exps."""
    if call.fused is not None:
        return stored(call.tape, call.fused[:, None], value, sums_to_1=call.tape.head_fusion == "mean")
    mask = call["attn_mask"] if call["attn_mask"] is not None else call["attn_bias"]
    shape = (*query.shape[:3], key.shape[2])
    if call["is_causal"]:
        mask = torch.ones(shape[2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        mask = layout.grouped(mask.detach().expand(shape), "THQK")
    sums = call.outs[1] if len(call.outs) > 1 and call.outs[1].shape[:3] == query.shape[:3] else None
    sums = None if sums is None else layout.tokens_first(sums, "THQ")
    pairs = ((query, "THQ"), (key, "THK"), (value, "THK"))
    operands = (layout.tokens_first(tensor, letters) for tensor, letters in pairs)
    return dot_product(call.tape, *operands, mask=mask, scale=call["scale"], log_sum_exp=sums)

"""Products of two live values: scores, attention, gates; and of one with a constant, summed or not."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.attention import Attention, Scores
from vitx.tape.call import Call
from vitx.tape.contraction import Contraction, Layout, Operand
from vitx.tape.expanded import fitted, reshaped, scaled, summed
from vitx.tape.registry import rule
from vitx.tape.values import Step, Value
from vitx.tape.weights import DotProductWeights, StoredWeights, Weights

WEIGHING = ("weights", "exp")
LINEAR_ATTENTION = "a product of three live values with no softmax between (linear attention)"


def multiplied(call: Call, first: Any, second: Any) -> Value:
    """Follows a product, element by element."""
    one, other = (call.value(t) if isinstance(t, Tensor) else None for t in (first, second))
    if one is not None and other is not None:
        found = product(call, first, second)
        for above, by in ((one, other), (other, one)):
            if by.kind == "size" and by.total is not None and by.total[0].base == above.base:
                found.kind, found.dim = "weights", by.total[1][0] if len(by.total[1]) == 1 else None
        if first.numel() and second.numel():
            call.factors = [(first, one), (second, other)]
        return found
    tensor, factor = (first, second) if one is not None else (second, first)
    value = other if one is None else one
    assert value is not None
    found = _times_constant(call, value, factor)
    if isinstance(factor, Tensor) and factor.numel() > 1:
        call.factors = [(tensor, value), (factor, None)]
    elif isinstance(factor, Tensor) or value.kind is None:
        call.factors = call.factors_of(tensor) if found.shape == value.shape and factor == 1 else None
    return found


def _times_constant(call: Call, value: Value, factor: Any) -> Value:
    before, shape = value.shape, call.out.shape
    if isinstance(factor, Tensor) and factor.is_floating_point() is False:
        factor = factor.to(call.out.dtype)

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        return [fitted(arrived[0] * factor, before)]

    found = call.make(
        [value],
        lambda r: [fitted(r[0], before)],
        gradient,
        axes=lambda of: ax.broadcast(of[0], shape),
    )
    if before == shape:
        found.roots, found.sum, found.fan, found.place = value.roots, value.sum, value.fan, value.place
        found.via = value.via
        found.base, found.proportional = value.base, value.proportional
    if isinstance(factor, Tensor) and factor.numel() > 1 and call.is_fixed(factor):
        kept, mass = call.tape.keeper.keep(factor), value.mass
        found.mass = lambda: kept.tensor.abs() * (1 if mass is None else mass())
    if value.kind != "log":
        found.kind = value.kind
    if value.kind == "weights" and isinstance(factor, (int, float)) and factor == 1:
        found.dim = value.dim
    if not isinstance(factor, Tensor):
        found.total = value.total
    return found


def divided(call: Call, first: Any, second: Any) -> Value:
    """Follows a quotient: what divides is a scale; exponentials over their sum are a softmax."""
    above = call.value(first) if isinstance(first, Tensor) else None
    below = call.value(second) if isinstance(second, Tensor) else None
    if below is None:
        assert above is not None
        return _times_constant(call, above, 1 / second)
    if above is None:
        shape = below.shape
        own = [call.tape.constant(call.out.clone())] if call.tape.accounts else []
        found = call.make(
            [below], lambda r: [fitted(r[0], shape)], lambda g: [g[0]] if own else [], sources=own
        )
        found.kind = "weights" if below.kind in ("scores", "exp") else "size"
        found.total = below.total
        return found
    found = product(call, first, second, quotient=True)
    if below.total is not None:
        summand, dims = below.total
        if above.base == summand.base or above is summand:
            found.kind, found.dim = "weights", dims[0] if len(dims) == 1 else None
        elif isinstance(above.made_by, Attention) and above.made_by.inputs[1] is summand:
            return _normalized(call, above.made_by)
    return found


def _normalized(call: Call, before: Attention) -> Value:
    """Follows exponentials times values, over the sum of the exponentials: a softmax times the values."""
    whole = before.weights.matrix()
    weights = StoredWeights(
        whole / whole.sum(-1, keepdim=True),
        before.layout.values(before.operand.aligned),
        keeps=call.tape.network is not None,
        memory=call.tape.memory,
        keeper=call.tape.keeper,
        sums_to_1=True,
    )
    call.tape.attentions.remove(before)
    found = attention(call, weights, before.layout, before.inputs[1], before.operand, before.rows)
    found.open = found.open - {before}
    return found


def product(call: Call, first: Tensor, second: Tensor, *, quotient: bool = False) -> Value:
    """Follows a product or quotient of two live values, none of which is summed.

    What weighs, or says how large something is, is held: all relevance is the other one's. So is what was
    made from the other one, as a gate.
    """
    one, other = call.value(first), call.value(second)
    assert one is not None
    assert other is not None
    held = 1 if quotient else _held(one, other)
    if one.kind == other.kind == "exp" and one.base != other.base:
        return call.make(call.values, None)  # a sum, as its logarithm would show
    if held is None:
        return _halved(call, first, second, one, other)
    value, factor = (one, second) if held == 1 else (other, first)
    before, shape = value.shape, call.out.shape
    all_its_own = quotient or one.kind in (*WEIGHING, "size") or other.kind in (*WEIGHING, "size")
    all_its_own = all_its_own or one.base == other.base
    gate = call.tape.keeper.keep(1 / factor if quotient else factor) if call.linearised else None

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        assert gate is not None
        return [fitted(arrived[0] * gate.tensor, before)]

    if all_its_own:
        found = call.make(
            [value],
            lambda r: [fitted(r[0], before)],
            gradient,
            axes=lambda of: ax.broadcast(of[0], shape),
        )
    else:
        shapes = [one.shape, other.shape]
        found = call.make(
            [one, other], lambda r: [fitted(scaled(r[0], 0.5), s) for s in shapes], gradient, sources=[value]
        )
    if one.base == other.base and one.shape == other.shape:
        found.base, found.proportional = one.base, False
    if value.kind in ("size", "scores", "weights"):
        found.kind = value.kind
    return found


def _held(one: Value, other: Value) -> int | None:
    """Returns which of two factors is held, 0 or 1; None where each counts half."""
    for kinds in (WEIGHING, ("size",)):
        if (one.kind in kinds) != (other.kind in kinds):
            return 0 if one.kind in kinds else 1
    for n, (made, of) in enumerate(((one, other), (other, one))):
        if made.above >> of.number & 1:
            return n
    if one.base == other.base:
        return 0 if other.proportional and not one.proportional else 1
    if other.above >> one.base & 1:
        return 1
    return 0 if one.above >> other.base & 1 else None


def _halved(call: Call, first: Tensor, second: Tensor, one: Value, other: Value) -> Value:
    shapes = [one.shape, other.shape]
    keep = call.tape.keeper.keep
    factors = (keep(second), keep(first)) if call.linearised else ()

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        half = arrived[0] / 2
        return [fitted(half * f.tensor, s) for f, s in zip(factors, shapes, strict=True)]

    return call.make([one, other], lambda r: [fitted(scaled(r[0], 0.5), s) for s in shapes], gradient)


def contracted(call: Call, contraction: Contraction, factor: float = 1.0) -> Value | None:
    """Follows a product that is summed: attention, scores, or a live value times constants."""
    left, right = contraction.left, contraction.right
    if left.value is None or right.value is None:
        return _with_constants(call, contraction, factor)
    kinds = left.value.kind, right.value.kind
    if kinds[0] in WEIGHING and kinds[1] not in (*WEIGHING, "scores"):
        return attended(call, contraction, left, right, factor)
    if kinds[1] in WEIGHING and kinds[0] not in (*WEIGHING, "scores"):
        return attended(call, contraction, right, left, factor)
    if kinds[0] in WEIGHING and kinds[1] in WEIGHING:
        found = call.make(call.values, None)
        found.kind = "weights"
        return found
    if "scores" in kinds:
        return call.make(call.values, None, name=LINEAR_ATTENTION)
    return _scores(call, contraction, factor)


def _scores(call: Call, contraction: Contraction, factor: float) -> Value:
    """Follows q k^T: relevance is the query's, which is of the same tokens as the rows that have it."""
    operands = [contraction.left, contraction.right]
    values = [operand.value for operand in operands if operand.value is not None]
    others = [call.tape.keeper.keep(operand.tensor) for operand in operands] if call.linearised else []
    full = [1 if d in contraction.summed else max(pair) for d, pair in enumerate(_pairs(contraction))]

    def relevance(arrived: list[Tensor]) -> list[Tensor | None]:
        r = reshaped(arrived[0], full)
        own = [_own(contraction, operand) for operand in operands]
        asking = next((n for n, dims in enumerate(own) if not any(_differs(r, d) for d in own[1 - n])), 0)
        share: list[Tensor | None] = [None, None]
        share[asking] = _evenly(r, operands[asking], contraction.summed)
        return share

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0].reshape(full) * (factor / 2)
        aligned = [other.tensor.reshape(o.shape) for other, o in zip(others, operands, strict=True)]
        return [
            fitted((g * aligned[1 - n]), operand.shape).reshape(operand.tensor.shape)
            for n, operand in enumerate(operands)
        ]

    found = call.make(values, relevance, gradient, kind=Scores)
    found.kind = "scores"
    return found


def _pairs(contraction: Contraction) -> list[tuple[int, int]]:
    return list(zip(contraction.left.shape, contraction.right.shape, strict=True))


def _own(contraction: Contraction, operand: Operand) -> list[int]:
    """Returns the dimensions of the output that one operand alone has."""
    other = contraction.right if operand is contraction.left else contraction.left
    rest = [d for d in range(len(operand.shape)) if d not in contraction.summed]
    return [d for d in rest if operand.shape[d] > 1 == other.shape[d]]


def _differs(r: Tensor, dim: int) -> bool:
    if r.shape[dim] == 1 or r.stride(dim) == 0:
        return False
    return not torch.allclose(r, r.narrow(dim, 0, 1), rtol=1e-4, atol=1e-12)


def _evenly(r: Tensor, operand: Operand, dims: Sequence[int]) -> Tensor:
    """Shares out what an output has evenly among what was summed for it, in the shape of an operand."""
    count = 1
    for dim in dims:
        count *= operand.shape[dim]
    copies = [d for d, n in enumerate(operand.shape) if n == 1 < r.shape[d]]
    share = scaled(summed(r, copies, keepdim=True), 1 / count).expand(operand.shape)
    return reshaped(share, operand.tensor.shape)


def _with_constants(call: Call, contraction: Contraction, factor: float) -> Value:
    """A live value times constants, summed: evenly where these were learned, else in proportion to them."""
    live, constant = contraction.left, contraction.right
    if live.value is None:
        live, constant = constant, live
    assert live.value is not None
    fixed = call.is_fixed(constant.tensor)
    layout = Layout.of(contraction, constant, live, live.value.axes)
    weights, before = layout.weights(constant.aligned.to(call.out.dtype)), live.tensor.shape
    blind = [call.tape.constant(None, ())] if fixed else []
    full = [1 if d in contraction.summed else max(pair) for d, pair in enumerate(_pairs(contraction))]

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        if not fixed:
            return [_evenly(reshaped(arrived[0], full), live, contraction.summed)]
        r = layout.outputs(arrived[0])
        size = weights.abs().to(r.dtype)
        whole = size.sum(-1, keepdim=True)
        seen = whole > 0
        share = size.mT @ torch.where(seen, r / torch.where(seen, whole, 1), 0)
        return [layout.of_values(share, live), (r * ~seen).sum()]

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = layout.outputs(arrived[0])
        return [layout.of_values(weights.to(g.dtype).mT @ g * factor, live).reshape(before)]

    def axes(of: list[ax.Axes]) -> ax.Axes | None:
        aligned: list[ax.Dimension] = [()] * len(full)
        for place, part in zip(live.places, of[0], strict=True):
            aligned[place] = part
        dims = [
            aligned[d] or ax.dimension(n, not fixed)
            for d, n in enumerate(full)
            if d not in contraction.summed
        ]
        return tuple(dims) if len(dims) == len(call_shape) else None

    found = call.make([live.value, *blind], relevance, gradient, sources=[live.value], axes=axes)
    call_shape = tuple(found.shape)
    if fixed:
        found.mass = lambda: layout.of_outputs(weights.abs().sum(-1, keepdim=True), call_shape)
    found.fan = None if fixed else (math.prod(live.shape[d] for d in contraction.summed), live.value.roots)
    if live.value.kind in ("scores", "weights"):
        found.kind = live.value.kind
    return found


def attended(
    call: Call, contraction: Contraction, weights: Operand, values: Operand, factor: float = 1.0
) -> Value:
    """Weights times values, as the model wrote it."""
    assert weights.value is not None
    assert values.value is not None
    layout = Layout.of(contraction, weights, values, values.value.axes)
    dims = [weights.places[weights.value.dim]] if weights.value.dim is not None else []
    matrix = layout.weights(weights.aligned)
    if factor != 1:
        matrix = matrix * factor
    described = StoredWeights(
        matrix,
        layout.values(values.aligned),
        keeps=call.tape.network is not None,
        memory=call.tape.memory,
        keeper=call.tape.keeper,
        sums_to_1=tuple(dims) == contraction.summed and factor == 1 and not weights.value.rounded,
    )

    def rows(found: Tensor) -> Tensor:
        share = scaled(found[..., None].expand(*found.shape, matrix.shape[-1]), 1 / matrix.shape[-1])
        return layout.of_weights(share, weights)

    return attention(call, described, layout, weights.value, values, rows)


def attention(
    call: Call, weights: Weights, layout: Layout, asking: Value | None, values: Operand, rows: Any
) -> Value:
    """Adds the step of an attention; what mixes the channels of each token is none between tokens."""
    tape = call.tape
    asked = tape.constant(None, ()) if asking is None else asking
    assert values.value is not None

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        return [layout.of_values(weights.transposed(layout.outputs(arrived[0])), values)]

    found = call.make([values.value, asked], _by_method, gradient, sources=[values.value], kind=Attention)
    step = found.made_by
    assert isinstance(step, Attention)
    origin = (values.value.above | 1 << values.value.number) & tape.residuals
    step.describe(weights, layout, values, rows, max(origin.bit_length() - 1, 0))
    if layout.over_channels:
        tape.attentions.remove(step)
    else:
        found.open = found.open | {step}
    return found


def _by_method(arrived: list[Tensor]) -> list[Tensor | None]:
    """Never called: what an attention does with relevance is a matter of the method."""
    raise AssertionError


@rule(*(f"_scaled_dot_product_{name}" for name in (
    "flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention",
    "fused_attention_overrideable",
)))  # fmt: skip
def fused(call: Call) -> list[Value]:
    """Follows the kernels that do not write A down: it is computed anew from queries and keys."""
    query, key, value = (call[name].detach() for name in ("query", "key", "value"))
    of_query, of_value = call.value(call["query"]), call.value(call["value"])
    if of_value is None:
        return call.make_all(call.values, None, outs=[call.out])
    groups = query.shape[1] // value.shape[1]
    if groups > 1:
        of_value = _repeated(call, of_value, groups)
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    (batch, heads, q, d), k = query.shape, key.shape[2]
    weighing = Operand(query, of_query, (batch, heads, q, k, 1), (0, 1, 2, 3))
    values = Operand(value, of_value, (batch, heads, 1, k, value.shape[3]), (0, 1, 3, 4))
    contraction = Contraction(weighing, values, (3,), tuple(call.out.shape))
    layout = Layout.of(contraction, weighing, values, of_value.axes)
    weights = _described(call, layout, query, key, value)

    of_queries = replace(layout, sizes=(batch, heads, q, 1, d), keys=(4,), channels=())
    asking = Operand(query, of_query, (batch, heads, q, 1, d), (0, 1, 2, 4))

    def rows(found: Tensor) -> Tensor:
        return of_queries.of_weights(scaled(found[..., None].expand(*found.shape, d), 1 / d), asking)

    return [attention(call, weights, layout, of_query, values, rows)]


def _repeated(call: Call, value: Value, groups: int) -> Value:
    """Several heads of queries share the keys and values of one."""
    shape = (value.shape[0], value.shape[1] * groups, *value.shape[2:])
    found = call.tape.value(shape, [value])

    def back(arrived: list[Tensor]) -> list[Tensor]:
        apart = reshaped(arrived[0], (*value.shape[:2], groups, *value.shape[2:]))
        return [summed(apart, [2])]

    def axes(of: list[ax.Axes]) -> ax.Axes:
        return (of[0][0], (*of[0][1], ax.Factor(groups, True)), *of[0][2:])

    call.tape.append(Step("repeat_interleave", [value], [found], back, back, axes=axes))
    return found


def _described(call: Call, layout: Layout, query: Tensor, key: Tensor, value: Tensor) -> Weights:
    """Says how A is computed: it was kept, or is made anew of queries, keys and log-sum-exps."""
    keeps, memory, keeper = call.tape.network is not None, call.tape.memory, call.tape.keeper
    if call.fused is not None:
        mean = call.tape.head_fusion == "mean"
        return StoredWeights(
            call.fused[:, None], value, keeps=False, memory=memory, keeper=keeper, sums_to_1=mean
        )
    mask = call["attn_mask"] if call["attn_mask"] is not None else call["attn_bias"]
    shape = (*query.shape[:3], key.shape[2])
    if call["is_causal"]:
        mask = torch.ones(shape[2:], dtype=torch.bool, device=query.device).tril()
    sums = call.outs[1] if len(call.outs) > 1 and call.outs[1].shape[:3] == query.shape[:3] else None
    if mask is not None:
        mask = layout.weights(mask.detach().expand(shape)[..., None])
    return DotProductWeights(
        _tokens_first(query, layout), _tokens_first(key, layout), _tokens_first(value, layout),
        keeps=keeps, memory=memory, keeper=keeper, mask=mask, scale=call["scale"],
        log_sum_exp=None if sums is None else _tokens_first(sums[..., None], layout)[..., 0],
    )  # fmt: skip


def _tokens_first(tensor: Tensor, layout: Layout) -> Tensor:
    """Brings (B, H, N, d) to (T, H, N, d), heads apart from windows."""
    if not layout.factors:
        return tensor.reshape(-1, 1, *tensor.shape[2:]) if layout.heads == 1 != tensor.shape[1] else tensor
    found = tensor.reshape(*layout.factors, *tensor.shape[2:])
    found = found.permute(*layout.order, found.ndim - 2, found.ndim - 1)
    return found.reshape(-1, layout.heads, *tensor.shape[2:])

"""The calls that are attentions: how each is seen, and what describes its A."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitx.attention.fused import SharedAttention, run
from vitx.attention.layer import DotProductAttention, StoredAttention
from vitx.attention.multihead import MultiHead
from vitx.relevance import rules
from vitx.relevance.attending import Attending
from vitx.relevance.calls import whole_to_first
from vitx.relevance.equations import operands
from vitx.relevance.heads import Layout
from vitx.relevance.lineage import derived
from vitx.relevance.names import name_of, replaced

if TYPE_CHECKING:
    from vitx.relevance.live import Live
    from vitx.relevance.shadow import Shadow


def product(watched: "Shadow", func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """A softmax times values is an attention; any other product of two live tensors makes scores."""
    found = operands(func, args, kwargs)
    if found is None:
        return None
    equation, left, right = found
    first, second = watched.get(left), watched.get(right)
    if first is None or second is None:
        return None
    if second.lineage.kind in ("weights", "gate") and first.lineage.kind is None and equation is not None:
        equation, left, right, first, second = equation.swapped(), right, left, second, first
    attends = first.lineage.kind in ("weights", "gate") and second.lineage.kind is None
    if attends and watched.linearised:
        args, kwargs = replaced((args, kwargs), lambda t: t.detach() if t is left else t)
    out: Tensor = watched.run(func, args, kwargs, [] if attends else [first, second])
    with torch.enable_grad():
        if attends:
            layout = Layout.of_product(left.shape, right.shape, equation, watched.batch)
            if layout is not None:
                layout = _layout(watched, second, layout)
                attention = StoredAttention(
                    layout.weights(left.detach()),
                    layout.values(right.detach()),
                    gradients=watched.gradients,
                    to_heads=layout.outputs,
                    sums_to_1=first.sums_to_1 is not None and first.sums_to_1 == layout.order_weights[-1],
                )
                return _attend(
                    *(watched, out, None, attention, layout, second),
                    layout.values(second.shadow),
                    layout.weights(first.shadow),
                    [first, second],
                )
        lineage = derived((first.lineage, second.lineage))
        if first.lineage.kind is None and second.lineage.kind is None:
            shadow = whole_to_first(watched, out, left, first, equation)
            watched.put(out, shadow, lineage._replace(kind="scores"))
        else:
            name = f"{name_of(func)} of scores without a softmax (linear attention)"
            watched.put(out, watched.lose(name, out.shape, [first, second]), lineage)
    return out


def scaled_dot_product(
    watched: "Shadow", query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """`scaled_dot_product_attention`: A is recomputed from queries and keys when it is needed."""
    of_query, of_value = watched.get(query), watched.get(value)
    live = watched.found_in(query, key, value)
    if of_value is None or of_value.lineage.kind in ("scores", "weights"):
        out = F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
        if live:
            with torch.enable_grad():
                name = "scaled_dot_product_attention of values without a relevance of their own"
                watched.put(out, watched.lose(name, out.shape, live), derived(one.lineage for one in live))
        return out
    layout = _layout(watched, of_value, Layout.of_attention(query.shape, value.shape[-1], watched.batch))
    output, attention = None, None
    if watched.linearised:  # A is a constant, and so is what it is made of
        (query, key, *args), kwargs = replaced(([query, key, *args], kwargs), Tensor.detach)
    with watched.recording():
        if query.ndim == 4:
            output, attention = run(
                *(query, key, value, *args),
                **kwargs,
                gradients=watched.gradients,
                fixed=watched.linearised,
                head_fusion=watched.head_fusion,
                memory=watched.memory,
            )
        else:
            flat = [layout.operands(t) for t in (query, key, value)]  # vitx reads them in this order
            output = F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
            attention = _described(flat, layout, watched.gradients, *args, **kwargs)
    shared = (query, key, value) if isinstance(attention, SharedAttention) else None

    def follow() -> Tensor:
        values, weights = _beside(watched, of_query, of_value, query, key, layout)
        return _attend(watched, output, shared, attention, layout, of_value, values, weights, live)

    return watched.apart(follow)


def _beside(
    watched: "Shadow", of_query: "Live | None", of_value: "Live", query: Tensor, key: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """The shadows of values and A, both thin over heads and channels, or both as they are."""
    if query.ndim == 4 and layout.head == 1 and of_query and _is_thin(of_query) and _is_thin(of_value):
        return of_value.thin, of_query.thin
    values = of_value.shadow
    if values.shape[-3] != query.shape[-3]:
        values = values.repeat_interleave(query.shape[-3] // values.shape[-3], -3)
    of_heads = of_query.shadow if of_query is not None else watched.of_model(query.shape)
    scores = rules.evenly(of_heads, -1).expand(*query.shape[:-1], key.shape[-2])
    return layout.values(values), layout.weights(scores)


def _is_thin(live: "Live") -> bool:
    batch, _, tokens, _ = live.shape
    return live.thin.shape == (batch, 1, tokens, 1)


def _layout(watched: "Shadow", value: "Live", layout: Layout) -> Layout:
    """Finds the heads, which were channels of the same token: where torch has them, or elsewhere."""
    if value.source is None or (layout.head is not None and _holds_heads(value, layout)):
        return layout
    layout = replace(layout, head=None)

    def of_tokens(marks: Tensor) -> Tensor:
        marks = marks.view(*layout.shared, 1, *(1 for _ in layout.channels))
        return _seen_from(value, layout, marks).flatten() / math.prod(layout.channels)

    return layout.with_heads(of_tokens)


def _holds_heads(value: "Live", layout: Layout) -> bool:
    """Whether only the sum over the heads counts, as over any channels; else they may be windows."""
    if layout.head is None or layout.head >= len(layout.shared):
        return layout.head is not None
    dim = layout.order_values[layout.head]
    return value.thin.shape[dim] == 1 or layout.shared[layout.head] == 1


def _over_channels(value: "Live", layout: Layout) -> bool:
    """Whether the keys of an attention are channels: then each token holds all of them alike."""
    if value.source is None:
        return False
    of_keys, *of_channels = layout.order_values[len(layout.shared) :]
    keys, thin = value.shape[of_keys], value.thin.shape
    if all(thin[dim] == 1 for dim in of_channels) and thin[of_keys] == keys:  # only tokens are apart
        return False
    marks = torch.rand(keys, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    marks = marks.view(*(1 for _ in layout.shared), keys, *(1 for _ in of_channels))
    found = _seen_from(value, layout, marks).flatten(1)
    return found.shape[1] > 1 and torch.allclose(found, found[:, :1], rtol=1e-5)


def _attend(
    watched: "Shadow",
    out: Tensor,
    operands: tuple[Tensor, ...] | None,
    attention: Any,
    layout: Layout,
    value: "Live",
    shadow: Tensor,
    weights: Tensor,
    live: list["Live"],
) -> Tensor:
    known = layout.head is not None
    call = Attending(watched.attentions, attention, known, lambda: _over_channels(value, layout))
    if watched.gradients:
        joined, found = call.join(out, operands, shadow, weights)
    else:
        joined, found = out, call.beside(shadow, weights)
    lineage = derived(one.lineage for one in live)
    opened = lineage._replace(open=lineage.open | {call}, kind=None, partial=False)  # all passed this one
    thin = found.shape[1] == found.shape[3] == 1
    watched.put(joined, found if thin else layout.output(found, out.shape), opened)
    return joined


def multi_head(watched: "Shadow", *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """`multi_head_attention_forward`, step by step, so that each step is seen."""
    with watched:
        given = MultiHead(*args, **kwargs)
        mixed = F.scaled_dot_product_attention(*given.heads, attn_mask=given.mask)
        joined = mixed.permute(2, 0, 1, 3).flatten(2)
        out = F.linear(joined, given.option["out_proj_weight"], given.option["out_proj_bias"])
    if not given.option["need_weights"]:
        return out, None
    q, k, v = (heads.detach() for heads in given.heads)
    attention = DotProductAttention(q, k, v, gradients=False, mask=given.mask)
    matrices = attention.weights().to(out.dtype)
    return out, matrices.mean(1) if given.option["average_attn_weights"] else matrices


def _described(
    operands: Sequence[Tensor],
    layout: Layout,
    gradients: bool,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> DotProductAttention:
    """An attention whose operands were brought into the order of (B, H, N, d)."""
    query, key, value = (t.detach() for t in operands)
    mask = None
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    elif attn_mask is not None:
        mask = layout.weights(attn_mask.detach().expand(layout.full(key.shape[-2])))
    return DotProductAttention(
        query, key, value, gradients=gradients, mask=mask, scale=scale, to_heads=layout.outputs
    )


def _seen_from(value: "Live", layout: Layout, marks: Tensor) -> Tensor:
    """Marks places in the values, (shared, keys, channels); returns the sum for each token they came from."""
    assert value.source is not None
    source, channels = value.source
    shape = [value.shape[dim] for dim in layout.order_values]
    back = [layout.order_values.index(dim) for dim in range(len(shape))]
    placed = marks.to(source).expand(shape).permute(back)
    (found,) = torch.autograd.grad(value.shadow, source, placed, retain_graph=True)
    return found.sum(channels).double().cpu()

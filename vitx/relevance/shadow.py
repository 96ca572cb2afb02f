"""Watches a forward pass, and lets a shadow of it run beside it.

A `TorchFunctionMode` sees each torch function that the model calls. The call itself runs as it is; where an
input is *live*, which means that it depends on the image, the shadow of the output follows by the rule for
that call. A call without a rule does not stop the model: only relevance that would have to go through it is
an error.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vitx.attention import DotProductAttention, StoredAttention
from vitx.capture import additive_mask
from vitx.errors import VitxError
from vitx.fused import SharedAttention, run
from vitx.relevance import calls, rules
from vitx.relevance.attending import Attending, Pass
from vitx.relevance.calls import tensors
from vitx.relevance.grid import First
from vitx.relevance.heads import Layout
from vitx.relevance.lineage import Lineage, added, begun, derived
from vitx.tiles import Memory


class Live(NamedTuple):
    """What is known of a tensor that depends on the image.

    Attributes:
        real: the tensor.
        shadow: what stands beside it.
        lineage: where it stands in the pass.
        inside: of one that was padded with a constant, what of it is real: 1, or 0 for the padding.
        source: the shadow that the last weights put out, and the dimension of its channels, if nothing but
            shape operations came after.
    """

    real: "weakref.ref[Tensor]"
    shadow: Tensor
    lineage: Lineage
    inside: Tensor | None = None
    source: tuple[Tensor, int] | None = None


class Shadow(TorchFunctionMode):
    """A forward pass and its shadow.

    Attributes:
        attentions: what the attentions of the pass share.
        image: the shadow of the image, where relevance ends.
        own: the shadow of the model's own tokens and paddings, (B,), where the rest ends.
        common: the same of those that lie among windows or crops, so that no image can be told, ().
        lost: how much relevance reached each call that has no rule, by its name.
        first: the first tokens; None before the first call with weights.
    """

    def __init__(
        self,
        image: Tensor,
        brought: Callable[[], Iterable[Tensor]],
        *,
        gradients: bool,
        head_fusion: str | None,
    ) -> None:
        """Begins with an image, (B, C, H, W).

        Args:
            image: the tensor that the model will be given.
            brought: what names the model's parameters and buffers.
            gradients: whether methods will ask for the gradient of A.
            head_fusion: as for `vitx.capture`.
        """
        super().__init__()
        self.attentions = Pass()
        self.lost: dict[str, float] = {}
        self.first: First | None = None
        self._gradients = gradients
        self._head_fusion = head_fusion
        self._memory = Memory()
        self._brought = brought
        self._left = False  # whether a live tensor has left torch
        self._live: dict[int, Live] = {}
        self._like = image.new_zeros((), dtype=torch.promote_types(image.dtype, torch.float32))
        self._batch = len(image)
        with torch.enable_grad():
            self.image = rules.blank(image.shape, self._like).requires_grad_()
            self.own = rules.blank((self._batch,), self._like).requires_grad_()
            self.common = rules.blank((), self._like).requires_grad_()
        self.put(image, self.image, begun())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        instead = _INSTEAD.get(func)
        if instead is not None:
            return instead(self, *args, **kwargs)
        given = tensors((args, kwargs)) if kwargs else tensors(args)
        live = self._live_among(given)
        if not live:
            return func(*args, **kwargs)
        if len(live) < len(given):
            live = self._with_strangers(given, live)
        self._left = self._left or func in calls.LEAVING
        if func in calls.PRODUCTS:
            product = self._product(func, args, kwargs)
            if product is not None:
                return product
        if self._gradients:
            with self.recording():
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if func in calls.CONSTANT or (func in calls.REFERRING and self.get(args[0]) is None):
            return out
        if any(_holds(t, func) for t in tensors(out)):  # no question of a shape or a type
            with torch.enable_grad():
                self._follow(func, args, kwargs, out, live)
        return out

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Runs its block with gradients if any method asks for them, whatever the model says.

        Nothing is left to checkpointing, which would run the block again without being watched.
        """
        if not self._gradients:
            yield
            return
        with torch.enable_grad(), saved_tensors_hooks(_same, _same) if _hooked() else nullcontext():
            yield

    def close(self) -> None:
        """Lets go of the graph, which holds what it is held by."""
        self._live.clear()
        self.attentions.calls.clear()
        self.first = None

    def put(
        self,
        tensor: Tensor,
        shadow: Tensor,
        lineage: Lineage,
        inside: Tensor | None = None,
        source: tuple[Tensor, int] | None = None,
    ) -> None:
        """Remembers what stands beside a tensor."""
        self._live[id(tensor)] = Live(weakref.ref(tensor), shadow, lineage, inside, source)

    def get(self, tensor: Any) -> Live | None:
        """Returns what stands beside a tensor; None if it does not depend on the image."""
        live = self._live.get(id(tensor))
        return live if live is not None and live.real() is tensor else None

    def found_in(self, *values: Any) -> list[Live]:
        """Returns the live tensors in arguments, in their order."""
        return self._live_among(tensors(values))

    def _live_among(self, given: Iterable[Tensor]) -> list[Live]:
        return [live for t in given if (live := self.get(t)) is not None]

    def of_model(self, shape: Sequence[int]) -> Tensor:
        """Returns the shadow of what the model brings itself: class tokens, registers, padding."""
        whole = tuple(shape)
        if whole[:1] == (self._batch,):
            return rules.follow(
                whole, lambda relevance: [relevance.reshape(len(relevance), -1).sum(1)], self.own
            )
        return rules.follow(whole, lambda relevance: [relevance.sum()], self.common)

    def lose(self, name: str, shape: Sequence[int], live: Sequence[Live]) -> Tensor:
        """Returns the shadow of a call without a rule: what reaches it is lost, which ends as an error."""
        shadows = [one.shadow for one in live] or [self.common]

        def back(relevance: Tensor) -> list[None]:
            self.lost[name] = self.lost.get(name, 0.0) + float(relevance.abs().sum()) / self._batch
            return [None] * len(shadows)

        return rules.follow(shape, back, *shadows)

    def _with_strangers(self, given: Sequence[Tensor], live: list[Live]) -> list[Live]:
        """Finds what came from the image by code that cannot be seen: its relevance is lost, and no constant.

        Such a tensor has a gradient, where gradients are asked for, though no seen call made it; or it
        appeared after a live tensor had left torch, and is no parameter.
        """
        found = False
        brought = {id(tensor) for tensor in self._brought()} if self._left else set()
        for tensor in given:
            if self.get(tensor) is not None:
                continue
            appeared = self._left and tensor.is_floating_point() and id(tensor) not in brought
            if tensor.grad_fn is not None or appeared:
                with torch.enable_grad():
                    name = "code that torch does not show (scripted, compiled, or by way of NumPy)"
                    self.put(tensor, self.lose(name, tensor.shape, []), begun())
                found = True
        return self._live_among(given) if found else live

    def _follow(
        self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], out: Any, live: list[Live]
    ) -> None:
        if func in calls.ADDED and len(live) == 2:
            self._add(out, live)
            return
        keeps = func in calls.KEEP_IDENTITY and len({one.lineage.identity for one in live}) == 1
        lineage = live[0].lineage if keeps and len(live) == 1 else derived(one.lineage for one in live)
        rule = calls.RULES.get(func)
        found: Any = None
        if rule is not None:
            try:
                found = rule(self, out, args, kwargs, live)
            except RuntimeError:  # what can be done to the tensor, but not to its shadow
                found = None
        if found is None:
            found = [self.lose(calls.name_of(func), t.shape, live) for t in tensors(out)]
        inside = None
        if func is F.pad and isinstance(found, tuple):
            found, inside = found
        if func in calls.WEIGHING and lineage.kind == "scores":
            lineage = lineage._replace(kind="weights")
        elif func in calls.SOFTMAX and lineage.kind is None:
            lineage = lineage._replace(kind="gate")
        elif func in calls.MULTIPLIED and lineage.kind == "gate":
            lineage = lineage._replace(kind=None)
        if keeps and lineage.identity != live[0].lineage.identity:
            lineage = live[0].lineage._replace(kind=lineage.kind)
        if func in calls.JOINED and any(one.lineage.open for one in live):
            apart = len(live) < len([t for t in tensors(args) if t.is_floating_point()])
            if apart or not all(one.lineage.open for one in live):
                lineage = lineage._replace(partial=True)
        source = live[0].source if func in calls.KEEP_IDENTITY and len(live) == 1 else None
        if func in calls.WEIGHTED and isinstance(found, Tensor):
            source = found, 1 if func in calls.CONVOLUTIONS else -1
        for tensor, shadow in zip(tensors(out), tensors(found), strict=True):
            if _holds(tensor, func):
                self.put(tensor, shadow, lineage, inside, source)
        if func in calls.WEIGHTED and not self.attentions.calls:
            self._embedded(func, found)

    def _embedded(self, func: Callable[..., Any], shadow: Any) -> None:
        """Remembers the first tokens."""
        if not isinstance(shadow, Tensor):
            return
        if self.first is None:
            self.first = First(shadow, 1 if func in calls.CONVOLUTIONS else -1)
        if func in calls.CONVOLUTIONS and shadow.ndim == 4:
            self.first.stem.insert(0, shadow)

    def _add(self, out: Tensor, live: list[Live]) -> None:
        first, second = live
        lineage, shares = added(first.lineage, second.lineage)
        if sum(shares) > 1 and (first.lineage.partial or second.lineage.partial):
            name = "a residual around an attention that some of its tokens did not pass"
            self.put(out, self.lose(name, out.shape, live), lineage)
            return
        parts = [
            rules.unchanged(one.shadow, out.shape, share)
            for one, share in zip(live, shares, strict=True)
            if share
        ]
        self.put(out, sum(parts[1:], parts[0]), lineage)

    def _product(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        """A softmax times values is an attention; any other product of two live tensors makes scores."""
        operands = calls.operands(func, args, kwargs)
        if operands is None:
            return None
        equation, left, right = operands
        first, second = self.get(left), self.get(right)
        if first is None or second is None:
            return None
        if second.lineage.kind in ("weights", "gate") and first.lineage.kind is None and equation is not None:
            equation, left, right, first, second = equation.swapped(), right, left, second, first
        with self.recording():
            out: Tensor = func(*args, **kwargs)
        with torch.enable_grad():
            if first.lineage.kind in ("weights", "gate") and second.lineage.kind is None:
                layout = Layout.of_product(left.shape, right.shape, equation, self._batch)
                if layout is not None:
                    layout = self._layout(second, layout)
                    attention = StoredAttention(
                        layout.weights(left.detach()),
                        layout.values(right.detach()),
                        gradients=self._gradients,
                        to_heads=layout.outputs,
                    )
                    weights = layout.weights(first.shadow)
                    return self._attend(out, None, attention, layout, second, weights, [first, second])
            lineage = derived((first.lineage, second.lineage))
            if first.lineage.kind is None and second.lineage.kind is None:
                shadow = calls.whole_to_first(self, out, left, first, equation)
                self.put(out, shadow, lineage._replace(kind="scores"))
            else:
                name = f"{calls.name_of(func)} of scores without a softmax (linear attention)"
                self.put(out, self.lose(name, out.shape, [first, second]), lineage)
        return out

    def scaled_dot_product(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """`scaled_dot_product_attention`: A is recomputed from queries and keys when it is needed."""
        of_query, of_value = self.get(query), self.get(value)
        live = self.found_in(query, key, value)
        if of_value is None or of_value.lineage.kind in ("scores", "weights"):
            out = F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
            if live:
                with torch.enable_grad():
                    name = "scaled_dot_product_attention of values without a relevance of their own"
                    self.put(out, self.lose(name, out.shape, live), derived(one.lineage for one in live))
            return out
        layout = self._layout(of_value, Layout.of_attention(query.shape, value.shape[-1], self._batch))
        output, attention = None, None
        with self.recording():
            if query.ndim == 4:
                output, attention = run(
                    *(query, key, value, *args),
                    **kwargs,
                    gradients=self._gradients,
                    head_fusion=self._head_fusion,
                    memory=self._memory,
                )
            else:
                flat = [layout.operands(t) for t in (query, key, value)]  # vitx reads them in this order
                output = F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
                attention = _described(flat, layout, self._gradients, *args, **kwargs)
        shape = attention.shape
        with torch.enable_grad():
            shadow = of_value.shadow
            if shadow.shape[-3] != query.shape[-3]:
                shadow = shadow.repeat_interleave(query.shape[-3] // shadow.shape[-3], -3)
            of_heads = of_query.shadow if of_query is not None else self.of_model(query.shape)
            scores = rules.evenly(of_heads, (*query.shape[:-1], key.shape[-2]), -1)
            weights = layout.weights(scores) if query.ndim != 4 else scores
            assert tuple(weights.shape[-2:]) == tuple(shape[-2:])
            shared = (query, key, value) if isinstance(attention, SharedAttention) else None
            value_live = Live(of_value.real, shadow, of_value.lineage)
            return self._attend(output, shared, attention, layout, value_live, weights, live)

    def _layout(self, value: Live, layout: Layout) -> Layout:
        """Finds the heads where they have no dimension of their own, but were channels of the same token."""
        if layout.head is not None or value.source is None:
            return layout

        def of_tokens(marks: Tensor) -> Tensor:
            marks = marks.view(*layout.shared, 1, 1)
            found = _seen_from(value, layout, marks) / value.shadow.shape[layout.order_values[-1]]
            return found.flatten()

        return layout.with_heads(of_tokens)

    def _over_channels(self, value: Live, layout: Layout) -> bool:
        """Whether the keys of an attention are channels: then each token holds all of them alike."""
        if value.source is None:
            return False
        keys = value.shadow.shape[layout.order_values[len(layout.shared)]]
        marks = torch.rand(keys, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = _seen_from(value, layout, marks.view(*(1 for _ in layout.shared), keys, 1)).flatten(1)
        return found.shape[1] > 1 and torch.allclose(found, found[:, :1], rtol=1e-5)

    def _attend(
        self,
        out: Tensor,
        operands: tuple[Tensor, ...] | None,
        attention: Any,
        layout: Layout,
        value: Live,
        weights: Tensor,
        live: list[Live],
    ) -> Tensor:
        known = layout.head is not None
        call = Attending(self.attentions, attention, known, lambda: self._over_channels(value, layout))
        shadow = layout.values(value.shadow)
        if self._gradients:
            joined, found = call.join(out, operands, shadow, weights)
        else:
            joined, found = out, call.shadow(shadow, weights)
        lineage = derived(one.lineage for one in live)
        opened = lineage._replace(open=lineage.open | {call}, kind=None, partial=False)  # all passed this one
        self.put(joined, layout.output(found, out.shape), opened)
        return joined

    def multi_head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        training: bool = True,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        use_separate_proj_weight: bool = False,
        q_proj_weight: Tensor | None = None,
        k_proj_weight: Tensor | None = None,
        v_proj_weight: Tensor | None = None,
        static_k: Tensor | None = None,
        static_v: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`multi_head_attention_forward`, step by step, so that each step is seen."""
        given = (bias_k, bias_v, static_k, static_v)
        if add_zero_attn or query.ndim != 3 or any(one is not None for one in given):
            raise VitxError(
                "multi-head attention with add_bias_kv, add_zero_attn or unbatched input is not supported"
            )
        weights: Any = [q_proj_weight, k_proj_weight, v_proj_weight]
        if in_proj_weight is not None and not use_separate_proj_weight:
            weights = in_proj_weight.chunk(3)
        biases: Any = [None] * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        with self:
            q, k, v = (
                F.linear(x, w, b).unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)
                for x, w, b in zip((query, key, value), weights, biases, strict=True)
            )
            mask = additive_mask(attn_mask, key_padding_mask, q)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            joined = mixed.permute(2, 0, 1, 3).flatten(2)
            out = F.linear(joined, out_proj_weight, out_proj_bias)
        if not need_weights:
            return out, None
        attention = DotProductAttention(q.detach(), k.detach(), v.detach(), gradients=False, mask=mask)
        matrices = attention.weights().to(out.dtype)
        return out, matrices.mean(1) if average_attn_weights else matrices

    def written(self, tensor: Tensor, index: Any, value: Any) -> None:
        """`tensor[index] = value`: what the tensor held there is gone."""
        before, new = self.get(tensor), self.get(value)
        with self.recording():
            tensor[index] = value
        live = [one for one in (before, new) if one is not None]
        if not live:
            return
        with torch.enable_grad():
            shadow = (self.of_model(tensor.shape) if before is None else before.shadow).clone()
            place = shadow[index]
            shadow[index] = (new.shadow if new is not None else self.of_model(place.shape)).to(place.dtype)
            lineage = before.lineage if before is not None else derived(one.lineage for one in live)
            if before is not None and new is not None:
                lineage = derived((before.lineage, new.lineage))
            self.put(tensor, shadow, lineage)

    def iterated(self, tensor: Tensor) -> Iterator[Tensor]:
        """`for part in tensor`."""
        with self:
            return iter(tensor.unbind(0))


_INSTEAD: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: Shadow.scaled_dot_product,
    F.multi_head_attention_forward: Shadow.multi_head,
    Tensor.__setitem__: Shadow.written,
    Tensor.__iter__: Shadow.iterated,
}


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


def _seen_from(value: Live, layout: Layout, marks: Tensor) -> Tensor:
    """Marks places in the values, (shared, keys, channels); returns the sum for each token they came from."""
    assert value.source is not None
    source, channels = value.source
    shape = [value.shadow.shape[dim] for dim in layout.order_values]
    back = [layout.order_values.index(dim) for dim in range(len(shape))]
    placed = marks.to(source).expand(shape).permute(back)
    (found,) = torch.autograd.grad(value.shadow, source, placed, retain_graph=True)
    return found.sum(channels).double().cpu()


def _holds(tensor: Tensor, func: Callable[..., Any]) -> bool:
    """Whether a tensor holds what the image is made into, and not a mask, an index or an answer."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized:
        return True
    return func in calls.CASTS and tensor.dtype != torch.bool


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _hooked() -> bool:
    """Whether something packs the tensors that autograd saves, as activation checkpointing does."""
    try:
        with disable_saved_tensors_hooks(""):
            return False
    except RuntimeError:
        return True

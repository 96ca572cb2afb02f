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

from vitx.attention.tiles import Memory
from vitx.relevance import attentions, calls, linearised, names, rules
from vitx.relevance.apart import Apart
from vitx.relevance.attending import Pass
from vitx.relevance.grid import First
from vitx.relevance.lineage import Lineage, added, begun, derived
from vitx.relevance.live import Live, holds, lineage_of, softmax_dim
from vitx.relevance.names import tensors
from vitx.relevance.residual import Residual


class Stream(NamedTuple):
    """What a residual put out.

    Attributes:
        output: the tensor.
        shadow: what stands beside it.
        layers: how many attentions with a residual came before.
    """

    output: Tensor
    shadow: Tensor
    layers: int


class Shadow(TorchFunctionMode):
    """A forward pass and its shadow.

    Attributes:
        attentions: what the attentions of the pass share.
        image: the shadow of the image, (B, 1, H, W), or of what else the model takes, where relevance ends.
        own: the shadow of the model's own tokens and paddings, (B,), where the rest ends.
        common: the same of those that lie among windows or crops, so that no image can be told, ().
        unknown: the names of the calls that have no rule.
        lost: how much relevance reached each of them.
        first: the first tokens; None before the first call with weights.
        gradients: whether methods will ask for a gradient.
        linearised: whether that is one of the linearised network, see `vitx.relevance.linearised`.
        accounts: whether it is kept what constants the pass adds.
        pixels: the image itself.
        constants: what the pass adds, as leaves of the graph.
        streams: what each residual put out, where it is kept.
        head_fusion: as for `vitx.attention.capture`.
        memory: what the attentions of the pass share.
        apart: makes what stays of the pass.
        batch: how many images there are.
    """

    def __init__(
        self,
        image: Tensor,
        brought: Callable[[], Iterable[Tensor]],
        *,
        gradients: bool,
        linearised: bool,
        accounts: bool,
        head_fusion: str | None,
    ) -> None:
        """Begins with an image, (B, C, H, W), a clip or volume, or a spectrogram, (B, F, T).

        Args:
            image: the tensor that the model will be given.
            brought: what names the model's parameters and buffers.
            gradients: whether methods will ask for a gradient.
            linearised: whether that is one of the linearised network.
            accounts: whether streams and constants are kept.
            head_fusion: as for `vitx.attention.capture`.
        """
        super().__init__()
        self.attentions = Pass(len(image))
        self.unknown: list[str] = []
        self.lost: dict[str, float] = {}
        self.first: First | None = None
        self.gradients, self.linearised, self.accounts = gradients, linearised, accounts
        self.pixels = image
        self.constants: list[Tensor] = []
        self.streams: list[Stream] = []
        self.head_fusion = head_fusion
        self.memory = Memory()
        self.apart = Apart(image, gradients=gradients)
        self._brought = brought
        self._left = False  # whether a live tensor has left torch
        self._live: dict[int, Live] = {}
        self._like = image.new_zeros((), dtype=torch.promote_types(image.dtype, torch.float32))
        self.batch = len(image)
        with torch.enable_grad():
            # Only the sum over the channels of an image counts; those of a clip have no fixed place.
            thin = (len(image), 1, *image.shape[2:]) if image.ndim == 4 else image.shape
            self.image = rules.blank(thin, self._like).requires_grad_()
            self.own = rules.blank((self.batch,), self._like).requires_grad_()
            self.common = rules.blank((), self._like).requires_grad_()
        self.put(image, self.image, begun())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        instead = _INSTEAD.get(func)
        if instead is not None:
            return instead(self, *args, **kwargs)
        if kwargs:
            args, kwargs = names.by_place(args, kwargs)
        given = tensors((args, kwargs)) if kwargs else tensors(args)
        live = self._live_among(given)
        if not live:
            return func(*args, **kwargs)
        if len(live) < len(given):
            live = self._with_strangers(given, live)
        self._left = self._left or func in names.LEAVING
        if func in names.PRODUCTS:
            product = attentions.product(self, func, args, kwargs)
            if product is not None:
                return product
        out = self.run(func, args, kwargs, live)
        if func in names.CONSTANT or (func in names.REFERRING and self.get(args[0]) is None):
            return out
        outs = tensors(out)
        if any(holds(t, func) for t in outs):  # no question of a shape or a type
            self.apart(self._follow, func, args, kwargs, out, outs, live)
        return out

    def made_last(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Returns the one of several tensors that was made of all others; None where there is none."""
        found = [self.get(tensor) for tensor in tensors]
        for tensor, live in zip(tensors, found, strict=True):
            others = [other for other in found if other is not live]
            if live is not None and all(
                other is not None and other.lineage.identity <= live.lineage.ancestors for other in others
            ):
                return tensor
        return None

    def run(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], live: list[Live]) -> Any:
        """Makes a call of the model, with a gradient if one will be asked for."""
        if not self.gradients:
            return func(*args, **kwargs)
        with self.recording():
            held = linearised.RULES.get(func) if self.linearised else None
            return func(*args, **kwargs) if held is None else held(self, func, args, kwargs, live)

    def added(self, constant: Tensor | None) -> Tensor | None:
        """Returns a constant that the pass adds, as a leaf of the graph where that is kept."""
        if not self.accounts or constant is None or not constant.is_floating_point():
            return constant
        leaf = constant.detach().requires_grad_()
        self.constants.append(leaf)
        return leaf

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Runs its block with gradients if any method asks for them, whatever the model says.

        Nothing is left to checkpointing, which would run the block again without being watched.
        """
        if not self.gradients:
            yield
            return
        with torch.enable_grad(), saved_tensors_hooks(_same, _same) if _hooked() else nullcontext():
            yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Watches what is done beside the pass, and is no part of it."""
        kept = self.attentions.calls, self.attentions.around, self.streams, self.constants
        self.attentions.calls, self.attentions.around = list(kept[0]), dict(kept[1])
        self.streams, self.constants = list(kept[2]), list(kept[3])
        try:
            with self:
                yield
        finally:
            self.attentions.calls, self.attentions.around, self.streams, self.constants = kept

    def close(self) -> None:
        """Lets go of the graph, which holds what it is held by."""
        self._live.clear()
        self.attentions.calls.clear()
        self.attentions.around.clear()
        self.constants.clear()
        self.streams.clear()
        self.first = None
        self.apart.close()

    def put(
        self,
        tensor: Tensor,
        shadow: Tensor,
        lineage: Lineage,
        inside: Tensor | None = None,
        source: tuple[Tensor, int] | None = None,
        sums_to_1: int | None = None,
    ) -> None:
        """Remembers what stands beside a tensor."""
        found = Live(weakref.ref(tensor), tensor.shape, shadow, lineage, inside, source, sums_to_1)
        self._live[id(tensor)] = found

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
        if whole[:1] == (self.batch,):
            return rules.follow(
                whole, lambda relevance: [relevance.reshape(len(relevance), -1).sum(1)], self.own
            )
        return rules.follow(whole, lambda relevance: [relevance.sum()], self.common)

    def lose(self, name: str, shape: Sequence[int], live: Sequence[Live]) -> Tensor:
        """Returns the shadow of a call without a rule: what reaches it is lost, which ends as an error."""
        shadows = [one.shadow for one in live] or [self.common]
        self.unknown.append(name)

        def back(relevance: Tensor) -> list[None]:
            self._note(name, relevance)
            return [None] * len(shadows)

        return rules.follow(shape, back, *shadows)

    def _note(self, name: str, relevance: Tensor) -> None:
        self.lost[name] = self.lost.get(name, 0.0) + float(relevance.abs().sum()) / self.batch

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
        self,
        func: Callable[..., Any],
        args: Any,
        kwargs: dict[str, Any],
        out: Any,
        outs: list[Tensor],
        live: list[Live],
    ) -> None:
        if func in names.ADDED and len(live) == 2:
            self._add(out, live)
            return
        rule = calls.RULES.get(func)
        found: Any = None
        if rule is not None:
            try:
                found = rule(self, out, args, kwargs, live)
            except RuntimeError:  # what can be done to the tensor, but not to its shadow
                found = None
        if found is None:
            found = [self.lose(names.name_of(func), t.shape, live) for t in outs]
        inside = None
        if func is F.pad and isinstance(found, tuple):
            found, inside = found
        lineage = lineage_of(func, args, live)
        source = live[0].source if func in names.KEEP_IDENTITY and len(live) == 1 else None
        if func in names.WEIGHTED and isinstance(found, Tensor):
            source = found, 1 if func in names.CONVOLUTIONS else -1
            if not self.attentions.calls:
                self._embedded(func, found)
        for tensor, shadow in zip(outs, tensors(found), strict=True):
            if holds(tensor, func):
                sums_to_1 = softmax_dim(func, args, kwargs, tensor, live[0])
                self.put(tensor, shadow, lineage, inside, source, sums_to_1)

    def _embedded(self, func: Callable[..., Any], shadow: Tensor) -> None:
        """Remembers the first tokens."""
        if self.first is None:
            self.first = First(shadow, 1 if func in names.CONVOLUTIONS else -1)
        if func in names.CONVOLUTIONS:
            self.first.stem.insert(0, shadow)

    def _add(self, out: Tensor, live: list[Live]) -> None:
        first, second = live
        lineage, summed = added(first.lineage, second.lineage)
        shadows = calls.alike(out.shape, live)
        stream, branch = (0, 1) if summed.places[0] else (1, 0)
        residual = None
        if summed.around:
            partial = live[branch].lineage.partial
            residual = Residual(tuple(summed.around), live[stream].thin, shadows[branch], partial)
            self.attentions.around.update(dict.fromkeys(summed.around, residual))

        def back(relevance: Tensor) -> Sequence[Tensor | None]:
            if self.attentions.places:
                return rules.shared(relevance, summed.places, shadows)
            if residual is None:
                return rules.shared(relevance, summed.shares, shadows)
            shares = self.attentions.shares(residual, relevance)
            return shares if stream == 0 else shares[::-1]

        shadow = rules.follow(shadows[0].shape, back, *shadows)
        if self.accounts and summed.residual:
            self.streams.append(Stream(out, shadow, len(self.attentions.layers())))
        self.put(out, shadow, lineage)

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
    F.scaled_dot_product_attention: attentions.scaled_dot_product,
    F.multi_head_attention_forward: attentions.multi_head,
    Tensor.__setitem__: Shadow.written,
    Tensor.__iter__: Shadow.iterated,
}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _hooked() -> bool:
    """Whether something packs the tensors that autograd saves, as activation checkpointing does."""
    try:
        with disable_saved_tensors_hooks(""):
            return False
    except RuntimeError:
        return True

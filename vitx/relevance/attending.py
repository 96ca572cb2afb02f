"""One attention of the pass: where the relevance of what it put out goes, while its gradient passes by.

An attention is one node of the graph, for its values and for its shadow: autograd calls it when both the
gradient and the relevance of its output are known, so A is computed once for both, tile by tile.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitx.attention.fused import SharedAttention
from vitx.attention.layer import Attention
from vitx.attention.tiles import Tile
from vitx.errors import VitxError
from vitx.models.isolation import without_autocast
from vitx.relevance.carrier import Carrier, Layer
from vitx.relevance.residual import Residual
from vitx.relevance.rules import blank, spread


class Attended(NamedTuple):
    """An attention call, and what stands beside it in the graph.

    Attributes:
        call: the attention.
        output: what it put out, as autograd knows it; None where no gradient will be asked for.
        shadow: of the output, (B, H, Q, d).
        weights: the shadow of A, (B, H, Q, K), which is that of the queries.
        values: the shadow of the values, (B, H, K, d).
    """

    call: "Attending"
    output: Tensor | None
    shadow: Tensor
    weights: Tensor
    values: Tensor


class Pass:
    """What the attentions of one pass share: the method that asks, and how many count as layers.

    Attributes:
        carrier: the method whose relevance travels; set before each way back.
        places: whether only places are asked for.
        calls: the attentions, in the order in which they ran.
        around: the residual around each of them that is inside one.
        grown: what layers handed on beyond what they got, over all images.
        astray: how much relevance of an image went to other tokens than the rules say.
        batch: how many images there are.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.carrier: Carrier | None = None
        self.places = False
        self.calls: list[Attended] = []
        self.around: dict[Attending, Residual] = {}
        self.grown: Tensor | float = 0.0
        self.astray: Tensor | float = 0.0

    def begin(self, carrier: Carrier, *, places: bool = False) -> None:
        """Makes a method the one whose relevance travels.

        Args:
            carrier: the method.
            places: whether only places are asked for: a residual gives all to the stream, nothing to the
                branch.
        """
        self.carrier, self.places, self.grown, self.astray = carrier, places, 0.0, 0.0
        for number, layer in enumerate(self.layers()):
            layer.call.counts = number >= carrier.start_layer
        if not places:
            self._try_residuals()

    def _try_residuals(self) -> None:
        """Finds out of residuals, where that counts, whether what their attentions put out comes home."""
        waiting = [one for one in dict.fromkeys(self.around.values()) if one.matters and one.home is None]
        if not waiting:
            return
        counted = {call: call.counts for call in self.around}
        for call in counted:
            call.counts = False  # no attention passes on what is only a mark
        for residual in waiting:
            residual.try_with([one for one in self.calls if one.call in residual.calls])
        for call, counts in counted.items():
            call.counts = counts

    def shares(self, residual: Residual, relevance: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what stream and branch of a residual get, and counts what goes astray."""
        if residual.matters and residual.home is not None:
            self.astray = self.astray + relevance.abs().sum() * ~residual.home / self.batch
        return residual.shares(relevance)

    def grow(self, values: Tensor) -> None:
        """Counts what a layer handed on beyond what it got, (B, K)."""
        self.grown = self.grown + values.sum()

    def layers(self) -> list[Attended]:
        """Returns the attentions inside a residual, in the order in which they ran."""
        return [attended for attended in self.calls if attended.call in self.around]


class Attending:
    """An attention call: A, and whether a residual goes around it.

    Attributes:
        counts: whether the method starts at or below it.
    """

    def __init__(
        self,
        within: Pass,
        attention: Attention,
        heads_known: bool,
        over_channels: Callable[[], bool],
    ) -> None:
        """Describes a call.

        Args:
            within: the pass that it is a part of.
            attention: A.
            heads_known: whether the heads have a dimension of their own.
            over_channels: finds out whether its keys are channels of the same tokens.
        """
        self.counts = True
        self.attention = attention
        self._within = within
        self._heads_known = heads_known
        self._find_channels = over_channels

    @property
    def residual(self) -> Residual | None:
        """The residual around it; None: there is none, or the sum was not seen yet."""
        return self._within.around.get(self)

    @property
    def keeps(self) -> float | None:
        """What share of its relevance a token keeps by that residual; None if it depends on A."""
        carrier = self._within.carrier
        assert carrier is not None
        return 1.0 if not self.counts or self._over_channels else carrier.keeps(self.attention)

    @cached_property
    def _over_channels(self) -> bool:
        """Whether its keys are channels of the same tokens."""
        return self._find_channels()

    def join(
        self, output: Tensor, operands: tuple[Tensor, ...] | None, value: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns output and shadow of the call, as autograd knows them.

        Args:
            output: A V. With gradients, as a part of the graph, or without where `operands` are given.
            operands: query, key and value, where the attention has a backward pass of its own.
            value: the shadow of the values, (B, H, K, d).
            weights: the shadow of A, (B, H, Q, K).
        """
        given = output if operands is None else lambda: output  # no input of the node: it makes this its own
        joined, shadow = _Join.apply(self, given, *(operands or (None,) * 3), value, weights)
        self._within.calls.append(Attended(self, joined, shadow, weights, value))
        return joined, shadow

    def beside(self, value: Tensor, weights: Tensor) -> Tensor:
        """Returns the shadow of the call alone, where no gradient will be asked for."""
        shadow: Tensor = _Shadow.apply(self, value, weights)
        self._within.calls.append(Attended(self, None, shadow, weights, value))
        return shadow

    def check_heads(self) -> None:
        """Raises a VitxError if the heads cannot be told from other dimensions."""
        if not self._heads_known:
            raise VitxError(
                "the heads of an attention lie among other dimensions (windows, or folded into the batch) "
                "and cannot be told apart: only rollout and attention, with head_fusion='mean' and no "
                "discard_ratio, do not depend on them"
            )

    def start(self, relevance: Tensor, gradient: Tensor | None) -> "_Reading":
        """Begins the way back through this call."""
        carrier = self._within.carrier
        assert carrier is not None
        if self._over_channels:
            return self._start_over_channels(relevance)
        if not _alike(relevance):
            raise VitxError(
                "the channels of an attention's output are read one by one, without weights between (as by "
                "a maximum over tokens): no rule takes relevance through that"
            )
        keys = self.attention.shape[-1]
        of_queries = relevance.sum((1, 3))
        if self.residual is None:
            return _Reading(carrier.pooling(of_queries, keys), of_queries, False)
        if not self.counts:
            return _Reading(None, of_queries, False)
        if carrier.reads_gradient and gradient is None and not relevance.any():
            return _Reading(None, of_queries, False)
        if carrier.of_heads:
            self.check_heads()
        if carrier.reads_gradient and gradient is None:
            raise VitxError(
                "attention ran with gradients disabled (torch.no_grad or reentrant checkpointing inside "
                "the model), or the score does not depend on it: gradient methods need them"
            )
        return _Reading(carrier.layer(of_queries, keys), of_queries, carrier.reads_gradient)

    def _start_over_channels(self, relevance: Tensor) -> "_Reading":
        """Cross-covariance attention, as in XCiT: what it mixes are channels, and a token keeps its own."""
        share = (
            None if self.residual is not None else relevance.sum(2, keepdim=True) / self.attention.shape[-1]
        )
        return _Reading(None, relevance, False, share)

    def shared_out(
        self, reading: "_Reading", values: torch.Size, weights: torch.Size
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns what the shadows of values, (B, H, K, d), and weights, (B, H, Q, K), get."""
        carrier = self._within.carrier
        assert carrier is not None
        if reading.layer is None:
            return None if reading.of_channels is None else reading.of_channels.expand(values), None
        if carrier.grows and self.residual is not None:
            self._within.grow(reading.layer.values)
        into_values = spread(reading.layer.values, values)
        if self.residual is None or self.residual.kept is not None:
            return into_values, None
        return into_values, spread(reading.layer.stays - reading.relevance, weights)


class _Reading:
    """The tiles of one attention on their way to the method; `of_channels` is what goes past it."""

    def __init__(
        self,
        layer: Layer | None,
        relevance: Tensor,
        reads_gradient: bool,
        of_channels: Tensor | None = None,
    ) -> None:
        self.layer, self.relevance, self.reads_gradient = layer, relevance, reads_gradient
        self.of_channels = of_channels

    def through(self, tiles: Iterator[Tile]) -> Iterator[Tile]:
        """Passes on the tiles when the method has read them."""
        if self.layer is None:
            yield from tiles
            return
        for tile in tiles:
            self.layer.read(tile)
            yield tile
        self.layer.end()

    def read(self, tiles: Iterator[Tile]) -> None:
        """Shows all tiles to the method; without one, none is computed."""
        if self.layer is not None:
            for _ in self.through(tiles):
                pass


def _alike(relevance: Tensor) -> bool:
    """Whether all channels of a token have the same relevance, as behind any linear map."""
    if relevance.stride(-1) == 0 or relevance.shape[-1] == 1:
        return True
    return torch.allclose(relevance, relevance[..., :1], rtol=1e-3, atol=1e-12)


class _Shadow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Attending, value: Tensor, weights: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.shapes = call, (value.shape, weights.shape)
        return blank((*weights.shape[:3], value.shape[-1]), value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, relevance: Tensor | None) -> tuple[Tensor | None, ...]:
        if relevance is None:
            return None, None, None
        call: Attending = ctx.call
        reading = call.start(relevance, None)
        with without_autocast(relevance.device):
            reading.read(call.attention.tiles())
        return None, *call.shared_out(reading, *ctx.shapes)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Attending,
        output: Tensor | Callable[[], Tensor],
        query: Tensor | None,
        key: Tensor | None,
        of: Tensor | None,
        value: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.shapes = call, (value.shape, weights.shape)
        attended = output.clone() if isinstance(output, Tensor) else output()
        if query is not None:
            ctx.save_for_backward(query, key, of, attended)  # so that a change in place is noticed
        return attended, blank((*weights.shape[:3], value.shape[-1]), value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, relevance: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None and relevance is None:
            return (None,) * 7
        call: Attending = ctx.call
        attention = call.attention
        shares: tuple[Tensor | None, Tensor | None] = (None, None)
        into: tuple[Tensor | None, ...] = (None, None, None)
        reading = None if relevance is None else call.start(relevance, gradient)
        through: Callable[[Iterator[Tile]], Iterator[Tile]] = iter if reading is None else reading.through
        device = (gradient if gradient is not None else relevance).device  # type: ignore[union-attr]
        with without_autocast(device):
            if ctx.saved_tensors and gradient is not None:
                assert isinstance(attention, SharedAttention)
                query, key, value, output = ctx.saved_tensors
                attention.reader = through if reading is not None and reading.reads_gradient else None
                fixed = not any(ctx.needs_input_grad[2:4])
                found = attention.backward(query, key, output, gradient, fixed)
                pairs = zip(found, (query, key, value), strict=True)
                into = tuple(None if part is None else part.to(real.dtype) for part, real in pairs)
                through = iter if attention.reader is not None else through
                attention.reader = None
            if reading is not None and through is not iter:
                reading.read(attention.tiles(gradient if reading.reads_gradient else None))
        if reading is not None:
            shares = call.shared_out(reading, *ctx.shapes)
        return None, gradient if not ctx.saved_tensors else None, *into, *shares

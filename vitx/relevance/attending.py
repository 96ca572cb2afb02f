"""One attention of the pass: where the relevance of what it put out goes, while its gradient passes by.

An attention is one node of the graph, for its values and for its shadow: autograd calls it when both the
gradient and the relevance of its output are known, so A is computed once for both, tile by tile.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitx.attention import Attention
from vitx.errors import VitxError
from vitx.fused import SharedAttention
from vitx.isolation import without_autocast
from vitx.relevance.rules import blank
from vitx.tiles import Tile


class Layer(Protocol):
    """What a method makes of one attention.

    Attributes:
        values: the relevance of the tokens that were attended to, (B, K).
        stays: what the tokens that attended keep by the residual, (B, Q).
    """

    values: Tensor
    stays: Tensor

    def read(self, tile: Tile) -> None:
        """Takes in some rows."""

    def end(self) -> None:
        """All rows were read."""


class Carrier:
    """A method that takes relevance through one attention after another.

    Attributes:
        start_layer: the first attention inside a residual that counts; what is below keeps its place.
        reads_gradient: whether it reads the gradient of A.
        of_heads: whether the map changes with which dimension holds the heads.
        grows: whether a layer hands on more than it got, as GAE's does.
    """

    start_layer: int = 0
    reads_gradient: bool = False
    of_heads: bool = False
    grows: bool = False

    def layer(self, relevance: Tensor, keys: int) -> Layer:
        """Begins with an attention inside a residual, from the relevance of its queries, (B, Q)."""
        raise NotImplementedError

    def pooling(self, relevance: Tensor, keys: int) -> Layer:
        """Begins with an attention without a residual, whose rows are the fused A alone."""
        raise NotImplementedError


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
        grown: what layers handed on beyond what they got, over all images.
    """

    def __init__(self) -> None:
        self.carrier: Carrier | None = None
        self.places = False
        self.calls: list[Attended] = []
        self.grown: Tensor | float = 0.0

    def begin(self, carrier: Carrier, *, places: bool = False) -> None:
        """Makes a method the one whose relevance travels.

        Args:
            carrier: the method.
            places: whether only places are asked for: a residual gives all to the stream, nothing to the
                branch.
        """
        self.carrier, self.places, self.grown = carrier, places, 0.0
        for number, layer in enumerate(self.layers()):
            layer.call.counts = number >= carrier.start_layer

    def grow(self, values: Tensor) -> None:
        """Counts what a layer handed on beyond what it got, (B, K)."""
        self.grown = self.grown + values.sum()

    def layers(self) -> list[Attended]:
        """Returns the attentions inside a residual, in the order in which they ran."""
        return [attended for attended in self.calls if attended.call.residual]


class Attending:
    """An attention call: A, and whether a residual goes around it.

    Attributes:
        residual: set when the sum around it is seen.
        counts: whether the method starts at or below it.
    """

    def __init__(
        self,
        within: Pass,
        attention: Attention,
        heads_known: bool,
        over_channels: Callable[[], bool] = lambda: False,
    ) -> None:
        """Describes a call.

        Args:
            within: the pass that it is a part of.
            attention: A.
            heads_known: whether the heads have a dimension of their own.
            over_channels: finds out whether its keys are channels of the same tokens.
        """
        self.residual = False
        self.counts = True
        self.attention = attention
        self._within = within
        self._heads_known = heads_known
        self._over_channels = over_channels

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
                "and cannot be told: only rollout and attention with head_fusion='mean' and no discard_ratio "
                "do not depend on them"
            )

    def start(self, relevance: Tensor, gradient: Tensor | None) -> "_Reading":
        """Begins the way back through this call."""
        carrier = self._within.carrier
        assert carrier is not None
        if not _alike(relevance):
            return self._start_over_channels(relevance)
        keys = self.attention.shape[-1]
        of_queries = relevance.sum((1, 3))
        if not self.residual:
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
        if not self._over_channels():
            raise VitxError(
                "the channels of what an attention put out are read apart, with no weights between (as by a "
                "maximum over tokens): no rule takes relevance through that"
            )
        share = None if self.residual else relevance.sum(2, keepdim=True) / self.attention.shape[-1]
        return _Reading(None, relevance, False, share)

    def shared_out(
        self, reading: "_Reading", values: torch.Size, weights: torch.Size
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns what the shadows of values, (B, H, K, d), and weights, (B, H, Q, K), get."""
        carrier = self._within.carrier
        assert carrier is not None
        if reading.layer is None:
            return None if reading.of_channels is None else reading.of_channels.expand(values), None
        if carrier.grows and self.residual:
            self._within.grow(reading.layer.values)
        into_values = spread(reading.layer.values, values)
        if not self.residual:
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


def spread(relevance: Tensor, shape: torch.Size) -> Tensor:
    """Shares out the relevance of tokens, (B, N), among heads and channels, (B, H, N, d)."""
    return (relevance[:, None, :, None] / (shape[1] * shape[3])).expand(shape)


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

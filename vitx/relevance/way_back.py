"""The way back from the output of a pass to the pixels."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from vitx.attention.fusing import first_layer
from vitx.attention.tiles import ALL, Tile
from vitx.errors import VitxError
from vitx.models.isolation import without_autocast
from vitx.relevance.attending import Attended
from vitx.relevance.carrier import Carrier
from vitx.relevance.chain import RolloutLayer
from vitx.relevance.conservation import check, check_lost, share_of_images, share_of_score
from vitx.relevance.grid import channel_axis, in_grid, without
from vitx.relevance.rules import spread
from vitx.relevance.shadow import Shadow


@dataclass(frozen=True)
class Found:
    """What one method found.

    Attributes:
        maps: (B, h, w); (B, t, h, w) of clips and volumes, (B, f, t) of spectrograms.
        conservation: (B,), what share of the relevance, or of the score, was accounted for.
        signed: of the same shape, below 0 where a patch speaks against; None for what has no sign.
    """

    maps: Tensor
    conservation: Tensor
    signed: Tensor | None = None


class ReadOut(Carrier):
    """No layer counts, so that relevance goes no further than to the tokens that are read out."""

    start_layer = sys.maxsize

    def __init__(self, head_fusion: str = "mean") -> None:
        self.of_heads = head_fusion != "mean"
        self._head_fusion = head_fusion

    def pooling(self, relevance: Tensor, keys: int) -> RolloutLayer:
        """The fused A alone."""
        return RolloutLayer(relevance, keys, self._head_fusion, residual=False)


class Way:
    """The way back through one pass, for one method.

    Attributes:
        layers: the attentions inside a residual, in the order in which they ran.
    """

    def __init__(self, watched: Shadow, logits: Tensor, scores: Sequence[Tensor] = ()) -> None:
        """Begins at the output.

        Args:
            watched: the pass.
            logits: what the model put out, (B, ...).
            scores: what methods of a class take the gradient of, summed over the images: one score, or one
                for each layer.

        Raises:
            VitxError: The output cannot be followed back to an attention.
        """
        self._watched, self._logits, self._scores = watched, logits, scores
        self._end = _end(watched, logits)
        self.layers = watched.attentions.layers()
        self._device = logits.device

    def counting(self, start_layer: int) -> list[Attended]:
        """Returns the layers from that number on, or raises a VitxError if there is no such layer."""
        return self.layers[first_layer(start_layer, len(self.layers)) :]

    def through(self, carrier: Carrier) -> Found:
        """Takes relevance from the logits to the pixels: 1 for each image, spread evenly over its logits.

        Raises:
            VitxError: Relevance was lost, or is negative: the map would be wrong.
        """
        if self.layers:
            first_layer(carrier.start_layer, len(self.layers))
        ends: list[Tensor] = [self._end]
        starts: list[Tensor | None] = [self._start()]
        if carrier.reads_gradient:
            ends, starts = [*ends, self._score], [*starts, None]
        pixels, own, common, tokens = self._arrived(carrier, ends, starts)
        arrived = pixels.flatten(1).sum(1) + own
        conservation = share_of_images(arrived, common, self._watched.attentions.grown)
        check(self._watched, conservation, pixels, own, positive=not carrier.grows)
        return Found(self._in_grid(pixels, tokens), conservation)

    def read_out(self, head_fusion: str = "mean") -> list[tuple[Attended, Tensor]]:
        """Finds what is read out: the relevance that arrives at the queries of the last attentions, (B, Q).

        Last are those that no other attention builds upon: more than one where some stand side by side.
        """
        return self.read_at(_last(self.layers), head_fusion)

    def read_at(self, layers: Sequence[Attended], head_fusion: str = "mean") -> list[tuple[Attended, Tensor]]:
        """Finds how much the output reads of each layer's queries, (B, Q), if no attention mixes them."""
        self._watched.attentions.begin(ReadOut(head_fusion))
        found = self._gradients([self._end], [one.shadow for one in layers], [self._start()])
        check_lost(self._watched, float(self._watched.attentions.astray))
        return [
            (one, one.shadow.new_zeros(one.shadow.shape[::2]) if part is None else part.sum((1, 3)))
            for one, part in zip(layers, found, strict=True)
        ]

    def rows_read(self, layers: Sequence[Attended]) -> list[list[int]]:
        """Finds which queries of each layer are read out: those that hold what the output reads."""
        read = [(readout.abs() > 1e-9).any(0) for _, readout in self.read_at(layers)]
        flags = torch.cat(read).tolist() if read else []  # all at once: a GPU would have to be waited for
        ends = [sum(len(rows) for rows in read[:number]) for number in range(len(read))]
        return [
            [row for row in range(len(rows)) if flags[end + row]]
            for end, rows in zip(ends, read, strict=True)
        ]

    def add_up(
        self,
        layer: Attended,
        part: Callable[[Tile], Tensor | None],
        gradient: bool = False,
        apart: slice = ALL,
    ) -> tuple[Tensor, Tensor]:
        """Adds up what a function makes of the tiles of a layer.

        Args:
            layer: the attention.
            part: from a tile to something for each token that is attended to, (b, K).
            gradient: whether the tiles come with the gradient of A.
            apart: rows that share no tile with others.

        Returns:
            The shadow of those tokens, and what was found of them, (B, K): to be given to `place`.
        """
        attention = layer.call.attention
        shape = attention.shape
        found = torch.zeros(shape[0], shape[-1], dtype=attention.dtype, device=attention.device)
        of_output = self._of_outputs[self.layers.index(layer)] if gradient else None
        with torch.no_grad(), without_autocast(self._device):
            for tile in attention.tiles(of_output, apart):
                more = part(tile)
                if more is not None:
                    found[tile.images] += more
        return layer.values, found

    def place(self, found: Iterable[tuple[Tensor, Tensor]]) -> Found:
        """Draws what was found of tokens where they sit in the picture.

        Args:
            found: a shadow, and what was found of its tokens: for each element, or (B, K) for (B, H, K, d).

        Raises:
            VitxError: It does not arrive at the image and the model's own tokens.
        """
        ends, starts = [], []
        for shadow, of_tokens in found:
            ends.append(shadow)
            spreads = of_tokens.ndim == 2 and shadow.ndim == 4
            starts.append(spread(of_tokens, shadow.shape) if spreads else of_tokens)
        pixels, own, common, first = self._arrived(ReadOut(), ends, starts, places=True)
        size, begun = (
            torch.stack([part.sum() for part in parts]).sum()
            for parts in ([start.abs() for start in starts], starts)
        )
        arrived = pixels.sum() + own.sum() + common
        share = (1 + (arrived - begun) / torch.where(size == 0, 1, size))[None]
        check(self._watched, share, pixels, own, positive=False)
        maps = self._in_grid(pixels, first)
        return Found(maps, share.expand(len(maps)))

    def _arrived(
        self,
        carrier: Carrier,
        ends: Sequence[Tensor],
        starts: Sequence[Tensor | None],
        *,
        places: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Returns what arrives at the pixels, at the model's own tokens, and at the first ones."""
        watched = self._watched
        watched.attentions.begin(carrier, places=places)
        stem = [] if watched.first is None else watched.first.stem
        inputs = [watched.image, watched.own, watched.common, *stem]
        found = self._gradients(ends, inputs, starts)
        pixels, own, common, *tokens = (
            torch.zeros_like(i) if part is None else part for part, i in zip(found, inputs, strict=True)
        )
        return without(pixels, self.channels), own, common, tokens

    @cached_property
    def channels(self) -> int | None:
        """The dimension of the input that holds its channels."""
        return channel_axis(self._watched.image, self._watched.first)

    def _in_grid(self, pixels: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        return in_grid(self._watched.image, pixels, self._watched.first, tokens, self.channels)

    def _gradients(
        self, ends: Sequence[Tensor], inputs: Sequence[Tensor], starts: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor | None, ...]:
        self._watched.lost.clear()
        try:
            with without_autocast(self._device):
                return torch.autograd.grad(ends, inputs, starts, retain_graph=True, allow_unused=True)
        except CheckpointError:
            raise VitxError(
                "activation checkpointing ran a block again, and differently than before: turn it off "
                "for the explanation"
            ) from None

    def _start(self) -> Tensor:
        end = self._end
        return torch.full(end.shape, 1 / end[0].numel(), dtype=end.dtype, device=end.device)

    def contributions(self, start_layer: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Finds what is added to the score by what each residual put out, x * dS/dx.

        Args:
            start_layer: the first layer that counts.

        Returns:
            The shadow of each output with what was found of its tokens: to be given to `place`.
        """
        return [
            (stream.shadow, part.sum_to_size(stream.shadow.shape))
            for stream, part in zip(self._watched.streams, self._parts, strict=False)  # which come first
            if stream.layers > start_layer
        ]

    def accounted(self) -> Tensor:
        """Returns what share of the score image and constants add, (1,), in the linearised network.

        Raises:
            VitxError: That is not all: the model computes something that was not linearised.
        """
        logits, *rest = (part.sum() for part in self._parts[len(self._watched.streams) :])
        return share_of_score(logits, torch.stack(rest), self._score.dtype)

    @property
    def _score(self) -> Tensor:
        for score in self._scores:
            if not score.requires_grad:
                raise VitxError(
                    "the score does not depend on any attention in a differentiable way (reentrant "
                    "checkpointing hides it): compute it from the model's output, with gradients enabled"
                )
        return self._scores[0]

    @cached_property
    def _inputs(self) -> list[Tensor]:
        """What gradients are asked of: what layers, residuals and model put out, the image, and constants."""
        watched = self._watched
        outputs = [layer.output for layer in self.layers if layer.output is not None]
        if not watched.accounts:
            return outputs
        streams = [stream.output for stream in watched.streams]
        return [*outputs, *streams, self._logits, watched.pixels, *watched.constants]

    @cached_property
    def _parts(self) -> list[Tensor]:
        """What each of them but the layers adds to the score, element by element."""
        dtype, first = self._watched.image.dtype, len(self.layers)
        pairs = zip(self._inputs[first:], self._backward[first:], strict=True)
        return [(value.detach() * gradient).to(dtype) for value, gradient in pairs]

    @cached_property
    def _backward(self) -> list[Tensor]:
        """The gradient of the score with respect to each of these, in one backward pass."""
        found = self._gradients([self._score], self._inputs)
        pairs = zip(self._inputs, found, strict=True)
        return [torch.zeros_like(value) if part is None else part for value, part in pairs]

    @cached_property
    def _of_outputs(self) -> list[Tensor]:
        """The gradient of each layer's output; of each layer's own score where there are as many of them."""
        if len(self._scores) < 2:
            return self._backward[: len(self.layers)]
        _ = self._score
        pairs = zip(self._scores, self._inputs[: len(self.layers)], strict=True)
        found = [(output, self._gradients([score], [output])[0]) for score, output in pairs]
        return [torch.zeros_like(output) if part is None else part for output, part in found]


def _last(layers: Sequence[Attended]) -> list[Attended]:
    """Returns the layers that no other layer builds upon."""
    below: set[Any] = set()
    waiting = [layer.shadow.grad_fn for layer in layers]
    own = set(waiting)
    while waiting:
        for node, _ in getattr(waiting.pop(), "next_functions", ()):
            if node is not None and node not in below:
                below.add(node)
                if node not in own:
                    waiting.append(node)
    return [layer for layer in layers if layer.shadow.grad_fn not in below]


def _end(watched: Shadow, logits: Tensor) -> Tensor:
    live = watched.get(logits)
    if live is None:
        raise VitxError(
            "the model's output does not come from the image by any torch function that was seen: code that "
            "is scripted, compiled in another process, or not torch's cannot be followed"
        )
    if live.lineage.kind in ("scores", "weights"):
        raise VitxError(
            "the output comes from a product of two tensors that both depend on the image, with no softmax "
            "behind it (linear attention): no rule takes relevance through it"
        )
    if not watched.attentions.calls:
        unknown = ", ".join(dict.fromkeys(watched.unknown))
        raise VitxError(
            "no attention between tokens was found: vitx explains Vision Transformers whose attention "
            "is scaled_dot_product_attention, nn.MultiheadAttention or a softmax times the values"
            + (f" (what it does not know of this one: {unknown})" if unknown else "")
        )
    return live.shadow

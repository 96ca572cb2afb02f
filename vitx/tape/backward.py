"""Backward walks along a tape, and the tiles of its attentions, as the methods need them."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import or_

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.functional.fusing import first_layer
from vitx.functional.tiles import ALL, Tile
from vitx.functional.weights import Weights
from vitx.tape import kernels
from vitx.tape.attention import Attention
from vitx.tape.conservation import check, check_lost, check_score, share_of_images, share_of_sum
from vitx.tape.expanded import summed
from vitx.tape.grid import Grid
from vitx.tape.heads import Heads, check_alone
from vitx.tape.relevance import Placement, Propagation, Reading, Rule
from vitx.tape.score import Score
from vitx.tape.sinks import Sinks, without
from vitx.tape.sums import Layer
from vitx.tape.tape import Tape
from vitx.tape.tensors import Kept
from vitx.tape.values import Value
from vitx.tape.walk import Walk, gradients
from vitx.tape.weights import joined

NO_RESIDUAL = (
    "no attention inside a residual was found, which this method needs: take rollout, grad_rollout, gae or "
    "attention"
)
LAID_OUT = ("view", "_unsafe_view", "_reshape_alias", "clone", "alias", "detach", "_to_copy")


@dataclass(frozen=True)
class Attribution:
    """The maps of one method.

    Attributes:
        maps: (B, h, w); (B, t, h, w) for clips and volumes, (B, f, t) for spectrograms.
        conservation: (B,), the share of the relevance, or of the score, that was accounted for.
        signed: of the same shape, below 0 where a patch speaks against the score; None if maps have no sign.
    """

    maps: Tensor
    conservation: Tensor
    signed: Tensor | None = None


@dataclass(eq=False, repr=False)
class Backward:
    """The backward walks along one tape, for one method."""

    tape: Tape
    image: Tensor  # (B, ...)
    start: Tensor  # the relevance of the output, which sums to 1 for each image
    end: Value  # the value of the output
    scores: Sequence[Score] = ()  # what class-specific methods differentiate: one, or one for each layer
    passed: dict[Value, Tensor] = field(default_factory=dict)  # relevance of values, if the tape is `named`
    sinks: Sinks | None = None  # of the pass; None if they cannot be determined

    @cached_property
    def grid(self) -> Grid:
        """The grid of the first tokens, which turns the relevance of pixels into maps."""
        return Grid(self.tape)

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers, in the order in which they ran."""
        return self.tape.layers

    def counting(self, start_layer: int) -> list[Layer]:
        """Return the layers from this number on, or raise a VitxError if there is no such layer."""
        if not self.layers:
            raise VitxError(NO_RESIDUAL)
        self._check(start_layer)
        return self.tape.layers_from(start_layer)

    def _check(self, start_layer: int) -> None:
        """Raise a VitxError if there are layers, but none of this number."""
        if self.layers:
            first_layer(start_layer, 1 + max(layer.number for layer in self.layers))

    def propagate(self, rule: Rule, *, without_sinks: bool = False) -> Attribution:
        """Take relevance from where the score was read to the pixels, starting with 1 for each image.

        `without_sinks` removes the columns of the sinks from A, and scales its rows to their former sums.

        Raises:
            VitxError: Relevance was lost, or is negative: the map would be wrong.
        """
        self._check(rule.start_layer)
        gradients = None
        if rule.reads_gradient:  # of the original A, with its sinks
            gradients = self._differentiated(None if without_sinks else rule)
        with without(self.tape, self.sinks) if without_sinks else nullcontext():
            return self._drawn(rule, {self.end: self.start}, gradients)

    def place(self, found: Iterable[tuple[Value, Tensor]], head_fusion: str = "mean") -> Attribution:
        """Map quantities found for the elements of some values to the places of these elements in the image.

        `head_fusion` fuses the heads of attention that merges tokens on the way.

        Raises:
            VitxError: They do not all arrive at the image and the model's own tokens, or there are none.
        """
        starts: dict[Value, Tensor] = {}
        for value, part in found:
            starts[value] = starts[value] + part if value in starts else part
        if not starts:
            raise VitxError("no attention between tokens leads to the output: take evidence or rollout")
        return self._drawn(Placement(head_fusion), starts)

    def _drawn(self, rule: Rule, starts: dict[Value, Tensor], gradients: Walk | None = None) -> Attribution:
        way = Propagation(self.tape, rule, gradients)
        found = way.run(starts, self.tape.values if self.tape.named else self.grid.stem)
        if self.tape.named:
            self.passed = found.passed
        zero = next(iter(starts.values())).new_zeros(())
        pixels = found.arrived.pop(self.tape.image, zero.expand(self.tape.image.shape))
        pixels = self.grid.without_channels(pixels)
        own = torch.stack([zero, *(part.sum() for part in found.arrived.values())])
        positive = rule.moves and not rule.grows
        if positive and not self.tape.together:
            conservation = share_of_images(pixels.flatten(1).sum(1), own.sum())
        else:  # it is unknown how much arrived for which image
            sums = torch.stack([torch.stack([part.sum(), part.abs().sum()]) for part in starts.values()])
            begun, size = sums.sum(0) + way.grown
            conservation = share_of_sum(begun, pixels.sum() + own.sum(), size).expand(len(pixels))
        check(conservation, pixels, own, way.lost, positive=positive)
        return Attribution(self.grid.map(pixels, found.passed), conservation)

    def read_out(self, head_fusion: str = "mean") -> list[tuple[Attention, Tensor]]:
        """Return the attentions that no other builds upon, with the relevance of their queries, (T, Q).

        Between these and the output, `head_fusion` fuses the heads of attention that pools tokens.
        """
        attentions = [one for layer in self.layers for one in layer.attentions] or self.tape.attentions
        before = reduce(or_, (one.value.ancestors for one in attentions), 0)
        last = [one for one in attentions if not before >> one.value.number & 1]
        return list(zip(last, self._read_at(last, head_fusion), strict=True))

    def rows_read(self, attentions: Sequence[Attention]) -> list[Tensor]:
        """Return which queries of each attention the output reads from, (T, Q) bool, on the CPU."""
        read = [readout.abs() > 1e-9 for readout in self._read_at(attentions)]
        # Transfer all at once: each transfer has to wait for the GPU.
        on_host = torch.cat([rows.flatten() for rows in read]).cpu()
        parts = on_host.split([rows.numel() for rows in read])
        return [part.view(rows.shape) for part, rows in zip(parts, read, strict=True)]

    def _read_at(self, attentions: Sequence[Attention], head_fusion: str = "mean") -> list[Tensor]:
        """Return how much the output reads from each attention's queries, (T, Q), as if none mixed tokens."""
        way = Reading(self.tape, head_fusion)
        found = way.run({self.end: self.start}, [one.value for one in attentions])
        check_lost(way.lost)
        return [summed(found.at(one), [1, 3]) for one in attentions]

    def heads(self, attention: Attention) -> Weights:
        """Return A of an attention and of all heads beside it in its layer.

        Raises:
            VitxError: It is unknown which attentions are heads of one.
        """
        layers = [layer for layer in self.layers if attention in layer.attentions]
        if not layers:
            check_alone(self.tape, attention)
            return attention.weights
        return joined([one.weights for one in Heads(self.tape).beside(layers[0], attention)])

    def add_up(
        self,
        attention: Attention,
        part: Callable[[Tile], Tensor],
        *,
        gradient: bool = False,
        rows: slice = ALL,
    ) -> tuple[Value, Tensor]:
        """Add up a function of each tile of some rows of A, which returns (b, K) for the attended tokens.

        With `gradient`, tiles include the gradient of A. The result is meant for `place`.
        """
        weights = attention.weights
        if gradient:
            weights = weights.with_gradient(self._gradients.at(attention))
        return attention.inputs[0], attention.to_values(weights.add_up(part, rows))

    def contributions(self, start_layer: int = 0) -> list[tuple[Value, Tensor]]:
        """Return what each residual from a layer on adds to the score, x * dS/dx, as input for `place`.

        Raises:
            VitxError: The model has no residual.
        """
        counted = [value for value, _, n in self._streams if n > start_layer or not self.layers]
        products = self._gradients.products
        if not counted and not self.layers:
            raise VitxError(NO_RESIDUAL)
        return [(value, products[value]) for value in counted if value in products]

    def accounted(self) -> Tensor:
        """Return the share of the score, (1,), that image and constants add up to in the linearized network.

        Raises:
            VitxError: It is not the whole score: the model computes something that was not linearized.
        """
        (score,) = self.scores
        arrived = self._gradients.arrived
        constants = [(one, one.constant.tensor) for one in self.tape.constants if one.constant is not None]
        known = [(self.tape.image, self.image), *constants]
        pairs = [(t.to(g), g) for v, t in known if (g := arrived.get(v)) is not None]
        # Tensors with gradient 0 add nothing, whatever they hold: overwritten memory may hold NaN.
        products = ((tensor * g).masked_fill_(g == 0, 0) for tensor, g in pairs)
        added, size = torch.stack([torch.stack([one.sum(), one.abs_().sum()]) for one in products]).sum(0)
        whole = (score.output.to(score.gradient.dtype) * score.gradient).sum()
        share = share_of_sum(whole, added, size)
        check_score(share, self.image.dtype)
        return share

    @cached_property
    def _streams(self) -> list[tuple[Value, Kept, int]]:
        """The output of each residual, and the number of layers up to it.

        A constant added to an output, such as a bias, is included if the output was not used before that.
        """
        pairs = [(source, step) for step in self.tape.steps for source in dict.fromkeys(step.sources)]
        uses, use = Counter(source for source, _ in pairs), dict(pairs)
        found = []
        for stream, (output, layers) in self.tape.streams.items():
            value = last = stream
            while uses[value] == 1:
                if value in self.tape.shifted:
                    last, output = self.tape.shifted[value]
                elif use[value].name not in LAID_OUT:
                    break
                value = use[value].outputs[0]
            found.append((last, output, layers))
        return found

    @cached_property
    def _gradients(self) -> Walk:
        return self._differentiated()

    def _differentiated(self, rule: Rule | None = None) -> Walk:
        """Return the gradient of the score at all attentions, or of each layer's score at its own attentions.

        For one score on a tape with `accounts`, the gradient also goes to residuals, image and constants.
        """
        one_score = len(self.scores) == 1
        whole = self.tape.accounts and one_score
        found = Walk({})
        groups = [self.tape.attentions] if one_score else [layer.attentions for layer in self.layers]
        for score, attentions in zip(self.scores, groups, strict=True):
            if score.value.is_constant or not score.value.ancestors:
                raise VitxError("the score does not depend on the image")
            fused = dict.fromkeys(self._small(rule.start_layer), rule.fuse) if rule and rule.fuse else {}
            watched = [attention.value for attention in attentions if attention not in fused]
            times = {value: output for value, output, _ in self._streams} if whole else {}
            starts = {score.value: score.gradient}
            one = gradients(self.tape, starts, watched, whole=whole, fused=fused, times=times)
            found.arrived |= one.arrived
            found.passed |= one.passed
            found.fused |= one.fused
            found.products |= one.products
        return found

    def _small(self, start_layer: int) -> list[Attention]:
        """Return the attentions, each a layer by itself, whose heads can be fused as a gradient passes."""
        if self.tape.network == "plain":
            return []  # the gradient goes through A, too
        alone = [
            layer.attentions[0] for layer in self.tape.layers_from(start_layer) if len(layer.attentions) == 1
        ]
        return [one for one in alone if math.prod(one.weights.shape[1:]) <= kernels.SMALL]

"""What a method may ask of a tape: the ways back from the output, and the tiles of its attentions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.functional.fusing import first_layer
from vitx.functional.tiles import ALL, Tile
from vitx.models.isolation import without_autocast
from vitx.tape.attention import Attention, Layer
from vitx.tape.conservation import check, check_lost, check_score, share_of_images, share_of_sum
from vitx.tape.expanded import summed
from vitx.tape.grid import Grid
from vitx.tape.output import Score
from vitx.tape.relevance import Propagation, Rule
from vitx.tape.storages import Kept
from vitx.tape.tape import Tape
from vitx.tape.values import LAID_OUT, Step, Value
from vitx.tape.walk import Walk, gradients


@dataclass(frozen=True)
class Attribution:
    """The maps of one method.

    Attributes:
        maps: (B, h, w); (B, t, h, w) of clips and volumes, (B, f, t) of spectrograms.
        conservation: (B,), what share of the relevance, or of the score, was accounted for.
        signed: of the same shape, below 0 where a patch speaks against; None for what has no sign.
    """

    maps: Tensor
    conservation: Tensor
    signed: Tensor | None = None


class Backward:
    """The ways back along one tape, for one method.

    Attributes:
        tape: the pass.
        image: the images, (B, ...).
        grid: makes maps of the relevance of pixels.
        passed: what relevance passed each value on the last way, where the tape keeps places.
    """

    def __init__(
        self, tape: Tape, image: Tensor, start: Tensor, end: Value, scores: Sequence[Score] = ()
    ) -> None:
        """Begins at the output, with relevance that sums to 1 for each image.

        Methods of a class take the gradient of one score, or of one for each layer.
        """
        self.tape, self.image, self.grid = tape, image, Grid(tape)
        self.passed: dict[Value, Tensor] = {}
        self._start, self._end, self._scores = start, end, scores

    @property
    def layers(self) -> list[Layer]:
        """The layers, in the order in which they ran."""
        return self.tape.layers

    def counting(self, start_layer: int) -> list[Layer]:
        """Returns the layers from that number on, or raises a VitxError if there is no such layer."""
        if not self.layers:
            raise VitxError(
                "no attention inside a residual was found, which this method needs: take rollout, "
                "grad_rollout, gae or attention"
            )
        return self.layers[first_layer(start_layer, len(self.layers)) :]

    def propagate(self, rule: Rule) -> Attribution:
        """Takes relevance from the output to the pixels: 1 for each image, begun where the score was read.

        Raises:
            VitxError: Relevance was lost, or is negative: the map would be wrong.
        """
        if self.layers:
            first_layer(rule.start_layer, len(self.layers))
        way = Propagation(self.tape, rule, self._gradients if rule.reads_gradient else None)
        pixels, own, tokens = self._arrived(way, {self._end: self._start})
        conservation = share_of_images(pixels.flatten(1).sum(1), own.sum(), way.grown)
        check(conservation, pixels, own, way.lost, positive=not rule.grows)
        return Attribution(self.grid.map(pixels, tokens), conservation)

    def read_out(self) -> list[tuple[Attention, Tensor]]:
        """Finds what is read out: the relevance that arrives at the queries of the last attentions, (T, Q).

        Last are those that no other attention builds upon: more than one where some stand side by side.
        """
        attentions = [one for layer in self.layers for one in layer.attentions] or self.tape.attentions
        last = [
            one
            for one in attentions
            if not any(other.value.above >> one.value.number & 1 for other in attentions)
        ]
        return list(zip(last, self._read_at(last), strict=True))

    def rows_read(self, attentions: Sequence[Attention]) -> list[list[int]]:
        """Finds which queries of each attention are read out: those that hold what the output reads."""
        read = [(readout.abs() > 1e-9).any(0) for readout in self._read_at(attentions)]
        on_host = torch.cat(read).cpu()  # all at once: a GPU has to be waited for
        return [rows.nonzero().flatten().tolist() for rows in on_host.split([len(rows) for rows in read])]

    def add_up(
        self,
        attention: Attention,
        part: Callable[[Tile], Tensor | None],
        *,
        gradient: bool = False,
        apart: slice = ALL,
    ) -> tuple[Value, Tensor]:
        """Adds up what a function makes of the tiles of an attention.

        Args:
            attention: the attention.
            part: from a tile to something for each token that is attended to, (b, K).
            gradient: whether the tiles come with the gradient of A.
            apart: rows that share no tile with others.

        Returns:
            The value of those tokens, and what was found of them, of its shape: to be given to `place`.
        """
        weights = attention.weights
        found = torch.zeros(weights.shape[0], weights.shape[3], dtype=weights.dtype, device=weights.device)
        with torch.no_grad(), without_autocast(weights.device):
            for tile in weights.tiles(self._gradients.at(attention) if gradient else None, apart):
                more = part(tile)
                if more is not None:
                    found[tile.images] += more
        return attention.inputs[0], attention.to_values(found)

    def place(self, found: Iterable[tuple[Value, Tensor]]) -> Attribution:
        """Draws what was found of tokens where they sit in the picture.

        Args:
            found: a value, and what was found of its elements.

        Raises:
            VitxError: It does not arrive at the image and the model's own tokens.
        """
        starts: dict[Value, Tensor] = {}
        for value, part in found:
            starts[value] = starts[value] + part if value in starts else part
        way = Propagation(self.tape, None)
        pixels, own, tokens = self._arrived(way, starts)
        begun, size = _sums(starts.values())
        share = share_of_sum(begun, pixels.sum() + own.sum(), size)
        check(share, pixels, own, way.lost, positive=False)
        maps = self.grid.map(pixels, tokens)
        return Attribution(maps, share.expand(len(maps)))

    def contributions(self, start_layer: int = 0) -> list[tuple[Value, Tensor]]:
        """Finds what is added to the score by what each residual put out, x * dS/dx.

        Args:
            start_layer: the first layer that counts.

        Returns:
            The value of each output with what was found of its elements: to be given to `place`.
        """
        passed = self._gradients.passed
        # Attention over channels is no layer, as it mixes no tokens; its output counts with the first one.
        mixing = [step.index for step in self.tape.steps if isinstance(step, Attention)]
        first = mixing[0] if self.layers and mixing else -1
        return [
            (value, output.tensor.to(passed[value].dtype) * passed[value])
            for value, output, layers in self._streams
            if value in passed and (layers > start_layer or (not start_layer and _index(value) > first))
        ]

    def accounted(self) -> Tensor:
        """Returns what share of the score image and constants add, (1,), in the linearised network.

        Raises:
            VitxError: That is not all: the model computes something that was not linearised.
        """
        (score,) = self._scores
        arrived = self._gradients.arrived
        known = [(self.tape.image, self.image), *((one, one.constant) for one in self.tape.constants)]
        reached = [
            torch.broadcast_tensors(tensor.to(g.dtype), g)
            for value, tensor in known
            if tensor is not None and (g := arrived.get(value)) is not None
        ]
        tensors, gradient = (
            torch.cat([one.flatten() for one in side]) for side in zip(*reached, strict=True)
        )
        # What no gradient reaches adds nothing, whatever it holds: memory that was written over may hold NaN.
        product = torch.where(gradient == 0, 0, tensors * gradient)
        added, size = product.sum(), product.abs().sum()
        share = share_of_sum((score.output.to(score.gradient.dtype) * score.gradient).sum(), added, size)
        check_score(share, self.image.dtype)
        return share

    @cached_property
    def _streams(self) -> list[tuple[Value, Kept, int]]:
        """What each residual put out, and how many layers came before.

        A constant that was added to it, as a bias, belongs to it if nothing else was done with it before.
        """
        uses: dict[Value, list[Step]] = {}
        for step in self.tape.steps:
            for source in dict.fromkeys(step.sources):
                uses.setdefault(source, []).append(step)
        found = []
        for stream, (output, layers) in self.tape.streams.items():
            value = last = stream
            while len(uses.get(value, ())) == 1:
                (step,) = uses[value]
                if value in self.tape.shifted:
                    last, output = self.tape.shifted[value]
                elif step.name not in LAID_OUT:
                    break
                value = step.outputs[0]
            found.append((last, output, layers))
        return found

    def _arrived(
        self, way: Propagation, starts: Mapping[Value, Tensor]
    ) -> tuple[Tensor, Tensor, dict[Value, Tensor]]:
        """Returns what arrives at the pixels, at each of the model's own tokens, and at those of a stem."""
        found = way.run(dict(starts), self.tape.values if self.tape.named else self.grid.stem)
        if self.tape.named:
            self.passed = found.passed
        pixels = found.arrived.pop(self.tape.image, None)
        like = next(iter(starts.values()))
        if pixels is None:
            pixels = torch.zeros(self.tape.image.shape, dtype=like.dtype, device=like.device)
        own = [part.sum() for part in found.arrived.values()]
        return self.grid.without_channels(pixels), torch.stack([like.new_zeros(()), *own]), found.passed

    def _read_at(self, attentions: Sequence[Attention]) -> list[Tensor]:
        """Finds how much the output reads of each attention's queries, (T, Q), if no attention mixes them."""
        way = Propagation(self.tape, Rule())
        found = way.run({self._end: self._start}, [one.value for one in attentions])
        check_lost(way.lost)
        return [summed(found.at(one), [1, 3]) for one in attentions]

    @cached_property
    def _gradients(self) -> Walk:
        """The gradient of the score at the attentions, or at those of each layer of the layer's own score.

        Of one score on a tape that accounts for it, also at the residuals, the image and the constants.
        """
        whole = self.tape.accounts and len(self._scores) == 1
        groups = [self.tape.attentions]
        if len(self._scores) != 1:
            groups = [list(layer.attentions) for layer in self.layers]
        found = Walk({})
        for score, attentions in zip(self._scores, groups, strict=True):
            if score.value.is_constant or not score.value.above:
                raise VitxError("the score does not depend on the image")
            watched = [attention.value for attention in attentions]
            watched += [value for value, _, _ in self._streams] if whole else []
            with torch.no_grad(), without_autocast(score.gradient.device):
                one = gradients(self.tape, {score.value: score.gradient}, watched, whole=whole)
            found.arrived |= one.arrived
            found.passed |= one.passed
        return found


def _index(value: Value) -> int:
    return value.made_by.index if value.made_by else -1


def _sums(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the sum of all elements of some tensors, and that of their absolute values."""
    sums = torch.stack([torch.stack([part.sum(), part.abs().sum()]) for part in parts])
    return sums[:, 0].sum(), sums[:, 1].sum()

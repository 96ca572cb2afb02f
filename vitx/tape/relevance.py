"""Relevance along the tape: where what the output has came from."""

from collections.abc import Collection
from functools import cache, partial
from typing import Protocol

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.functional.tiles import Tile
from vitx.models.isolation import without_autocast
from vitx.tape.attention import Attention, Layer
from vitx.tape.axes import channel_dims, tokens
from vitx.tape.expanded import over, summed
from vitx.tape.residual import heads_beside, into_branches, marked, to_stream
from vitx.tape.sums import Sum
from vitx.tape.tape import Tape
from vitx.tape.values import Step, Value
from vitx.tape.walk import Sent, Walk, through, walk
from vitx.tape.weights import Weights, joined


class Rows(Protocol):
    """What a rule makes of one attention.

    Attributes:
        values: the relevance of the tokens that are attended to, (T, K).
        stays: what the tokens that attend keep by the residual, (T, Q).
    """

    values: Tensor
    stays: Tensor

    def read(self, tile: Tile) -> None:
        """Takes in some rows: those of some images after those of others, from the first to the last."""


class AllStays:
    """To begin with, the tokens that attend keep all; a rule that grows adds what others get."""

    def __init__(self, relevance: Tensor, keys: int) -> None:
        self.values, self.stays = relevance.new_zeros(len(relevance), keys), relevance

    def read(self, tile: Tile) -> None:
        """Reads nothing."""


class Rule:
    """A propagation rule for attention, which is what tells one method from another.

    Attributes:
        start_layer: the first layer that counts; below, all relevance keeps its place.
        reads_gradient: whether it reads the gradient of A.
        of_heads: whether the map changes with which dimension holds the heads.
        grows: whether a layer hands on more than it got, as GAE's does.
        whole: whether a layer counts as a whole, all rows of its A together.
    """

    start_layer: int = 0
    reads_gradient: bool = False
    of_heads: bool = False
    grows: bool = False
    whole: bool = False

    def keeps_half(self, weights: Weights) -> bool:
        """Returns whether a token keeps half of its relevance by the residual, whatever A is."""
        return False

    def layer(self, relevance: Tensor, keys: int) -> Rows:
        """Begins with an attention inside a residual, from the relevance of its queries, (T, Q)."""
        return AllStays(relevance, keys)

    def pooling(self, relevance: Tensor, keys: int) -> Rows | None:
        """Begins with an attention without a residual; None: rows of the mean of the heads, scaled to 1."""
        return None


class Propagation:
    """One way of relevance back along a tape.

    Attributes:
        lost: how much relevance of an image reached each operator without a rule.
        grown: what layers handed on beyond what they got, over all images.
    """

    def __init__(self, tape: Tape, rule: Rule | None, gradients: Walk | None = None) -> None:
        """Prepares a way. Without a rule, all tokens keep their place: a residual gives all to its stream."""
        self.lost: dict[str, float] = {}
        self.grown = torch.zeros(())
        self._tape, self._gradients, self._rule = tape, gradients, rule or Rule()
        sums = [step for step in tape.steps if isinstance(step, Sum)]
        self._skipped = {one for one in sums if one.closes or rule is None}  # all goes to their streams
        self._layer: dict[Attention, Layer] = {}  # where the share that a token keeps depends on A
        self._around: set[Sum] = set()
        self._entered: dict[Sum, Tensor] = {}  # the relevance of those that were passed
        self._marked = cache(partial(marked, tape))  # all heads of a layer ask for those of all
        for layer in tape.layers[rule.start_layer :] if rule else []:
            self._skipped -= layer.residuals
            if not all(self._rule.keeps_half(attention.weights) for attention in layer.attentions):
                self._layer |= dict.fromkeys(layer.attentions, layer)
                self._around |= layer.residuals

    def run(self, starts: dict[Value, Tensor], watched: Collection[Value] = ()) -> Walk:
        """Takes relevance from some values to the image and to the model's own tokens."""
        with torch.no_grad(), without_autocast(next(iter(starts.values())).device):
            return walk(self._tape, starts, self._send, watched=watched)

    def _send(self, step: Step, arrived: list[Tensor]) -> Sent:
        if isinstance(step, Attention):
            return self._attended(step, arrived[0])
        if isinstance(step, Sum) and step in self._around:
            self._entered[step] = arrived[0]
            return into_branches(step, arrived[0]).items()
        if isinstance(step, Sum) and step.stream is not None and step in self._skipped:
            return [(step.stream, step.to_term(step.stream, arrived[0]))]
        if step.relevance is None:
            size = sum(float(r.abs().sum()) for r in arrived) / self._tape.image.shape[0]
            self.lost[str(step)] = self.lost.get(str(step), 0.0) + size
        return through(step, arrived)

    def _attended(self, step: Attention, r: Tensor) -> Sent:
        layer = self._layer.get(step)
        if layer is None and step.residuals:
            return through(step, [r])
        rows = summed(step.arrived(r), [1, 3])
        begin = self._rule.pooling if layer is None else self._rule.layer
        state = begin(rows, step.weights.shape[3])
        if state is None:
            return through(step, [r])
        self._read(state, step)
        sent = [(step.inputs[0], step.to_values(state.values))]
        if layer is not None:
            if self._rule.grows:
                self.grown = self.grown + state.values.sum()
            shares = over(state.stays, rows)
            for residual in layer.residuals & self._entered.keys() & step.residuals:
                sent += to_stream(self._tape, residual, self._entered[residual], step, shares)
        return sent

    def _read(self, rows: Rows, step: Attention) -> None:
        """Shows all tiles of an attention to the rule; its heads are those of the whole layer."""
        layer, gradient = self._layer.get(step), None
        members = [step] if layer is None else heads_beside(layer, step, self._marked)
        alone = len(members) == 1
        weights = step.weights if alone else joined([member.weights for member in members])
        if self._rule.of_heads:
            _check_heads(members, self._tape.image.shape[0])
        if layer is not None:
            of_some = len(members) < len(layer.attentions) and weights.shape[2] < weights.shape[3]
            if of_some and self._rule.whole:
                raise VitxError("the rows of an attention are computed in parts: take no discard_ratio")
            if self._gradients is not None:
                parts = [self._gradients.at(member) for member in members]
                gradient = parts[0] if alone else parts
        with torch.no_grad():
            for tile in weights.tiles(gradient):
                rows.read(tile)


def _check_heads(attentions: Collection[Attention], images: int) -> None:
    """Raises a VitxError if heads may be counted as windows: no operator told which dimension holds them."""
    for attention in attentions:
        apart = attention.layout.heads == 1 and attention.weights.shape[0] > images
        if apart and (hides := _hides_heads(attention.inputs[0])):
            raise VitxError(
                f"the heads of an attention cannot be told from windows, as its values come from "
                f"{hides}: take rollout with head_fusion='mean' and no discard_ratio"
            )


def _hides_heads(value: Value) -> Step | None:
    """Returns a call behind the last weights of which it is not known where channels go."""
    step = value.made_by
    if step is None or step.relevance is None or isinstance(step, (Sum, Attention)):
        return None
    if step.axes is None or step.axes([source.axes for source in step.inputs]) is None:
        return step
    if channel_dims(step.axes([tokens(source.shape) for source in step.inputs]) or ()):
        return None  # weights put out new channels
    return next((found for source in step.inputs if (found := _hides_heads(source))), None)

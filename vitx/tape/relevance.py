"""Relevance along the tape: where what the output has came from."""

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.functional.tiles import Tile
from vitx.models.isolation import without_autocast
from vitx.tape.attention import Attention, Layer
from vitx.tape.expanded import summed
from vitx.tape.gradient import told
from vitx.tape.residual import heads_beside, into_branches, returns, shares_kept, through
from vitx.tape.sums import Sum
from vitx.tape.tape import Tape
from vitx.tape.values import Step, Value
from vitx.tape.walk import Sent, Walk, walk
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


class Rule:
    """A propagation rule for attention, which is what tells one method from another.

    Attributes:
        start_layer: the first layer that counts; below, all relevance keeps its place.
        reads_gradient: whether it reads the gradient of A.
        of_heads: whether the map changes with which dimension holds the heads.
        grows: whether a layer hands on more than it got, as GAE's does.
        passes: whether any relevance goes from token to token.
        whole: whether a layer counts as a whole, all rows of its A together.
    """

    start_layer: int = 0
    reads_gradient: bool = False
    of_heads: bool = False
    grows: bool = False
    passes: bool = True
    whole: bool = False

    def keeps_half(self, weights: Weights) -> bool:
        """Returns whether a token keeps half of its relevance by the residual, whatever A is."""
        return False

    def layer(self, relevance: Tensor, keys: int) -> Rows:
        """Begins with an attention inside a residual, from the relevance of its queries, (T, Q)."""
        raise NotImplementedError

    def pooling(self, relevance: Tensor, keys: int) -> Rows | None:
        """Begins with an attention without a residual; None: rows of the mean of the heads, scaled to 1."""
        return None


class Places(Rule):
    """No rule: tokens keep their place, and a residual gives all to its stream."""

    passes = False


class Propagation:
    """One way of relevance back along a tape.

    Attributes:
        lost: how much relevance of an image reached each operator without a rule.
        grown: what layers handed on beyond what they got, over all images.
    """

    def __init__(self, tape: Tape, rule: Rule, gradients: Mapping[Value, Tensor] | None = None) -> None:
        """Prepares a way.

        Args:
            tape: the pass.
            rule: of the method.
            gradients: of the score, with respect to what each attention put out, if the rule reads it.
        """
        self.lost: dict[str, float] = {}
        self.grown: Tensor | float = 0.0
        self._tape, self._rule, self._gradients = tape, rule, gradients or {}
        layers = [layer for layer in tape.layers if layer.number >= rule.start_layer]
        self._layer = {attention: layer for layer in layers for attention in layer.attentions}
        self._around = {residual: layer for layer in layers for residual in layer.residuals}
        self._weights: dict[Layer, Weights] = {}

    def run(self, starts: dict[Value, Tensor], watched: Collection[Value] = ()) -> Walk:
        """Takes relevance from some values to the image and to the model's own tokens."""
        device = next(iter(starts.values())).device
        with torch.no_grad(), without_autocast(device):
            return walk(self._tape, starts, self._send, watched=watched)

    def _send(self, step: Step, arrived: list[Tensor]) -> Sent:
        if isinstance(step, Sum):
            return self._summed(step, arrived[0])
        if isinstance(step, Attention):
            return self._attended(step, arrived[0])
        if step.relevance is None:
            size = sum(float(r.abs().sum()) for r in arrived) / self._tape.image.shape[0]
            name = told(step)
            self.lost[name] = self.lost.get(name, 0.0) + size
        return through(step, arrived)

    def _summed(self, step: Sum, r: Tensor) -> Sent:
        if step.stream is not None and (not self._rule.passes or (step.closes and step not in self._around)):
            return [(step.stream, step.to_term(step.stream, r))]
        layer = self._around.get(step)
        if layer is None or self._keeps_half(layer):
            return through(step, [r])
        sent = list(into_branches(step, r).items())
        if not self._returns(layer):
            assert step.stream is not None
            stays = {attention: self._stays(attention) for attention in step.closes}
            kept = r * shares_kept(self._tape, step, stays)
            sent.append((step.stream, step.to_term(step.stream, kept)))
        return sent

    def _attended(self, step: Attention, r: Tensor) -> Sent:
        layer, values = self._layer.get(step), step.inputs[0]
        if not self._rule.passes or (layer is not None and self._keeps_half(layer)):
            return [(values, step.shared(r))]
        rows = summed(step.arrived(r), [1, 3])
        if layer is None:
            found = None if step.residuals else self._rule.pooling(rows, step.weights.shape[3])
            if found is None:
                return [(values, step.shared(r))]
            self._read(found, step, None)
            return [(values, step.to_values(found.values))]
        state = self._rule.layer(rows, step.weights.shape[3])
        self._read(state, step, layer)
        if self._rule.grows:
            self.grown = self.grown + state.values.sum()
        sent = [(values, step.to_values(state.values))]
        if self._returns(layer):
            sent.append((step.inputs[1], step.to_rows(state.stays)))
        return sent

    def _stays(self, step: Attention) -> Tensor:
        """Returns what share of its relevance each row keeps, (T, Q)."""
        shape = step.weights.shape
        ones = torch.ones(shape[0], shape[2], dtype=step.weights.dtype, device=step.weights.device)
        state = self._rule.layer(ones, shape[3])
        self._read(state, step, self._layer[step])
        return state.stays

    def _read(self, rows: Rows, step: Attention, layer: Layer | None) -> None:
        """Shows all tiles of an attention to the rule; its heads are those of the whole layer."""
        members = [step] if layer is None else heads_beside(self._tape, layer, step)
        weights = members[0].weights if len(members) == 1 else joined([m.weights for m in members])
        cut = (
            layer is not None and len(members) < len(layer.attentions) and weights.shape[2] < weights.shape[3]
        )
        if cut and self._rule.whole:
            raise VitxError("the rows of an attention are computed in parts: take no discard_ratio")
        gradient = None
        if layer is not None and self._rule.reads_gradient:
            gradient = self._gradient(members)
        with torch.no_grad():
            for tile in weights.tiles(gradient):
                rows.read(tile)

    def _gradient(self, members: Collection[Attention]) -> Tensor | list[Tensor]:
        found = []
        for member in members:
            part = self._gradients.get(member.value)
            if part is None:
                part = torch.zeros((), dtype=member.weights.dtype, device=member.weights.device)
                part = part.expand(member.value.shape)
            found.append(member.arrived(part))
        return found[0] if len(found) == 1 else found

    def _returns(self, layer: Layer) -> bool:
        return all(returns(self._tape, residual) for residual in layer.residuals)

    def _keeps_half(self, layer: Layer) -> bool:
        return all(self._rule.keeps_half(attention.weights) for attention in layer.attentions)


def check_lost(lost: Mapping[str, float], tolerance: float) -> None:
    """Raises a VitxError if relevance reached an operator without a rule."""
    name = max(lost, key=lost.__getitem__, default=None)
    if name is not None and lost[name] > tolerance:
        raise VitxError(
            f"{lost[name]:.1%} of the relevance reached {name}, and no rule takes it through that "
            "call: the map would be wrong"
        )

"""Relevance along the tape: where the content of the output came from.

Where the shares of a residual depend on A, with w as the sum of a row of the fused matrix W:

1. The branch of the sum gets all of the relevance r.
2. The attention sends W^T r / (1 + w) to its values, and tells that its rows keep r / (1 + w).
3. What the rows keep goes to the stream, at those elements of the sum whose relevance came to these rows.
"""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.functional.rollout import through_layer
from vitx.functional.weights import Fuse, Weights
from vitx.tape.attention import Attention
from vitx.tape.expanded import ratio, scaled
from vitx.tape.heads import Heads, check_alone
from vitx.tape.sums import Layer, Sum
from vitx.tape.tape import Tape
from vitx.tape.values import Step, Value
from vitx.tape.walk import Sent, Walk, through, walk
from vitx.tape.weights import joined


class Rule:
    """A propagation rule for attention, which is what distinguishes one method from another.

    Attributes:
        moves: whether attention moves relevance; otherwise, a residual gives all of it to its stream.
        start_layer: the first layer that counts; below, all relevance keeps its place.
        reads_gradient: whether it reads the gradient of A.
        halves: whether a token keeps half of its relevance through the residual if the rows of A sum to 1.
        of_heads: whether the map depends on which dimension holds the heads.
        grows: whether a layer passes on more than it received, as in GAE.
        whole: whether the rule needs all rows of A of a layer together.
        fuse: fuses the heads of tiles into one matrix, if nothing else is read from A and its gradient.
        head_fusion: how to fuse the heads of an attention without a residual: "mean", "max" or "min".
    """

    moves: bool = True
    start_layer: int = 0
    reads_gradient: bool = False
    halves: bool = False
    of_heads: bool = False
    grows: bool = False
    whole: bool = False
    fuse: Fuse | None = None

    def __init__(self, head_fusion: str = "mean") -> None:
        self.head_fusion = head_fusion

    def layer(self, relevance: Tensor, weights: Weights) -> tuple[Tensor | None, Tensor]:
        """Take the relevance of queries, (T, Q), through an attention inside a residual.

        Returns:
            What attended tokens receive, (T, K), if anything, and what attending tokens keep, (T, Q).
        """
        return None, relevance

    def pooling(self, relevance: Tensor, weights: Weights) -> Tensor | None:
        """Do the same without a residual, to (T, K); None: by the mean head, rows summing to 1."""
        if self.head_fusion == "mean":
            return None
        return through_layer(relevance, weights, self.head_fusion, residual=False)[0]


class Placement(Rule):
    """The rule of tokens that keep their place."""

    moves = False


class Propagation:
    """One backward walk of relevance along a tape.

    Attributes:
        lost: how much relevance reached each operator without a rule, as a mean over images.
        grown: what layers passed on beyond what they received, over all images.
    """

    def __init__(self, tape: Tape, rule: Rule, gradients: Walk | None = None) -> None:
        self.lost: dict[str, float] = {}
        self.grown = torch.zeros((), device="cpu")
        self._tape, self._gradients, self._rule = tape, gradients, rule
        sums = [step for step in tape.steps if isinstance(step, Sum)]
        self._skipped = {one for one in sums if one.closes or not rule.moves}  # their streams get everything
        self._layer: dict[Attention, Layer] = {}  # if the share that tokens keep depends on A
        self._entered: dict[Sum, Tensor] = {}  # the relevance of their residuals
        self._heads = Heads(tape)
        for layer in tape.layers_from(rule.start_layer) if rule.moves else []:
            self._skipped -= layer.residuals
            if not (self._rule.halves and all(one.weights.sums_to_1 for one in layer.attentions)):
                self._layer |= dict.fromkeys(layer.attentions, layer)
        self._around = frozenset().union(*(layer.residuals for layer in self._layer.values()))

    def run(self, starts: dict[Value, Tensor], watched: Collection[Value] = ()) -> Walk:
        """Take relevance from some values to the image and to the model's own tokens.

        The result can be differentiated if the relevance requires a gradient.
        """
        with torch.set_grad_enabled(any(one.requires_grad for one in starts.values())):
            return walk(self._tape, starts, self._send, watched=watched)

    def _send(self, step: Step, arrived: list[Tensor]) -> Sent:
        if isinstance(step, Attention):
            return self._attended(step, arrived[0])
        if isinstance(step, Sum) and step in self._around:
            self._entered[step] = arrived[0]
            return step.into_branches(arrived[0])
        if isinstance(step, Sum) and step.stream is not None:
            # A trace also shows the relevance of MLPs, and an operator without a rule is named.
            each = self._tape.named or step.unknown
            if step in self._skipped or (not each and step.returns_to_stream(arrived[0])):
                return [(step.stream, step.to_term(step.stream, arrived[0]))]
        if step.relevance is None:
            size = sum(float(r.abs().sum()) for r in arrived) / self._tape.image.shape[0]
            self.lost[str(step)] = self.lost.get(str(step), 0.0) + size
        return through(step, arrived)

    def _attended(self, step: Attention, r: Tensor) -> Sent:
        layer = self._layer.get(step)
        if layer is None and step.residuals:
            return through(step, [r])
        rows = step.rows(r)
        if layer is None:
            values = self._rule.pooling(rows, step.weights)
            if values is None:
                return through(step, [r])
            self._check_heads(None, [step])
            check_alone(self._tape, step)
            return [(step.inputs[0], step.to_values(values))]
        values, stays = self._rule.layer(rows, self._weights(layer, step))
        sent: list[tuple[Value, Tensor | None]] = []
        if values is not None:
            sent.append((step.inputs[0], step.to_values(values)))
            if self._rule.grows:
                self.grown = self.grown + values.sum()
        for residual in layer.residuals & self._entered.keys() & step.residuals:
            sent += to_stream(self._tape, residual, self._entered[residual], step, ratio(stays, rows))
        return sent

    def _weights(self, layer: Layer, step: Attention) -> Weights:
        """Return A of an attention and all heads parallel to it, with its gradient if that is read."""
        if self._gradients is not None and step in self._gradients.fused:
            self._check_heads(layer, [step])
            return self._gradients.fused[step]
        heads = self._heads.beside(layer, step)
        self._check_heads(layer, heads)
        parts = [one.weights for one in heads]
        if self._rule.whole and len(heads) < len(layer.attentions) and parts[0].shape[2] < parts[0].shape[3]:
            raise VitxError("the rows of an attention are computed in parts: leave out discard_ratio")
        if self._gradients is not None:
            parts = [one.weights.with_gradient(self._gradients.at(one)) for one in heads]
        return joined(parts)

    def _check_heads(self, layer: Layer | None, attentions: Sequence[Attention]) -> None:
        """Raise a VitxError if heads may be windows: no operator showed which dimension holds them."""
        for one in attentions if self._rule.of_heads else []:
            known = one.layout.count("H") > 1
            if one.weights.shape[0] <= self._tape.image.shape[0] or (known and layer is None):
                continue
            why = "no residual shows which tokens its rows belong to"
            if layer is not None:
                rows = self._heads.tokens_of_rows(layer, one)
                why = "several of its rows belong to the same token"
                counts = rows[rows > 0].unique(return_counts=True)[1]
                # If heads are known, a few tokens may be in several windows, such as a class token.
                if (counts == 1).all() or (known and (counts == 1).any()):
                    continue
            raise VitxError(
                f"the heads of an attention cannot be told from windows, as {why}: take rollout with "
                "head_fusion='mean' and no discard_ratio"
            )


class Reading(Propagation):
    """Relevance that no attention moves: it finds how much of the output each row of an attention holds."""

    def __init__(self, tape: Tape, head_fusion: str = "mean") -> None:
        super().__init__(tape, Rule(head_fusion))

    def _send(self, step: Step, arrived: list[Tensor]) -> Sent:
        if isinstance(step, Attention) and step.residuals:
            return []
        if isinstance(step, Sum) and step in self._around:
            assert step.stream is not None
            branches = [pair for pair in step.into_branches(arrived[0]) if pair[0] is not step.stream]
            return [*branches, (step.stream, step.to_term(step.stream, arrived[0]))]
        return super()._send(step, arrived)


def to_stream(
    tape: Tape, residual: Sum, r: Tensor, attention: Attention, shares: Tensor
) -> Iterable[tuple[Value, Tensor]]:
    """Send the share that each row of an attention keeps, (T, Q), to the stream before the attention.

    It is a share of the relevance of the residual, which went into its branches.
    """
    assert residual.stream is not None
    kept = residual.to_term(residual.stream, _kept(tape, residual, r, attention, shares))
    steps = range(attention.index, residual.index)  # the steps that rearrange the stream
    return walk(tape, {residual.stream: kept}, through, steps=steps).arrived.items()


def _kept(tape: Tape, residual: Sum, r: Tensor, attention: Attention, shares: Tensor) -> Tensor:
    """Return the part of its relevance that each element of the sum keeps.

    This is the transpose of the walk from the sum to the rows, which autograd computes, for one of the
    channels that share their relevance. Rows inside another residual, nested in this one, keep it there.
    """

    def around_others(step: Step, arrived: list[Tensor]) -> Sent:
        return [] if step in attention.residuals else through(step, arrived)

    alike = [dim for dim in residual.channels() if r.stride(dim) == 0]
    sizes = [1 if dim in alike else size for dim, size in enumerate(r.shape)]
    with torch.enable_grad():
        ones = torch.ones(sizes, dtype=r.dtype, device=r.device, requires_grad=True)
        sent = residual.into_branches(ones.expand(r.shape))
        starts = {term: part for term, part in sent if part is not None}
        steps = range(attention.index + 1, residual.index)
        arrived = walk(tape, starts, around_others, steps=steps).arrived.get(attention.value)
        if arrived is None or not arrived.requires_grad:
            return torch.zeros_like(r)
        rows = attention.rows(arrived)
        (found,) = torch.autograd.grad((rows * shares).sum(), ones, materialize_grads=True)
    return scaled(r, found * (ones.numel() / r.numel()))

"""Sums, the residuals among them, and the layers of these."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Any

import torch
from torch import Tensor

from vitx.tape.attention import Attention
from vitx.tape.axes import channel_dims
from vitx.tape.expanded import fitted, ratio, scaled
from vitx.tape.terms import Term, stream_of
from vitx.tape.values import Step, Value


class Sum(Step):
    """A sum of live values.

    The term that all others were computed from is the stream; the others are its branches. A branch with an
    attention that the stream did not go through makes it a residual around that attention. A branch without
    one, such as a parallel MLP, holds the same tokens, and the stream stands for both.

    Attributes:
        unknown: the terms whose relevance would reach an operator without a rule.
        whole: whether its terms add up to it, without constants that were added to some of them.
    """

    unknown: Sequence[Value] = ()
    whole: bool = True

    def __init__(self, *step: Any, terms: Sequence[Term]) -> None:
        super().__init__(*step)
        self.relevance = self.back
        self.terms = terms
        self.vias = {term.value: term.via for term in terms if term.via is not None}
        self.stream: Value | None = None
        if len({term.base for term in self.inputs}) > 1:
            self.stream = stream_of(self.inputs)
        passed = frozenset() if self.stream is None else self.stream.open
        others = [] if self.stream is None else [term for term in self.inputs if term is not self.stream]
        self.branches = [term for term in others if term.open - passed]
        # If all combine elements of one value: what each adds up, times its factor.
        self.sizes = [term.factor * term.value.times * term.value.adds for term in terms]
        if len({term.reads for term in self.inputs}) > 1 or any(map(math.isnan, self.sizes)):
            self.sizes = []
        opposed = self.sizes and min(self.sizes) < 0 < max(self.sizes)
        if opposed and not all(term.rearranges >> term.reads & 1 for term in self.inputs):
            self.relevance = None  # one may be taken from the sum of all, which leaves nothing of it
        self.closes: frozenset[Attention] = frozenset().union(*(term.open for term in self.branches)) - passed

    def back(self, arrived: list[Tensor], shares: Sequence[float] | None = None) -> list[Tensor | None]:
        """Take relevance to the terms."""
        pairs = zip(self.inputs, self.apportion(arrived[0], shares or self.shares()), strict=True)
        return [None if part is None else self.to_term(term, part) for term, part in pairs]

    def into_branches(self, r: Tensor) -> Iterable[tuple[Value, Tensor | None]]:
        """Send all relevance to the branches, or to the stream where these are padding."""
        parts = self.parts()
        shares = [parts.get(term, 0.0) for term in self.inputs]
        return zip(self.inputs, self.back([r], shares), strict=True)

    def channels(self) -> list[int]:
        """Return the dimensions that count channels, as in a branch, whose channels come from weights."""
        found = self.outputs[0]
        alike = (one for one in self.inputs if one is not self.stream and one.shape == found.shape)
        return channel_dims(next(alike, found).axes)

    def returns_to_stream(self, r: Tensor) -> bool:
        """Return whether all branches return relevance to its own token in the stream, as an MLP does."""
        stream = self.stream
        if stream is None or self.vias or r.stride(-1):
            return False
        return all((t.tokens, t.shape, t.mass) == (stream.tokens, r.shape, None) for t in self.inputs)

    def shares(self) -> list[float]:
        """Return each term's share of the relevance, if a token keeps half of it through a residual."""
        if not self.branches and any(self.sizes):
            return [abs(size) / sum(map(abs, self.sizes)) for size in self.sizes]
        if not self.branches:
            ahead = [term for term in self._ahead() if term is not self.stream]
            opened = [term.open for term in ahead]
            sizes = _by_heads(ahead, frozenset().union(*opened)) if all(opened) else _fans(ahead)
            whole = sum(sizes.values()) * (1 if self.stream is None else 2)
            return [0.5 if t is self.stream else sizes.get(t, 0) / whole for t in self.inputs]
        parts = self.parts()
        return [0.5 if t is self.stream else parts.get(t, 0.0) / 2 for t in self.inputs]

    def apportion(self, r: Tensor, shares: Sequence[float]) -> list[Tensor | None]:
        """Give each term its share of relevance; where an element of one is padding, the others get more.

        What a branch cannot take goes to the other branches first, and to the stream last.
        """
        masses = [term.mass for term in self.inputs]
        if all(mass is None for mass in masses):
            return [scaled(r, share) if share else None for share in shares]
        inside = [r.new_ones(()) if mass is None else (mass() != 0).to(r) for mass in masses]
        if self.stream is not None and self.stream.mass is not None and (dims := self.channels()):
            # A token of the stream keeps its share if any of its channels are real.
            number = self.inputs.index(self.stream)
            inside[number] = inside[number].expand(r.shape).amax(dims, keepdim=True)
        parts = [share * real for share, real in zip(shares, inside, strict=True)]
        rest = [number for number, term in enumerate(self.inputs) if term is not self.stream]
        due = r.new_tensor([shares[number] for number in rest]).sum()
        held = sum((parts[number] for number in rest), r.new_zeros(()))
        for number in rest:
            parts[number] = parts[number] * ratio(due, held)
        whole = sum(parts, r.new_zeros(()))
        none = whole == 0  # padding in all terms with a share: divide among real elements
        parts = [torch.where(none, real, part) for real, part in zip(inside, parts, strict=True)]
        whole = sum(parts, r.new_zeros(()))
        return [
            scaled(r, torch.where(whole == 0, share, ratio(part, whole)))
            for share, part in zip(shares, parts, strict=True)
        ]

    def to_term(self, term: Value, r: Tensor) -> Tensor:
        """Bring relevance of the sum to the shape of a term."""
        return fitted(self.vias[term](r) if term in self.vias else r, term.shape)

    def parts(self) -> dict[Value, float]:
        """Return each branch's part of the attention's share, by the heads that the branch went through.

        A term that comes from an operator without a rule counts as a branch, too: no sum leaves it out.
        """
        heads = _by_heads(self.branches, self.closes)
        left_out = [t for t in self.unknown if t is not self.stream and not heads.get(t)]
        heads |= dict.fromkeys(left_out, sum(heads.values()) / len(heads))
        return {term: count / sum(heads.values()) for term, count in heads.items()}

    def repeats(self, other: "Sum") -> bool:
        """Return whether it was made from another residual, and adds to that one's stream or a part of it."""
        (own, theirs), made = (self.stream, other.stream), self.outputs[0].made_from(other.outputs[0])
        assert own is not None
        assert theirs is not None
        return made and own.rearranges == theirs.rearranges and own.shape.numel() <= theirs.shape.numel()

    def refuse(self) -> None:
        """Remove the rules."""
        self.relevance = self.gradient = self.stream = None
        self.branches, self.closes = [], frozenset()

    def refuse_within(self, residuals: int) -> None:
        """Remove the rule of a sum that is no residual if it is unknown what its terms count.

        A term without attention may come from later `residuals` than attended terms, and one softmax may be
        divided among the terms.
        """
        attentions = {one for term in self.inputs for one in term.open}
        last = max((one.last_residual for one in attentions), default=0)
        others = [term for term in self.inputs if not term.open]
        later = residuals >> (last + 1) << (last + 1)
        if len(others) < len(self.inputs) and any((t.ancestors | 1 << t.number) & later for t in others):
            self.relevance = None
        sources = [one.inputs[1].reads for one in attentions]
        if len({*sources}) < len(sources) and not all(one.weights.sums_to_1 for one in attentions):
            self.relevance = None

    def _ahead(self) -> list[Value]:
        """Return the terms that count without a residual: attended ones after the same residual, else all."""
        attended = [term for term in self.inputs if any(one.residuals for one in term.open)]
        if self.stream is None and attended and len(attended) < len(self.inputs):
            common = reduce(and_, (term.ancestors for term in self.inputs))
            if all(common >> attention.last_residual & 1 for term in attended for attention in term.open):
                return [term for term in self.inputs if term in attended or term in self.unknown]
        return self.inputs


def _by_heads(terms: Sequence[Value], attentions: frozenset[Attention]) -> dict[Value, float]:
    """Return the number of rows, over the heads of some attentions, that each term holds."""
    heads = dict.fromkeys(terms, 0.0)
    for attention in attentions:
        fans = _fans([term for term in terms if attention in term.open])
        for term, fan in fans.items():
            heads[term] += attention.rows_of_heads * fan / sum(fans.values())
    return heads


def _fans(terms: Sequence[Value]) -> dict[Value, float]:
    """Return how many channels each term adds up if all add up channels of one value, else 1 each."""
    fans = [term.fan or (1, None) for term in terms]
    alike = len({of for _, of in fans}) == 1
    return {term: fan if alike else 1 for term, (fan, _) in zip(terms, fans, strict=True)}


def may_close(value: Value, shape: Sequence[int]) -> bool:
    """Return whether a tensor of this shape may add up a stream and its branches, joined in a value.

    Its size then changed in the dimension that counts them.
    """
    dims = channel_dims(value.along or (), some=True)
    changed = len(shape) != len(value.shape) or any(shape[dim] != value.shape[dim] for dim in dims)
    return bool(value.parts and changed and stream_of(value.parts))


@dataclass(eq=False)
class Layer:
    """The attentions that one residual closes.

    Attributes:
        number: how many layers lead to it: layers that run side by side, as for several images, share one.
        attentions: in the order in which they ran.
        residuals: the sums that close them: more than one if the tokens are added in parts.
    """

    number: int
    attentions: Sequence[Attention]
    residuals: frozenset[Sum]


def layers_of(attentions: Sequence[Attention]) -> list[Layer]:
    """Group the attentions that have a residual in common; those without any belong to no layer."""
    groups: list[tuple[list[Attention], set[Sum]]] = []
    for attention in attentions:
        if attention.residuals:
            members, around = [attention], set(attention.residuals)
            for group in [group for group in groups if group[1] & around]:
                groups.remove(group)
                members, around = group[0] + members, group[1] | around
            groups.append((members, around))
    groups.sort(key=lambda group: group[0][0].value.number)
    found: list[Layer] = []
    for members, around in groups:
        found.append(Layer(count_layers(members[0].value, found), members, frozenset(around)))
    return found


def count_layers(value: Value, layers: Iterable[Layer]) -> int:
    """Return how many layers one after another lead to a value."""
    before = value.ancestors | 1 << value.number
    closed = (n for n in layers if any(before >> one.outputs[0].number & 1 for one in n.residuals))
    return max((layer.number + 1 for layer in closed), default=0)

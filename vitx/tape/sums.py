"""A sum, whose terms are found through sums of sums, and the residual that it may be."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitx.tape.expanded import fitted, over, scaled
from vitx.tape.values import Step, Value, Via, after

if TYPE_CHECKING:
    from vitx.tape.attention import Attention


class Sum(Step):
    """A sum of live values.

    The term that all others were made from is the stream, the others are its branches. A branch with an
    attention that the stream did not pass makes it a residual around that attention; a branch without one,
    as an MLP beside it, holds the same tokens, and the stream stands for both.

    Attributes:
        inputs: its terms.
        stream: the term that all others were made from; None: there is none.
        branches: the terms with attentions that the stream did not pass.
        closes: these attentions.
        vias: takes what a term gets to its shape, where this is another one.
    """

    def __init__(self, *step: Any, vias: dict[Value, Via]) -> None:
        """Describes a sum by its terms."""
        super().__init__(*step)
        self.relevance = self.back
        self.stream = stream_of(self.inputs) if len({term.base for term in self.inputs}) > 1 else None
        self.branches: list[Value] = []
        self.vias = vias
        self.closes: frozenset[Attention] = frozenset()
        if self.stream is not None:
            passed = self.stream.open
            self.branches = [term for term in self.inputs if term is not self.stream and term.open - passed]
            self.closes = self.closes.union(*(term.open - passed for term in self.branches))

    def back(self, arrived: list[Tensor], shares: Sequence[float] | None = None) -> list[Tensor | None]:
        """Takes relevance to the terms."""
        pairs = zip(self.inputs, self.apportion(arrived[0], shares or self.shares()), strict=True)
        return [None if part is None else self.to_term(term, part) for term, part in pairs]

    def shares(self) -> list[float]:
        """Returns what share of its relevance each term gets, if a token keeps half of it by a residual."""
        if not self.branches:
            ahead = self._ahead()
            sizes = _by_heads(ahead, frozenset()) if all(term.open for term in ahead) else _fans(ahead)
            return [sizes.get(term, 0) / sum(sizes.values()) for term in self.inputs]
        parts = self.parts()
        return [0.5 if t is self.stream else parts.get(t, 0.0) / 2 for t in self.inputs]

    def apportion(self, r: Tensor, shares: Sequence[float]) -> list[Tensor | None]:
        """Gives each term its share of relevance; where an element of one is padding, others have more."""
        masses = [term.mass for term in self.inputs]
        if all(mass is None for mass in masses):
            return [scaled(r, share) if share else None for share in shares]
        inside = [r.new_ones(()) if mass is None else (mass() != 0).to(r) for mass in masses]
        parts = [share * real for share, real in zip(shares, inside, strict=True)]
        whole = sum(parts, r.new_zeros(()))
        none = whole == 0  # padding in all that count: among those that are real
        parts = [torch.where(none, real, part) for real, part in zip(inside, parts, strict=True)]
        whole = sum(parts, r.new_zeros(()))
        return [
            scaled(r, torch.where(whole == 0, share, over(part, whole)))
            for share, part in zip(shares, parts, strict=True)
        ]

    def to_term(self, term: Value, r: Tensor) -> Tensor:
        """Brings relevance of the sum to the shape of a term."""
        return fitted(self.vias[term](r) if term in self.vias else r, term.shape)

    def parts(self) -> dict[Value, float]:
        """Returns what part of the attention's share each branch gets, by the heads that it passed."""
        passed = self.stream.open if self.stream is not None else frozenset()
        heads = _by_heads(self.branches, passed)
        return {term: count / sum(heads.values()) for term, count in heads.items()}

    def _ahead(self) -> list[Value]:
        """Returns the terms that count without a residual: those with attentions of one origin, or all."""
        attended = [term for term in self.inputs if term.open]
        if self.stream is None and attended and len(attended) < len(self.inputs):
            common = self.inputs[0].above
            for term in self.inputs:
                common &= term.above
            origins = {attention.origin for term in attended for attention in term.open}
            if all(common >> origin & 1 for origin in origins):
                return attended
        return self.inputs


def _by_heads(terms: Sequence[Value], passed: frozenset["Attention"]) -> dict[Value, float]:
    """Returns how many heads' rows each term has of the attentions that it passed, and others did not."""
    heads = dict.fromkeys(terms, 0.0)
    for attention in frozenset().union(*(term.open for term in terms)) - passed:
        fans = _fans([term for term in terms if attention in term.open])
        for term, fan in fans.items():
            heads[term] += attention.rows_of_heads * fan / sum(fans.values())
    return heads


def _fans(terms: Sequence[Value]) -> dict[Value, float]:
    """Returns how many channels each term adds up, if all add up channels of one value; else 1."""
    fans = [term.fan for term in terms]
    if len({None if fan is None else fan[1] for fan in fans}) > 1:
        return dict.fromkeys(terms, 1)
    return {term: 1 if fan is None else fan[0] for term, fan in zip(terms, fans, strict=True)}


def terms_of(values: Sequence[Value]) -> dict[Value, Via | None]:
    """Returns the terms of a sum, with what brings relevance to their shapes, where these are others."""
    terms: dict[Value, Via | None] = {}
    for place, value in enumerate(values):
        inner = value.sum
        if inner is not None and _opens(inner, value, [*values[:place], *values[place + 1 :]]):
            new = [term for term in inner.inputs if term not in terms]
            terms |= {term: after(value.via, inner.vias.get(term)) for term in new}
        else:
            terms.setdefault(value, None)
    return terms


def _opens(inner: Sum, value: Value, others: Sequence[Value]) -> bool:
    """Returns whether the terms of a sum are terms of another one, with others: none was made from the sum.

    A residual is opened only if its stream is that of all the terms: else it is a layer of its own.
    """
    stream = inner.stream
    if any(other.made_from(value) for other in others):
        return False
    if stream is not None and not all(other.made_from(stream) for other in others):
        return False
    return value.via is None or all(term.mass is None for term in inner.inputs)


def stream_of(terms: Sequence[Value]) -> Value | None:
    """Returns the term that all others were made from."""
    for term in terms:
        others = [other for other in terms if other is not term]
        if others and all(other.made_from(term) and other.roots & ~term.roots for other in others):
            return term
    return None

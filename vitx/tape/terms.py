"""The terms of a sum, found through nested sums and through earlier ones."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from vitx.tape.values import Value, Via, after

Weighted = tuple[Value, float | Tensor]  # a value and its factor

_CANCELED = 1e-12


class Term(NamedTuple):
    """A term of a sum.

    Attributes:
        value: the value that is added up.
        via: takes its relevance to its shape, if the sum has another one.
        factor: its factor in the sum; NaN if that is not a single number.
    """

    value: Value
    via: Via | None
    factor: float


def terms_of(summands: Sequence[Weighted]) -> tuple[list[Term], set[Any], bool]:
    """Return the terms of a sum, the sums that were replaced by theirs, and whether these had no constants.

    A sum is replaced unless another term was computed from it; a residual only if its stream is that of all
    the terms: otherwise, it is a layer of its own.
    """
    terms = _given(summands)
    opened, whole = set[Any](), True
    while (number := next((n for n in range(len(terms)) if _opens(terms, n)), None)) is not None:
        value, via, factor = terms[number]
        inner, via, factor = value.sum, after(via, value.via), factor * value.times
        whole = whole and _is_whole(value, inner)
        parts = [Term(one.value, after(via, one.via), factor * one.factor) for one in inner.terms]
        terms = merged([*terms[:number], *parts, *terms[number + 1 :]])
        opened.add(inner)
    return terms, opened, whole


def _given(summands: Sequence[Weighted]) -> list[Term]:
    return merged([Term(value, None, as_number(factor)) for value, factor in summands])


def added_anew(
    summands: Sequence[Weighted], residuals: Iterable[Value]
) -> tuple[list[Term], set[Any]] | None:
    """Find an earlier residual in a sum that adds up its terms anew, as in e + a + m, with m from e + a.

    Args:
        summands: what the sum adds up, with factors.
        residuals: those that may be among them, the last one first.

    Returns:
        The terms with the residual, and the sums that it replaces; None if there is none.
    """
    terms = _given(summands)
    stream = stream_of([term.value for term in terms])
    if len(terms) < 3 and not any(term.value.sum for term in terms if term.value is not stream):
        return None
    whole, inside = _leaves(terms)
    for residual in residuals:
        if stream is not None and residual.base == stream.base:
            break
        own, within = _leaves(residual.sum.terms)
        factors = [_ratio(whole[key], term) for key, term in own.items() if key in whole]
        alike = len(factors) == len(own) and all(abs(one / factors[0] - 1) <= _CANCELED for one in factors)
        rest = [term for key, term in whole.items() if key not in own]
        alike = alike and not any(math.isnan(term.factor) for term in rest)
        if alike and rest and all(term.value.made_from(residual) for term in rest):
            known = Term(residual, None, factors[0] / residual.times)
            return [known, *rest], inside - within
    return None


def _leaves(terms: Sequence[Term]) -> tuple[dict[Any, Term], set[Any]]:
    """Return the terms after all sums among them were replaced by theirs, and these sums."""
    found, inside, left = [], set[Any](), [*terms]
    while left:
        value, via, factor = term = left.pop()
        inner = value.sum
        if inner is None or via or value.via or not _is_whole(value, inner):
            found.append(term)
        else:
            inside.add(inner)
            left += [one._replace(factor=one.factor * factor * value.times) for one in inner.terms]
    return {_multiple(term): term for term in merged(found)}, inside


def _is_whole(value: Value, inner: Any) -> bool:
    """Return whether a value is a multiple of the terms of its sum, to which no constant was added."""
    return bool(value.base == inner.outputs[0].base and inner.whole)


def _opens(terms: Sequence[Term], number: int) -> bool:
    """Return whether a term is a sum that is replaced by its own terms."""
    (value, via, _), others = terms[number], [term.value for n, term in enumerate(terms) if n != number]
    inner, stream = value.sum, value.sum and value.sum.stream
    if inner is None or any(other.made_from(value) for other in others):
        return False
    if stream and not all(o.made_from(stream) or o.rearranges == stream.rearranges for o in others):
        return False
    return not ((via or value.via) and any(term.mass for term in inner.inputs))


def merged(terms: Sequence[Term]) -> list[Term]:
    """Return terms of which multiples of one value are one; those that add up to 0 are left out."""
    groups: dict[Any, list[Term]] = {}
    for term in terms:
        groups.setdefault(_multiple(term), []).append(term)
    found = []
    for first, *more in groups.values():
        if not more and first.factor:
            found.append(first)
            continue
        whole = sum(map(_size, (first, *more)))
        if not abs(whole) <= _CANCELED:
            found.append(first._replace(factor=whole / first.value.times))
    return found


def _multiple(term: Term) -> Any:
    """Return what terms have in common that are multiples of one value."""
    value = term.value
    return (value.base, value.shape, value.mass) if value.proportional and term.via is None else value


def _ratio(one: Term, other: Term) -> float:
    """Return how many times another multiple of the same value a term is."""
    if one.value is other.value:
        return one.factor / other.factor
    return _size(one) / _size(other)


def _size(term: Term) -> float:
    """Return the factor of what a term is a multiple of."""
    return term.factor * term.value.times


def as_number(factor: float | Tensor) -> float:
    """Return a factor; NaN if it is a tensor."""
    return math.nan if isinstance(factor, Tensor) else factor


def stream_of(terms: Sequence[Value]) -> Value | None:
    """Return the term that all others were computed from; None if there is none."""
    for term in terms:
        others = [other for other in terms if other is not term]
        if others and all(other.made_from(term) and _differs(other, term) for other in others):
            return term
    return None


def _differs(one: Value, other: Value) -> bool:
    """Return whether a value is more than a rearrangement of another one, up to factors that are known."""
    return bool(one.rearranges & ~other.rearranges or math.isnan(one.times))

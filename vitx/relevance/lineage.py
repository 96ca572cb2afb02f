"""What a tensor came from: enough to tell a residual from any other sum."""

from collections.abc import Iterable
from itertools import count
from typing import Any, Literal, NamedTuple

Kind = Literal["weights", "scores", "gate"]
_KINDS: tuple[Kind, ...] = ("weights", "scores", "gate")
_fresh = count()


class Lineage(NamedTuple):
    """Where a live tensor stands in the forward pass.

    Attributes:
        identity: a number that shape operations, casts, dropout and constants leave as it is; of what was
            joined, those of all its parts.
        ancestors: the identities that it came from since the last residual closed.
        open: the attentions that it passed since then.
        kind: "scores" for a product of two live tensors, "weights" for what a softmax or its like made of
            such, "gate" for a softmax of anything else; None for what is none of these.
        partial: whether some of its tokens did not pass the last of these attentions.
    """

    identity: frozenset[int]
    ancestors: frozenset[int] = frozenset()
    open: frozenset[Any] = frozenset()
    kind: Kind | None = None
    partial: bool = False


def begun() -> Lineage:
    """Returns the lineage of what came from nothing that was seen, as the image."""
    return Lineage(_new())


def _new() -> frozenset[int]:
    return frozenset((next(_fresh),))


def joined(parents: Iterable[Lineage]) -> Lineage:
    """Returns the lineage of what holds several tensors, and nothing else that came from the image."""
    parents = list(parents)
    return derived(parents)._replace(identity=frozenset().union(*(parent.identity for parent in parents)))


def derived(parents: Iterable[Lineage]) -> Lineage:
    """Returns the lineage of what a call made of its live inputs."""
    parents = list(parents)
    if len(parents) == 1:
        (one,) = parents
        return Lineage(_new(), one.ancestors | one.identity, one.open, one.kind, one.partial)
    kinds = {parent.kind for parent in parents}
    kind = next((kind for kind in _KINDS if kind in kinds), None)
    return Lineage(
        _new(),
        ancestors=frozenset().union(*(parent.ancestors | parent.identity for parent in parents)),
        open=frozenset().union(*(parent.open for parent in parents)),
        kind=kind,
        partial=any(parent.partial for parent in parents),
    )


class Sum(NamedTuple):
    """What share of the relevance of a sum goes to each of its two summands.

    Attributes:
        shares: by the rules of the rollouts; of no use where it is a residual around attention.
        places: where only the place of a token is asked for: a residual gives all to the stream.
        residual: whether it is one.
        around: the attentions that it is one around.
    """

    shares: tuple[float, float]
    places: tuple[float, float]
    residual: bool = False
    around: frozenset[Any] = frozenset()


def added(first: Lineage, second: Lineage) -> tuple[Lineage, Sum]:
    """Returns the lineage of a sum, and how its relevance is shared.

    Of two branches off the same stream, one through an attention, that one gets all. Any other sum is halved.
    """
    merged = derived((first, second))
    stream = first.identity <= second.ancestors
    if stream or second.identity <= first.ancestors:
        within = first.open ^ second.open
        closed = merged._replace(ancestors=frozenset(), open=first.open & second.open, partial=False)
        return closed, Sum((0.5, 0.5), (1.0, 0.0) if stream else (0.0, 1.0), True, within)
    shares = (0.5, 0.5)
    if first.ancestors & second.ancestors:
        ahead, behind = bool(first.open - second.open), bool(second.open - first.open)
        if ahead != behind:
            shares = (1.0, 0.0) if ahead else (0.0, 1.0)
    return merged, Sum(shares, shares)

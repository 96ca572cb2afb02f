"""A residual around attention: what its tokens keep of their relevance, and what goes on through the branch.

Where what a token keeps does not depend on A, the residual gives it to the stream at once: half of it in a
rollout by the mean of the heads. Elsewhere the stream gets all, and the attention takes back, by way of its
queries, what the token does not keep. That is right if what a query asked for is put out at its own token,
and not at another one's, as where the queries of all windows are the same: so it is tried beforehand.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitx.relevance.rules import spread

if TYPE_CHECKING:
    from vitx.relevance.attending import Attended, Attending

_TOLERANCE = 1e-3  # of what comes back
_IRRATIONAL = (5**0.5 - 1) / 2


class Residual:
    """The sum of a stream and a branch off it that went through attention.

    Attributes:
        calls: the attentions of the branch.
        stream: the shadow of the stream.
        branch: that of the branch, in the shape of the sum's own.
        partial: whether some tokens of the branch came past the attentions.
        passed: what share of each element of the branch came through them; 1 until it was tried.
        home: whether what they put out comes home, (); None until it was tried.
    """

    def __init__(self, calls: Sequence["Attending"], stream: Tensor, branch: Tensor, partial: bool) -> None:
        """Describes a sum."""
        self.calls, self.stream, self.branch, self.partial = calls, stream, branch, partial
        self.passed: Tensor | float = 1.0
        self.home: Tensor | None = None

    @property
    def kept(self) -> float | None:
        """What share a token keeps; None if that depends on A, so that the attentions give back."""
        found = {call.keeps for call in self.calls}
        return found.pop() if len(found) == 1 else None

    @property
    def matters(self) -> bool:
        """Whether it matters that what the attentions put out comes home."""
        return self.partial or self.kept is None

    def shares(self, relevance: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what stream and branch get.

        A token of the branch that came past the attention is one of two summands, which get a half each.
        """
        kept = 1.0 if self.kept is None else self.kept
        if not self.partial:
            return relevance if kept == 1 else relevance * kept, relevance
        through, past = relevance * self.passed, relevance * (1 - self.passed) / 2
        return through * kept + past, through + past

    def try_with(self, attended: Sequence["Attended"]) -> None:
        """Marks what the queries of each attention ask for, and looks where it comes back.

        Args:
            attended: the attentions of the branch.
        """
        shares, home = zip(*[self._share_through(one) for one in attended], strict=True)
        self.passed, self.home = torch.stack(shares).sum(0), torch.stack(home).all()

    def _share_through(self, attended: "Attended") -> tuple[Tensor, Tensor]:
        """Returns what share of each element came through an attention, and whether that comes home."""
        batch, queries = attended.weights.shape[0], attended.weights.shape[2]
        marks = torch.arange(batch * queries, device=self.stream.device, dtype=self.stream.dtype)
        marks = marks.mul_(_IRRATIONAL).frac_().add_(0.5).view(batch, queries)  # all of them differ
        read = self._at_queries(attended, torch.ones_like(self.branch))
        marks = marks.masked_fill_(read == 0, 0)  # as of the padding of a window
        asked = _arriving(attended.weights, self.stream, spread(marks, attended.weights.shape))
        asked = asked.expand(self.branch.shape) * (asked.numel() / self.branch.numel())
        back = self._at_queries(attended, asked)
        share = back.sum() / marks.sum().clamp(min=_TOLERANCE)
        whole = torch.isclose(asked.sum(), marks.sum(), rtol=_TOLERANCE)
        return share * (asked != 0), whole & torch.isclose(back, share * marks, rtol=_TOLERANCE).all()

    def _at_queries(self, attended: "Attended", relevance: Tensor) -> Tensor:
        return _arriving(self.branch, attended.shadow, relevance).sum((1, 3))


def _arriving(end: Tensor, begin: Tensor, relevance: Tensor) -> Tensor:
    """Takes relevance from one shadow to another."""
    (found,) = torch.autograd.grad(end, begin, relevance, retain_graph=True, allow_unused=True)
    return torch.zeros_like(begin) if found is None else found

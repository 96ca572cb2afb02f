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
        marks = self._marks(attended.values) + self._marks(attended.weights)
        at_queries = _arriving(self.branch, attended.shadow, marks).sum((1, 3))
        home = self._on_branch(attended.weights, at_queries)
        passed = home / marks.clamp(min=1e-30)
        through = passed > _TOLERANCE
        share = home.sum() / (marks * through).sum().clamp(min=1e-30)
        whole = torch.isclose(home.sum(), at_queries.sum(), rtol=_TOLERANCE)
        return passed, whole & (torch.isclose(passed, share, rtol=_TOLERANCE) | ~through).all()

    def _marks(self, shadow: Tensor) -> Tensor:
        """Gives each token that an attention reads, or asks for, a number of its own."""
        batch, tokens = shadow.shape[0], shadow.shape[2]
        numbers = torch.arange(batch * tokens, device=shadow.device, dtype=shadow.dtype)
        return self._on_branch(shadow, numbers.mul_(_IRRATIONAL).frac_().add_(0.5).view(batch, tokens))

    def _on_branch(self, shadow: Tensor, of_tokens: Tensor) -> Tensor:
        """Takes what tokens of an attention have, (B, N), to those of the stream, and so of the branch."""
        found = _arriving(shadow, self.stream, spread(of_tokens, shadow.shape))
        return found.expand(self.branch.shape) * (found.numel() / self.branch.numel())


def _arriving(end: Tensor, begin: Tensor, relevance: Tensor) -> Tensor:
    """Takes relevance from one shadow to another."""
    (found,) = torch.autograd.grad(end, begin, relevance, retain_graph=True, allow_unused=True)
    return torch.zeros_like(begin) if found is None else found

"""A of one attention, computed when it is asked for, in tiles."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitx.functional.fusing import carry
from vitx.functional.tiles import ALL, Cut, Part, Tile, full, is_zero, split
from vitx.models.isolation import without_autocast


@dataclass(eq=False)
class Weights:
    """A of one attention, (B, H, Q, K): B images or windows, H heads, Q queries, K keys.

    Attributes:
        dtype: of the tiles: float32, or float64 in a float64 model.
        sums_to_1: whether each row of A does.
        compute: computes A of some images, heads and rows.
        compute_gradient: computes the gradient of A; None where it is not known.
        differentiate: makes what computes it, from the gradient of A V.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    sums_to_1: bool
    compute: Part
    compute_gradient: Part | None = None
    differentiate: Callable[[Tensor], Part] | None = None

    @classmethod
    def of(cls, weights: Tensor, gradient: Tensor | None = None) -> "Weights":
        """Describes a tensor, (B, H, Q, K), and its gradient."""
        whole, known = full(weights.detach()), None
        if gradient is not None:
            known = full(gradient.detach()).__getitem__
        return cls(tuple(whole.shape), whole.dtype, whole.device, False, whole.__getitem__, known)

    def with_gradient(self, of_output: Tensor) -> "Weights":
        """Returns the same with the gradient of A, from that of A V."""
        assert self.differentiate is not None
        return replace(self, compute_gradient=self.differentiate(of_output))

    def without(self, tokens: Tensor) -> "Weights":
        """Returns the same without the columns of some tokens, (B, K) bool; rows keep their sums.

        A row that has nothing else stays as it is.
        """

        def compute(part: Cut) -> Tensor:
            whole = self.compute(part)
            left = whole.masked_fill(tokens[part[0], None, None], 0)
            share, rest = whole.sum(-1, keepdim=True), left.sum(-1, keepdim=True)
            return torch.where(rest == 0, whole, left * (share / torch.where(rest == 0, 1, rest)))

        return replace(self, compute=compute)

    def tiles(self, rows: slice = ALL) -> Iterator[Tile]:
        """Divides A, or some of its rows."""
        for part in split(self.shape, self.device, rows):
            yield Tile(*part, self.shape[1], self.compute, self.compute_gradient)

    def add_up(self, part: Callable[[Tile], Tensor | None], rows: slice = ALL) -> Tensor:
        """Adds up what a function makes of each tile for the tokens that are attended to, (b, K)."""
        found = torch.zeros(self.shape[0], self.shape[3], dtype=self.dtype, device=self.device)
        for tile in self.tiles(rows):
            more = part(tile)
            if more is not None:
                found[tile.images] += more
        return found

    def carry(self, relevance: Tensor, heads: Callable[[Tile], Tensor] = lambda tile: tile.weights) -> Tensor:
        """Takes the relevance of queries, (B, Q), through the sum of what a function makes of the heads."""

        def carried(tile: Tile) -> Tensor | None:
            part = relevance[tile.images][:, tile.rows]
            return None if is_zero(part) else carry(part, heads(tile))

        return self.add_up(carried)

    def matrix(self) -> Tensor:
        """Computes A as a whole."""
        return self._whole(lambda tile: tile.weights)

    def gradient(self, of_output: Tensor) -> Tensor:
        """Computes the gradient of A as a whole, from that of A V."""
        return self.with_gradient(of_output)._whole(lambda tile: tile.gradient)

    def _whole(self, read: Callable[[Tile], Tensor]) -> Tensor:
        found = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        with torch.no_grad(), without_autocast(self.device):
            for tile in self.tiles():
                found[tile.images, tile.heads, tile.rows] = read(tile)
        return found

    def shared(self, rows: Tensor) -> Tensor:
        """Does as `transposed`, with rows of A whose absolute values are scaled to sum to 1."""
        return self.transposed(rows, scaled=not self.sums_to_1)

    def transposed(self, rows: Tensor, *, scaled: bool = False) -> Tensor:
        """Multiplies A^T by what the rows have, (B, H, Q, d); returns (B, H, K, d)."""
        rows = full(rows)
        found = rows.new_zeros(*self.shape[:2], self.shape[3], rows.shape[3])
        for tile in self.tiles():
            part = rows[tile.images, tile.heads, tile.rows]
            if is_zero(part):
                continue
            weights = tile.weights
            if scaled:
                weights = weights.abs()
                size = weights.sum(-1, keepdim=True)
                part = part / torch.where(size == 0, 1, size)
            found[tile.images, tile.heads] += (part.mT @ weights).mT
        return found

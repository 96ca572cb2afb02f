"""The weights A of an attention, computed on demand, in tiles."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor

from vitx.functional.tiles import ALL, Cut, Part, Tile, full, is_zero, split
from vitx.models.isolation import without_autocast

_ROUNDED = 1e-4  # what rows that sum to 1 may lack
Read = Callable[[Tile], Tensor]
_weights: Read = attrgetter("weights")
Fuse = Callable[[Iterable[Tile]], Iterable[tuple[slice, slice, Tensor]]]


@dataclass(eq=False)
class Weights:
    """The weights A of an attention, (B, H, Q, K): B images or windows, H heads, Q queries, K keys.

    Attributes:
        dtype: the dtype of the tiles: float32, or float64 in a float64 model.
        normalized: whether each row of A sums to 1; as a tensor, it is only read if needed.
        compute: computes A for some images, heads and rows.
        compute_gradient: computes the gradient with respect to A; None if it is not known.
        differentiate: returns `compute_gradient`, given the gradient with respect to A V.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    normalized: bool | Tensor
    compute: Part
    compute_gradient: Part | None = None
    differentiate: Callable[[Tensor], Part] | None = None

    @classmethod
    def of(cls, weights: Tensor, gradient: Tensor | None = None) -> "Weights":
        """Wrap a tensor, (B, H, Q, K), and its gradient."""
        whole, known = full(weights.detach()), None
        if gradient is not None:
            known = full(gradient.detach()).__getitem__
        return cls(tuple(whole.shape), whole.dtype, whole.device, False, whole.__getitem__, known)

    @property
    def sums_to_1(self) -> bool:
        """True if each row of A sums to 1."""
        known = self.normalized
        return known.is_meta or bool(known) if isinstance(known, Tensor) else known

    def with_gradient(self, of_output: Tensor) -> "Weights":
        """Return a copy that has the gradient with respect to A, computed from that with respect to A V."""
        assert self.differentiate is not None
        return replace(self, compute_gradient=self.differentiate(of_output))

    def only(self, keys: Tensor) -> "Weights":
        """Set the columns of other keys, (B, 1, 1, K) bool, to 0."""
        if keys.all():
            return self
        kept = replace(self, compute=lambda part: self.compute(part) * keys[part[0]], normalized=False)
        sums = (tile.weights.sum(-1) for tile in kept.tiles())
        return replace(
            kept, normalized=self.sums_to_1 and all(bool((one > 1 - _ROUNDED).all()) for one in sums)
        )

    def without(self, tokens: Tensor) -> "Weights":
        """Drop some columns, (B, K) bool, from all rows that have other entries; rows keep their sums."""

        def compute(part: Cut) -> Tensor:
            whole = self.compute(part)
            left = whole.masked_fill(tokens[part[0], None, None], 0)
            share, rest = whole.sum(-1, keepdim=True), left.sum(-1, keepdim=True)
            return torch.where(rest == 0, whole, left * (share / torch.where(rest == 0, 1, rest)))

        return replace(self, compute=compute)

    def tiles(self, rows: slice = ALL) -> Iterator[Tile]:
        """Yield the tiles of A, or of some of its rows."""
        for part in split(self.shape, self.device, rows):
            yield Tile(*part, self.shape[1], self.compute, self.compute_gradient)

    def add_up(self, part: Read, rows: slice = ALL) -> Tensor:
        """Sum over the tiles the values that `part` computes for the keys, (b, K), and return (B, K)."""
        found = torch.zeros(self.shape[0], self.shape[3], dtype=self.dtype, device=self.device)
        for tile in self.tiles(rows):
            found[tile.images] += part(tile)
        return found

    def carry(self, relevance: Tensor, read: Read = _weights) -> Tensor:
        """Carry the relevance of queries, (B, Q), through the sum over heads of what `read` returns."""
        rows = relevance[:, None, :, None].expand(-1, self.shape[1], -1, -1)
        return self.transposed(rows, read).sum(1)[..., 0]

    def shared(self, rows: Tensor) -> Tensor:
        """Apply `transposed` with |A|, whose rows are normalized to sum to 1."""
        return self.transposed(rows) if self.sums_to_1 else self.transposed(rows, _shares)

    def transposed(self, rows: Tensor, read: Read = _weights) -> Tensor:
        """Multiply A^T, or the transpose of what `read` returns, by (B, H, Q, d), and return (B, H, K, d)."""
        rows = full(rows)
        found = rows.new_zeros(*self.shape[:2], self.shape[3], rows.shape[3])
        for tile in self.tiles():
            part = rows[tile.images, tile.heads, tile.rows]
            if not is_zero(part):
                weights = read(tile).to(rows)
                weights = weights.clone() if rows.requires_grad else weights  # a tile is overwritten
                found[tile.images, tile.heads] += (part.mT @ weights).mT
        return found

    def matrix(self) -> Tensor:
        """Compute all of A."""
        return self._whole(_weights)

    def gradient(self, of_output: Tensor) -> Tensor:
        """Compute the gradient with respect to all of A, from that with respect to A V."""
        return self.with_gradient(of_output)._whole(lambda tile: tile.gradient)

    def _whole(self, read: Read) -> Tensor:
        found = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        with torch.no_grad(), without_autocast(self.device):
            for tile in self.tiles():
                found[tile.images, tile.heads, tile.rows] = read(tile)
        return found

    def fused_gradient(self, of_output: Tensor, fuse: Fuse) -> tuple[Tensor, "Weights"]:
        """Compute the gradient of the values and fuse the heads in a single pass over A.

        Args:
            of_output: the gradient with respect to A V, (B, H, Q, d).
            fuse: fuses the heads of A and its gradient into one matrix, (b, n, K).

        Returns:
            The gradient with respect to V, (B, H, K, d), and the fused matrix as weights, clamped to >= 0.
        """
        rows = full(of_output)
        of_values = rows.new_zeros(*self.shape[:2], self.shape[3], rows.shape[3])
        matrix = rows.new_empty(self.shape[0], 1, *self.shape[2:])

        def tiles() -> Iterator[Tile]:
            for tile in self.with_gradient(rows).tiles():
                part = rows[tile.images, tile.heads, tile.rows]
                of_values[tile.images, tile.heads] += (part.mT @ tile.weights).mT
                yield tile

        for images, some, part in fuse(tiles()):
            matrix[images, 0, some] = part.relu_()
        return of_values, Weights.of(matrix)


def _shares(tile: Tile) -> Tensor:
    """Return |A|, with its rows normalized to sum to 1."""
    weights = tile.weights.abs()
    size = weights.sum(-1, keepdim=True)
    return weights / torch.where(size == 0, 1, size)

"""How an attention lies in its tensors: which dimensions are images or windows, heads, queries and keys."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Equation:
    """An einsum of two operands, a letter for each dimension."""

    left: str
    right: str
    out: str

    def swapped(self) -> "Equation":
        """Returns the same with the operands the other way round."""
        return Equation(self.right, self.left, self.out)


@dataclass(frozen=True)
class Layout:
    """Brings the operands of an attention into the order (B, H, N, d), and its output back.

    Attributes:
        order_weights: the dimensions of A: those that it shares with the values, queries, keys.
        order_values: the dimensions of the values: shared, keys, channels.
        order_output: the dimensions of the output: shared, queries, channels.
        shared: the sizes of the shared dimensions.
        queries: the sizes of those of the queries.
        channels: the sizes of those of the channels.
        split: sizes into which the shared dimensions are laid, one of them the heads.
        head: which of these; None: not known, and each head counts for itself.
    """

    order_weights: tuple[int, ...]
    order_values: tuple[int, ...]
    order_output: tuple[int, ...]
    shared: tuple[int, ...]
    queries: tuple[int, ...]
    channels: tuple[int, ...]
    split: tuple[int, ...]
    head: int | None

    @classmethod
    def of_attention(cls, query: Sequence[int], channels: int, batch: int) -> "Layout":
        """Of `scaled_dot_product_attention`: whatever comes before the last two dimensions is shared."""
        dims, shared = tuple(range(len(query))), tuple(query[:-2])
        split, head = _default(shared, batch)
        return cls(dims, dims, dims, shared, tuple(query[-2:-1]), (channels,), split, head)

    @classmethod
    def of_product(
        cls, weights: Sequence[int], values: Sequence[int], equation: Equation | None, batch: int
    ) -> "Layout | None":
        """Of A times the values, by `matmul` or by an equation; None if that is no attention."""
        if equation is None:
            if len(weights) != len(values) or tuple(weights[:-2]) != tuple(values[:-2]):
                return None
            lead = "abcdefgh"[: len(weights) - 2]
            equation = Equation(lead + "xy", lead + "yz", lead + "xz")
        left, right, out = equation.left, equation.right, equation.out
        shared = [c for c in left if c in right and c in out]
        queries = [c for c in left if c in out and c not in right]
        keys = [c for c in left if c in right and c not in out]
        channels = [c for c in right if c in out and c not in left]
        complete = len(shared + queries + keys) == len(left)
        if len(keys) != 1 or not complete or sorted(out) != sorted(shared + queries + channels):
            return None
        sizes = dict(zip(left, weights, strict=True)) | dict(zip(right, values, strict=True))
        if len(shared) == 2 and sizes[shared[0]] % batch:  # heads first
            shared.reverse()
        together = tuple(sizes[c] for c in shared)
        split, head = _default(together, batch)
        return cls(
            tuple(left.index(c) for c in shared + queries + keys),
            tuple(right.index(c) for c in shared + keys + channels),
            tuple(out.index(c) for c in shared + queries + channels),
            together,
            tuple(sizes[c] for c in queries),
            tuple(sizes[c] for c in channels),
            split,
            head,
        )

    def with_heads(self, of_tokens: Callable[[Tensor], Tensor]) -> "Layout":
        """Finds the heads among the shared dimensions: those along which the tokens are the same.

        Args:
            of_tokens: from a number for each place among the shared dimensions, (places,), to the sum of the
                numbers of those places that hold a token, for each token.
        """
        places = math.prod(self.shared)
        marks = torch.rand(places, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = of_tokens(marks).unique()
        for split, head in _ways(self.shared):
            sums = marks.view(split).sum(head).flatten().unique()
            if len(sums) <= len(found) and _each_in(found[found > 0], sums):
                return replace(self, split=split, head=head)
        return self

    def weights(self, tensor: Tensor) -> Tensor:
        """Brings A, or what has its shape, to (B, H, Q, K)."""
        return self._grouped(tensor.permute(self.order_weights), len(self.queries))

    def values(self, tensor: Tensor) -> Tensor:
        """Brings the values to (B, H, K, d)."""
        return self._grouped(tensor.permute(self.order_values), 1)

    operands = values  # queries and keys lie as the values do

    def outputs(self, tensor: Tensor) -> Tensor:
        """Brings the output to (B, H, Q, d)."""
        return self._grouped(tensor.permute(self.order_output), len(self.queries))

    def output(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """Brings (B, H, Q, d) back to the output's own shape."""
        if self.head is not None:
            others = [size for dim, size in enumerate(self.split) if dim != self.head]
            heads = self.split[self.head]
            tensor = tensor.reshape(*others, heads, *tensor.shape[2:]).movedim(len(others), self.head)
        whole = tensor.reshape(*self.shared, *self.queries, *self.channels)
        back = [self.order_output.index(dim) for dim in range(len(self.order_output))]
        return whole.permute(back).reshape(tuple(shape))

    def full(self, keys: int) -> tuple[int, ...]:
        """The shape of the whole A of `scaled_dot_product_attention`."""
        return (*self.shared, *self.queries, keys)

    def _grouped(self, tensor: Tensor, rows: int) -> Tensor:
        lead = len(self.shared)
        across = math.prod(tensor.shape[lead : lead + rows])
        columns = math.prod(tensor.shape[lead + rows :])
        places = math.prod(self.shared)
        if self.head is None:
            return tensor.reshape(places, 1, across, columns)
        heads = self.split[self.head]
        apart = tensor.reshape(*self.split, across, columns).movedim(self.head, len(self.split) - 1)
        return apart.reshape(places // heads, heads, across, columns)


def _default(shared: tuple[int, ...], batch: int) -> tuple[tuple[int, ...], int | None]:
    """Two shared dimensions are images and heads, as of torch's own attention; one of images has one head."""
    if len(shared) == 2:
        return shared, 1
    if not shared or shared == (batch,):
        return (*(shared or (1,)), 1), len(shared or (1,))
    return shared, None


def _ways(shared: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yields how heads may lie: in a dimension of their own, folded into one, or alone."""
    yield (*shared, 1), len(shared)
    for dim in range(len(shared)):
        yield shared, dim
    if len(shared) == 1:
        for heads in range(2, shared[0] + 1):
            if shared[0] % heads == 0:
                yield (shared[0] // heads, heads), 1
                yield (heads, shared[0] // heads), 0


def _each_in(values: Tensor, sums: Tensor) -> bool:
    distance = (values[:, None] - sums).abs().amin(1)
    return bool((distance < 1e-5 * sums.amax()).all())

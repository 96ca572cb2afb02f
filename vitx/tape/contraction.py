"""A product of two tensors that is summed over some dimensions: a matrix product, however it is written.

Both operands are aligned: brought to the same dimensions, with size 1 where one has none of its own. Of an
attention, one operand is A and the other the values; then a dimension counts queries where A alone has it,
keys where it is summed, and channels where the values alone have it. What both have is shared, as images,
windows and heads are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Size, Tensor

from vitx.tape.axes import Axes
from vitx.tape.expanded import reshaped, summed
from vitx.tape.values import Value


@dataclass(eq=False)
class Operand:
    """One of the two.

    Attributes:
        value: its value; None for a constant.
        size: its shape, as the model has it.
        shape: after it was aligned.
        places: which of the aligned dimensions its own ones are.
    """

    value: Value | None
    size: Size
    shape: tuple[int, ...]
    places: tuple[int, ...]

    def aligned(self, tensor: Tensor) -> Tensor:
        """Aligns its tensor, which is not kept here: it may be large."""
        return tensor.detach().reshape(self.shape)


@dataclass(eq=False)
class Contraction:
    """Two aligned operands.

    Attributes:
        left: the first.
        right: the second.
        summed: the dimensions over which their product is summed.
        out: the shape of what comes out.
        of_matrices: whether both are matrices, or batches of them.
    """

    left: Operand
    right: Operand
    summed: tuple[int, ...]
    out: tuple[int, ...]
    of_matrices: bool = False

    @property
    def kept(self) -> list[int]:
        """The dimensions that are not summed."""
        return [dim for dim in range(len(self.left.shape)) if dim not in self.summed]

    @property
    def aligned_out(self) -> list[int]:
        """The shape of what comes out, with size 1 where it was summed."""
        sizes = map(max, self.left.shape, self.right.shape)
        return [1 if dim in self.summed else size for dim, size in enumerate(sizes)]

    def own(self, operand: Operand) -> list[int]:
        """Returns the dimensions that are kept and that one operand alone has."""
        other = self.right if operand is self.left else self.left
        return [dim for dim in self.kept if operand.shape[dim] > 1 == other.shape[dim]]


Given = tuple[Tensor, Value | None]  # an operand before it is aligned


def of_matmul(left: Given, right: Given, out: Sequence[int], *, over_batch: bool = False) -> Contraction:
    """Describes (..., I, K) times (..., K, J), where I or J may be missing; the batch may be summed, too."""
    (a, first), (b, second) = left, right
    rows, columns = int(a.ndim > 1), int(b.ndim > 1)
    lead = a.ndim - 1 - rows
    k = lead + rows
    of_b = range(k, k + 1 + columns)
    return Contraction(
        Operand(first, a.shape, (*a.shape, *[1] * columns), tuple(range(a.ndim))),
        Operand(second, b.shape, (*b.shape[:lead], *[1] * rows, *b.shape[lead:]), (*range(lead), *of_b)),
        (*range(lead), k) if over_batch else (k,),
        tuple(out),
        of_matrices=bool(rows and columns) and not over_batch,
    )


def of_sum(
    factors: Sequence[Given], shape: Sequence[int], dims: Sequence[int], out: Sequence[int]
) -> Contraction:
    """Describes a product of two, element by element, of this shape, summed over dimensions."""
    ndim = len(shape)
    left, right = (
        Operand(value, t.shape, (1,) * (ndim - t.ndim) + tuple(t.shape), tuple(range(ndim - t.ndim, ndim)))
        for t, value in factors
    )
    return Contraction(left, right, tuple(dims), tuple(out))


@dataclass(frozen=True)
class Layout:
    """Brings weights to (T, H, Q, K), values to (T, H, K, d) and their product to (T, H, Q, d), and back.

    T counts images, windows and the like, H heads: channels of the same tokens.

    Attributes:
        sizes: of the aligned dimensions.
        shared: those that both operands have.
        queries: those that the weights alone have.
        keys: those that are summed.
        channels: those that the values alone have.
        factors: sizes into which the shared ones are laid.
        order: of these, those of tokens first.
        heads: how many heads there are.
        over_channels: whether the keys are channels of the same tokens.
    """

    sizes: tuple[int, ...]
    shared: tuple[int, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    channels: tuple[int, ...]
    factors: tuple[int, ...] = field(default=())
    order: tuple[int, ...] = field(default=())
    heads: int = 1
    over_channels: bool = False

    @classmethod
    def of(cls, contraction: Contraction, weights: Operand, values: Operand, axes: Axes) -> "Layout":
        """Finds out which dimensions are which, from the axes of the values as the model has them."""
        pairs = list(zip(weights.shape, values.shape, strict=True))
        shared = tuple(d for d in contraction.kept if (pairs[d][0] == 1) == (pairs[d][1] == 1))
        inside = dict(zip(values.places, axes, strict=True))
        parts = [part for dim in shared for part in inside.get(dim, ())]
        if math.prod(f.size for f in parts) != math.prod(values.shape[d] for d in shared):
            parts = []  # not known
        of_keys = [f for dim in contraction.summed for f in inside.get(dim, ())]
        return cls(
            tuple(map(max, weights.shape, values.shape)),
            shared,
            tuple(contraction.own(weights)),
            contraction.summed,
            tuple(contraction.own(values)),
            tuple(f.size for f in parts),
            tuple(sorted(range(len(parts)), key=lambda n: parts[n].channels)),
            math.prod(f.size for f in parts if f.channels),
            bool(of_keys) and all(f.channels for f in of_keys),
        )

    def weights(self, aligned: Tensor) -> Tensor:
        """Brings aligned weights to (T, H, Q, K)."""
        return self._grouped(aligned, self.queries, self.keys)

    def values(self, aligned: Tensor) -> Tensor:
        """Brings aligned values to (T, H, K, d)."""
        return self._grouped(aligned, self.keys, self.channels)

    def outputs(self, tensor: Tensor) -> Tensor:
        """Brings the product, as the model has it, to (T, H, Q, d)."""
        aligned = reshaped(tensor, [1 if d in self.keys else n for d, n in enumerate(self.sizes)])
        return self._grouped(aligned, self.queries, self.channels)

    def of_values(self, tensor: Tensor, operand: Operand) -> Tensor:
        """Brings (T, H, K, d) to the values as the model has them."""
        return self._back(tensor, self.keys, self.channels, operand)

    def _grouped(self, aligned: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        wide = [n if d in rows or d in columns else aligned.shape[d] for d, n in enumerate(self.sizes)]
        others = [d for d in range(aligned.ndim) if d not in (*self.shared, *rows, *columns)]
        found = aligned.expand(wide).permute(*self.shared, *rows, *columns, *others)
        matrix = [math.prod(wide[d] for d in rows), math.prod(wide[d] for d in columns)]
        if self.factors:
            found = reshaped(found, [*self.factors, *matrix])
            found = found.permute(*self.order, len(self.factors), len(self.factors) + 1)
        tokens = math.prod(wide[d] for d in self.shared) // self.heads
        return reshaped(found, [tokens, self.heads, *matrix])

    def _back(self, tensor: Tensor, rows: Sequence[int], columns: Sequence[int], operand: Operand) -> Tensor:
        if self.factors:
            matrix = tensor.shape[2:]
            tensor = reshaped(tensor, [*(self.factors[n] for n in self.order), *matrix])
            back = [self.order.index(n) for n in range(len(self.order))]
            tensor = tensor.permute(*back, len(back), len(back) + 1)
        dims = [*self.shared, *rows, *columns]
        tensor = reshaped(tensor, [self.sizes[d] for d in dims])
        others = [d for d in range(len(self.sizes)) if d not in dims]
        for _ in others:
            tensor = tensor.unsqueeze(-1)
        order = [*dims, *others]
        tensor = tensor.permute([order.index(d) for d in range(len(order))])
        copies = [d for d, n in enumerate(operand.shape) if n == 1 < tensor.shape[d]]
        return reshaped(summed(tensor, copies, keepdim=True), operand.size)

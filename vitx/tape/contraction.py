"""A product of two tensors that is summed over some dimensions: `(left * right).sum(dims)`.

Matrix products have this form, too, once their operands are *aligned*: brought to the same dimensions, with
size 1 for those that an operand lacks. In an attention, one operand is A and the other one the values. A
dimension then counts keys if it is summed, queries if only A has it, and channels if only the values have it.
Dimensions that both have are shared: images, windows and heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Size, Tensor

from vitx.functional.tiles import is_zero
from vitx.tape import axes as ax
from vitx.tape.expanded import reshaped, summed
from vitx.tape.values import Value

# Operators that keep the order of elements.
VIEWS = ("view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze")
COPIES = ("clone", "alias", "detach", "_to_copy", "lift_fresh", "lift", "_conj")
Given = tuple[Tensor, Value | None]  # an operand in the model's shape; its value is None for a constant


class Operand(NamedTuple):
    """One of the two operands. It keeps its tensor alive, so no step may refer to it."""

    tensor: Tensor
    value: Value | None
    shape: tuple[int, ...]  # after alignment

    def narrowed(self, dim: int, start: int, part: Value) -> "Operand":
        """Return the channels of a part, from `start` along an aligned dimension, with its value if live."""
        shape, before, size = self.tensor.shape, math.prod(self.shape[:dim]), part.shape[-1]
        fits = (n == self.shape[dim] and math.prod(shape[:d]) == before for d, n in enumerate(shape))
        tensor = self.tensor.narrow([*fits].index(True), start, size)
        aligned = (*self.shape[:dim], size, *self.shape[dim + 1 :])
        return Operand(tensor.reshape(part.shape) if self.value else tensor, self.value and part, aligned)


class Contraction(NamedTuple):
    """Two aligned operands, and the dimensions over which their product is summed."""

    left: Operand
    right: Operand
    summed: tuple[int, ...]

    @property
    def out(self) -> list[int]:
        """The aligned shape of the result, with size 1 in the summed dimensions."""
        sizes = map(max, self.left.shape, self.right.shape)
        return [1 if dim in self.summed else size for dim, size in enumerate(sizes)]

    @property
    def live(self) -> list[tuple[Tensor, Value]]:
        """The live operands."""
        return [(one.tensor, one.value) for one in self[:2] if one.value is not None]

    def apart(self) -> list["Contraction"]:
        """Return the products with each of joined channels that are unlike, if any: W [a, b] = V a + U b."""
        ((_, value), *others), dim = self.live, self.summed[0]
        while (step := value.made_by) and step.name in (*VIEWS, *COPIES):
            if step.inputs[0].shape[-1] != value.shape[-1]:
                return []
            value = step.inputs[0]
        if others or len(self.summed) > 1 or step is None or not joins_unlike(value):
            return []
        found, start = [], 0
        for part in step.inputs:
            left, right = (one.narrowed(dim, start, part) for one in self[:2])
            found.append(Contraction(left, right, self.summed))
            start += part.shape[-1]
        return found


def joins_unlike(value: Value) -> bool:
    """Return whether a value joins channels of which only some attended, or heads of unequal width."""
    step = value.made_by
    if step is None or step.name != "cat" or any(part.is_constant for part in step.inputs):
        return False
    opened, widths = {part.open for part in step.inputs}, [part.shape[-1] for part in step.inputs]
    unlike = len(opened) > 1 and (frozenset() in opened or len({*widths}) > 1)
    return unlike and sum(widths) == value.shape[-1]


def of_matmul(left: Given, right: Given, *, over_batch: bool = False) -> Contraction:
    """Describe (..., I, K) times (..., K, J), where I or J may be missing; the batch may also be summed."""
    (a, first), (b, second) = left, right
    rows, columns = int(a.ndim > 1), int(b.ndim > 1)
    lead = a.ndim - 1 - rows
    return Contraction(
        Operand(a, first, (*a.shape, *[1] * columns)),
        Operand(b, second, (*b.shape[:lead], *[1] * rows, *b.shape[lead:])),
        (*range(lead if over_batch else 0), lead + rows),
    )


def of_sum(factors: Sequence[Given], ndim: int, dims: Sequence[int]) -> Contraction:
    """Describe an elementwise product of two factors, of `ndim` dimensions, summed over some of them."""
    left, right = (Operand(t, value, (1,) * (ndim - t.ndim) + tuple(t.shape)) for t, value in factors)
    return Contraction(left, right, tuple(dims))


def transposed(g: Tensor, other: Tensor, shape: Sequence[int], size: Sequence[int]) -> Tensor:
    """Multiply by one operand and reduce to the other, of this aligned shape and this original size."""
    dims = list(range(g.ndim))
    kept = [dim for dim in dims if shape[dim] > 1]
    found: Tensor = torch.einsum(g, dims, other.to(g.dtype), dims, kept)
    return found.expand([shape[dim] for dim in kept]).reshape(size)  # a constant may be broadcast


def across(g: Tensor, matrix: Tensor) -> Tensor:
    """Multiply (..., n) by (..., n, m).

    On a CPU, leading and trailing channels that are zero are left out: of a layer that computes queries, keys
    and values, only the values get a gradient.
    """
    matrix = matrix.to(g.dtype)
    if g.device.type == "cpu" and not g.requires_grad:
        some = g[(0,) * (g.ndim - 1)].nonzero()
        first, end = (int(some[0]), int(some[-1]) + 1) if len(some) else (0, g.shape[-1])
        if is_zero(g[..., :first]) and is_zero(g[..., end:]):
            return g[..., first:end] @ matrix[..., first:end, :]
    return g @ matrix


@dataclass(frozen=True)
class Layout:
    """The dimensions of an attention, as factors of the dimensions of a contraction of weights and values.

    T counts images, windows and the like; H heads, which are channels of the same tokens; Q queries; K keys;
    and D the channels of a head.
    """

    sizes: list[int]  # of all factors, in the order of the aligned dimensions
    groups: dict[str, list[int]]  # the places of the factors that belong to each letter
    # The shapes of weights, "THQK", values, "THKD", and the output, "THQD", split into factors, with 1 for
    # those that they lack.
    split: dict[str, list[int]]
    values: Size  # the shape of the values in the model
    axes: ax.Axes  # of the aligned output
    over_channels: bool  # whether the keys are channels of the same tokens
    added_heads: int  # how many heads the contraction adds up along with the keys; 1 if none
    learned_queries: bool  # whether some of its heads may be learned queries, which a constant brought

    @classmethod
    def of(
        cls,
        contraction: Contraction,
        weights: Operand,
        values: Operand,
        of_weights: ax.Axes = (),
        softmax_over: ax.Axes | None = None,
    ) -> "Layout":
        """Derive the role of each dimension from the axes of the values, and from those of the weights.

        Several heads may share values: they lie among the queries then, as channels of their tokens. Heads
        that are added up lie among the keys, as channels over which no softmax was taken.
        """
        assert values.value is not None
        axes = ax.reshaped(values.value.axes, values.shape) or ()
        asked = ax.reshaped(of_weights, weights.shape) or ax.tokens(weights.shape)
        over = ax.reshaped(softmax_over or (), weights.shape)
        sizes: list[int] = []
        groups: dict[str, list[int]] = {letter: [] for letter in "THQKD"}
        split: dict[str, list[int]] = {"THQK": [], "THKD": [], "THQD": []}
        keys = [factor.channels for dim in contraction.summed for factor in axes[dim]]
        added, learned = 1, False
        for dim, (a, v) in enumerate(zip(weights.shape, values.shape, strict=True)):
            shared = (a == 1) == (v == 1)
            letter = "K" if dim in contraction.summed else "" if shared else "Q" if v == 1 else "D"
            part = axes[dim] if shared else asked[dim] if letter == "Q" else ax.dimension(v, False)
            apart = letter != "D"
            if letter == "K":  # all heads, or none of them, are added up
                apart = not all(keys) and (over is None or _alternate(part, over[dim]))
            for factor in part:
                role = "H" if apart and factor.channels else letter or "T"
                groups[role].append(len(sizes))
                learned = learned or (role, letter) == ("H", "Q")
                added *= factor.size if role == "H" and letter == "K" else 1
                sizes.append(factor.size)
                split["THQK"].append(1 if a == 1 else factor.size)
                split["THKD"].append(1 if v == 1 else factor.size)
                split["THQD"].append(1 if letter == "K" else factor.size)
        pairs = zip(axes, weights.shape, values.shape, strict=True)
        aligned = (part if v > 1 else ax.dimension(a, False) for part, a, v in pairs)
        out = tuple(() if d in contraction.summed else part for d, part in enumerate(aligned))
        return cls(sizes, groups, split, values.tensor.shape, out, bool(keys) and all(keys), added, learned)

    def count(self, letter: str) -> int:
        """Return how many images and windows, heads, queries, keys or channels there are."""
        return math.prod(self.sizes[place] for place in self.groups[letter])

    def grouped(self, tensor: Tensor, letters: str) -> Tensor:
        """Bring weights, values or outputs from the model's shape to one dimension for each letter."""
        order, rest = self._order(letters)
        wide = [1 if place in rest else size for place, size in enumerate(self.sizes)]
        found = reshaped(tensor, self.split[letters]).expand(wide).permute(order + rest)
        return reshaped(found, [self.count(letter) for letter in letters])

    def to_values(self, tensor: Tensor) -> Tensor:
        """Bring (T, H, K, D) to the shape of the values in the model."""
        order, rest = self._order("THKD")
        found = reshaped(tensor, [self.sizes[place] for place in order] + [1] * len(rest))
        found = found.permute([(order + rest).index(place) for place in range(len(self.sizes))])
        copies = [p for p, size in enumerate(self.split["THKD"]) if size == 1 < found.shape[p]]
        return reshaped(summed(found, copies, keepdim=True), self.values)

    def tokens_first(self, tensor: Tensor, letters: str) -> Tensor:
        """Bring (B, H, N, ...) of a fused kernel to (T, H, N, ...), for N of Q or K, the last of the letters.

        B may contain heads, H windows, and Q heads that share their keys.
        """
        order, rest = [place for letter in letters for place in self.groups[letter]], tensor.shape[3:]
        split, places = self.split[letters + ("K" if letters == "THQ" else "D")], sorted(order)
        found = tensor.reshape([*(split[place] for place in places), *rest])
        found = found.expand([*(self.sizes[place] for place in places), *rest])
        found = found.permute([*map(places.index, order), *range(len(order), found.ndim)])
        return found.reshape([*map(self.count, letters), *rest])

    def _order(self, letters: str) -> tuple[list[int], list[int]]:
        """Return the places of the factors of some letters, and those of all others."""
        order = [place for letter in letters for place in self.groups[letter]]
        return order, [place for place in range(len(self.sizes)) if place not in order]


def _alternate(keys: ax.Dimension, over: ax.Dimension) -> bool:
    """Return whether the tokens among the factors of a dimension are those that a softmax was taken over."""
    pairs = list(zip(keys, over, strict=False))
    return len(keys) == len(over) and all(k.size == o.size and k.channels != o.channels for k, o in pairs)

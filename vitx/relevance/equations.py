"""Products of two tensors, a letter for each dimension."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitx.relevance.heads import Equation
from vitx.relevance.names import BADDBMM, Function


def operands(func: Function, args: Any, kwargs: Any) -> tuple[Equation | None, Tensor, Tensor] | None:
    """Returns the two operands of a product; None if it is none of two operands."""
    if func is torch.einsum:
        return _of_einsum(*args)
    if func in BADDBMM:
        args = args[1:]
    given = (*args, *(value for name, value in kwargs.items() if name != "out"))
    factors = [value for value in given if isinstance(value, Tensor)]
    return (None, factors[0], factors[1]) if len(factors) == 2 else None


def _of_einsum(equation: Any, *given: Any) -> tuple[Equation, Tensor, Tensor] | None:
    tensors = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    if not isinstance(equation, str) or len(tensors) != 2:
        return None
    parsed = parse(equation, [t.ndim for t in tensors])
    return None if parsed is None else (Equation(*parsed), tensors[0], tensors[1])


def parse(equation: str, ndims: Sequence[int]) -> list[str] | None:
    """Returns the letters of operands and output, the ellipsis as capitals; None for repeated ones.

    Example:
        >>> parse("b h i d, b h j d -> b h i j", [4, 4])
        ['bhid', 'bhjd', 'bhij']
        >>> parse("...ij,...jk->...ik", [3, 3])
        ['Aij', 'Ajk', 'Aik']
    """
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    extra = ""
    for term, count in zip(terms, _extra(terms, ndims), strict=True):
        if "..." in term:
            extra = max(extra, "ABCDEFGH"[:count], key=len)
    if not arrow:
        counted = "".join(terms).replace(".", "")
        out = ("..." if extra else "") + "".join(sorted(c for c in set(counted) if counted.count(c) == 1))
    found = []
    for term, count in zip([*terms, out], [*_extra(terms, ndims), len(extra)], strict=True):
        found.append(term.replace("...", extra[len(extra) - count :] if "..." in term and count else ""))
    return None if any(len(set(term)) < len(term) for term in found) else found


def _extra(terms: Sequence[str], ndims: Sequence[int]) -> list[int]:
    """How many dimensions the ellipsis of each term stands for."""
    return [ndim - len(term) + 3 for term, ndim in zip(terms, ndims, strict=True)]

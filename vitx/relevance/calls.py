"""Which rule each torch function follows. What is not named here has none."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitx.relevance import rules, shapes, sliding
from vitx.relevance.equations import operands, parse
from vitx.relevance.heads import Equation
from vitx.relevance.live import Live, Watched
from vitx.relevance.names import (
    ADDED,
    BADDBMM,
    DIVIDED,
    JOINED,
    MULTIPLIED,
    POINTWISE,
    PRODUCTS,
    REVERSED,
    SELECTED,
    SHAPES,
    SUBTRACTED,
    Function,
    argument,
    named,
    replaced,
    tensors,
)
from vitx.relevance.shapes import Rule


def whole_to_first(
    watched: Watched, out: Tensor, left: Tensor, live: Live, equation: Equation | None
) -> Tensor:
    """The shadow of q k^T: whole to the query."""
    if equation is None:
        return _multiplied_by(live, out, -1)
    return _contracted(live.shadow, out.shape, equation.left, equation.out)


def _multiplied_by(live: Live, out: Tensor, dim: int) -> Tensor:
    """A product with a weight over one dimension of a live tensor."""
    apart = [n for d, n in enumerate(live.shape) if d != dim % len(live.shape)]
    if apart == [n for d, n in enumerate(out.shape) if d != dim % out.ndim]:
        return rules.evenly(live.thin, dim)
    whole = live.shadow  # the weight has dimensions of its own, to which it was broadcast
    shape = list(out.shape)
    shape[dim] = live.shape[dim]
    return rules.evenly(rules.unchanged(whole, shape), dim)


def _contracted(shadow: Tensor, shape: Sequence[int], own: str, out: str) -> Tensor:
    """A product by letters: what other letters have is summed, what is contracted is shared evenly."""
    whole = shadow.shape
    gone = [letter for letter in own if letter not in out]
    size = math.prod(whole[own.index(letter)] for letter in gone)

    def back(relevance: Tensor) -> list[Tensor]:
        others = [index for index, letter in enumerate(out) if letter not in own]
        share = relevance.sum(others) if others else relevance
        left = [letter for letter in out if letter in own]
        for _ in gone:
            share = share.unsqueeze(-1)
        order = [(left + gone).index(letter) for letter in own]
        return [(share / size).permute(order).expand(whole)]

    return rules.follow(shape, back, shadow)


def _unchanged(watched: Watched, out: Any, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
    if not isinstance(out, Tensor) or not out.is_floating_point():  # rounded to whole numbers
        return None
    there, shape = inputs[0].shape, out.shape
    if there == shape:
        return inputs[0].thin
    offset = len(shape) - len(there)
    fits = offset >= 0 and all(n in (1, shape[offset + dim]) for dim, n in enumerate(there))
    return rules.unchanged(inputs[0].shadow, shape) if fits else None


def alike(shape: torch.Size, inputs: Sequence[Live]) -> list[Tensor]:
    """The shadows of inputs of one call, thin if they are so in the same dimensions, and as large as this."""
    thin = [one.thin for one in inputs]
    if all(one.shape == shape for one in inputs) and all(one.shape == thin[0].shape for one in thin):
        return thin
    return [rules.unchanged(one.shadow, shape) for one in inputs]


def _multiplied(watched: Watched, out: Tensor, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
    if len(inputs) == 1:
        return _unchanged(watched, out, args, kwargs, inputs)
    parts = alike(out.shape, inputs)
    shares = [1 / len(parts)] * len(parts)
    return rules.follow(parts[0].shape, lambda r: rules.shared(r, shares, parts), *parts)


def _subtracted(watched: Watched, out: Tensor, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
    if len(inputs) == 2 and inputs[1].shape == inputs[0].shape:
        return _multiplied(watched, out, args, kwargs, inputs)
    return _unchanged(watched, out, args, kwargs, inputs)  # less its own mean: a norm


def _divided(watched: Watched, out: Tensor, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
    return _unchanged(watched, out, args, kwargs, inputs) if watched.get(args[0]) is not None else None


def _glu(watched: Watched, out: Tensor, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
    """Half of a tensor times a gate of the other half: each has its share."""
    parts = inputs[0].shadow.chunk(2, argument(args, kwargs, 1, "dim", -1))
    return rules.follow(out.shape, lambda r: rules.shared(r, (0.5, 0.5), parts), *parts)


def _linear(watched: Watched, out: Tensor, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
    live = watched.get(args[0])
    return None if live is None else _multiplied_by(live, out, -1)


def _addmm(watched: Watched, out: Tensor, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
    live = watched.get(args[1]) if len(args) > 2 and watched.get(args[2]) is None else None
    return None if live is None or watched.get(args[0]) else _multiplied_by(live, out, -1)


def _weighted(func: Function) -> Rule:
    """A product of a live tensor and a weight."""

    def rule(watched: Watched, out: Tensor, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
        if func is torch.einsum:
            return _einsum(watched, out, args)
        found = operands(func, args, kwargs)
        if found is None or (func in BADDBMM and watched.get(args[0]) is not None):
            return None
        _, left, right = found
        first, second = watched.get(left), watched.get(right)
        if first is not None:
            if right.ndim == 1:
                return None
            return _multiplied_by(first, out, -1)
        if second is None or right.ndim == 1 or left.ndim == 1:
            return None
        return _multiplied_by(second, out, -2)

    return rule


def _einsum(watched: Watched, out: Tensor, args: Any) -> Any:
    given = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    letters = parse(args[0], [t.ndim for t in given]) if isinstance(args[0], str) else None
    live = [index for index, t in enumerate(given) if watched.get(t) is not None]
    if letters is None or len(live) != 1:
        return None
    one = watched.get(given[live[0]])
    assert one is not None
    return _contracted(one.shadow, out.shape, letters[live[0]], letters[-1])


def _averaged(watched: Watched, out: Tensor, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
    live = watched.get(args[0])
    if live is None:
        return None
    dim = argument(args, kwargs, 1, "dim")
    if isinstance(dim, torch.dtype):
        dim = None
    ndim = len(live.shape)
    dims = range(ndim) if dim is None or dim == () else [dim] if isinstance(dim, int) else dim
    return rules.averaged(live.thin, list(dims), out.ndim == ndim)


def _scattered(watched: Watched, out: Tensor, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
    """Tokens that are added at their places, or averaged: each has an even share of what it became."""
    given = dict(zip(("self", "dim", "index", "src", "reduce"), args, strict=False)) | kwargs
    target, dim, index, source = (given.get(name) for name in ("self", "dim", "index", "src"))
    if given.get("reduce", "sum") not in ("sum", "mean") or not isinstance(source, Tensor):
        return None
    assert isinstance(target, Tensor)
    assert isinstance(index, Tensor)
    assert isinstance(dim, int)
    kept = bool(given.get("include_self", True))
    parts = [live.shadow if (live := watched.get(t)) else watched.of_model(t.shape) for t in (target, source)]
    index, like = index.detach(), parts[0]
    count = torch.full(target.shape, float(kept), dtype=like.dtype, device=like.device)
    count.scatter_add_(dim, index, torch.ones(index.shape, dtype=like.dtype, device=like.device))

    def back(relevance: Tensor) -> list[Tensor]:
        alone = count == 0  # nothing came: what was there stays
        share = relevance / count.clamp(min=1)
        into_source = torch.zeros(parts[1].shape, dtype=relevance.dtype, device=relevance.device)
        into_source[tuple(slice(n) for n in index.shape)] = share.gather(dim, index)
        return [share if kept else share.masked_fill(~alone, 0), into_source]

    return rules.follow(out.shape, back, *parts)


def _picked(func: Function) -> Rule:
    def rule(watched: Watched, out: Any, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
        live = [t for t in tensors((args, kwargs)) if watched.get(t) is not None]
        real = out if isinstance(out, Tensor) else out[0]

        def again(*leaves: Tensor) -> Tensor:
            instead = {id(t): leaf for t, leaf in zip(live, leaves, strict=True)}
            given, named = replaced((args, kwargs), lambda t: instead.get(id(t), t))
            found: Any = func(*given, **named)
            picked: Tensor = found if isinstance(found, Tensor) else found[0]
            return picked

        shadows = [one.shadow for one in watched.found_in(args, kwargs)]
        found = rules.selected(shadows, real.shape, again, live)
        return found if isinstance(out, Tensor) else (found, *out[1:])

    return rule


def _copied(watched: Watched, out: Tensor, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
    live = watched.get(args[1])
    return watched.of_model(out.shape) if live is None else rules.unchanged(live.shadow, out.shape)


RULES: dict[Function, Rule] = {
    **dict.fromkeys(POINTWISE | REVERSED, _unchanged),
    **dict.fromkeys(MULTIPLIED | ADDED, _multiplied),
    **dict.fromkeys(SUBTRACTED, _subtracted),
    **dict.fromkeys(DIVIDED, _divided),
    **{func: shapes.natural(func) for func in SHAPES},
    **{func: shapes.joined(func) for func in JOINED},
    **{func: _picked(func) for func in SELECTED},
    **dict.fromkeys(named("linear"), _linear),
    **dict.fromkeys(named("addmm"), _addmm),
    F.glu: _glu,
    **{func: _weighted(func) for func in PRODUCTS},
    **dict.fromkeys(named("mean", "sum", "var", "std"), _averaged),
    **dict.fromkeys(named("scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"), _scattered),
    **dict.fromkeys(named("copy_"), _copied),
    **sliding.RULES,  # of which some look like mere changes of shape
}

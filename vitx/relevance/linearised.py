"""The linearised network: the forward values as they are, differentiated as if they were a linear map.

On the way back these are constants: attention, the scale of each norm, the gate of each activation
(y = x * (act(x) / x)), what a tensor is multiplied with if it was made of that very tensor, and each factor
of another product in its turn, halved. A saturated score has little gradient, and in odd places; in this
network what all parts add to the score, biases among them, sums to it exactly.

Sources: Ali et al. 2022 (arXiv 2202.07304), Achtibat et al. 2024 (arXiv 2402.05602), Mehri et al. 2025 (arXiv
2411.16760).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitx.relevance import gates, norms
from vitx.relevance.linear import Held, held, linear
from vitx.relevance.live import Live, Watched
from vitx.relevance.names import (
    ADDED,
    CONVOLUTIONS,
    DIVIDED,
    JOINED,
    MULTIPLIED,
    PRODUCTS,
    SOFTMAX,
    SUBTRACTED,
    Function,
    argument,
    named,
    replaced,
    tensors,
)

TRANSPOSED = named("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
SUMS = ADDED | SUBTRACTED | named("rsub", "__rsub__")


def _biased(watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]) -> Any:
    """A linear map or a convolution, whose bias is a constant."""
    if "bias" in kwargs:
        return func(*args, **kwargs | {"bias": watched.added(kwargs["bias"])})
    if len(args) > 2:
        args = (*args[:2], watched.added(args[2]), *args[3:])
    return func(*args, **kwargs)


def _added(watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]) -> Any:
    """What is added to what depends on the image, or stands beside it, is a constant."""
    like = live[0].real()
    if (
        watched.accounts
        and func in SUMS
        and like is not None
        and like.dtype in (torch.float32, torch.float64)
    ):
        numbers = [isinstance(value, (int, float)) and place < 2 for place, value in enumerate(args)]
        pairs = zip(args, numbers, strict=True)
        args = tuple(like.new_tensor(value) if number else value for value, number in pairs)
    given, named = replaced((args, kwargs), partial(_leaf, watched))
    return func(*given, **named)


def _blended(watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]) -> Any:
    """`lerp`: two that are added, by a weight that is a constant factor."""
    start, end, *weight = args
    in_place = func.__name__.endswith("_")
    begin = start if in_place else _leaf(watched, start)
    options = {name: held(value) for name, value in kwargs.items()}
    return func(begin, _leaf(watched, end), *map(held, weight), **options)


def _added_product(
    watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]
) -> Any:
    """`addcmul`: a sum of something and a product of two."""
    in_place = func.__name__.endswith("_")
    given, *factors = args
    start = given.clone() if in_place else given
    with torch.no_grad():
        exact = func(start.clone(), *factors, **kwargs)
    product = _multiplied(watched, torch.mul, tuple(factors), {}, watched.found_in(*factors))
    summed = linear(
        _leaf(watched, start) + kwargs.get("value", 1) * product, exact, lambda gradient: gradient
    )
    return given.copy_(summed) if in_place else summed


def _leaf(watched: Watched, value: Any) -> Any:
    """Returns a summand as a leaf of the graph, unless it depends on the image."""
    constant = isinstance(value, Tensor) and watched.get(value) is None
    return watched.added(value) if constant else value


def _log_softmax(
    watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]
) -> Tensor:
    """`log_softmax`: x less a constant."""
    x = args[0]
    with torch.no_grad():
        value = func(*args, **kwargs)
        constant = watched.added(value - x)
    return linear(x, value, lambda gradient: gradient, constant)


def _softmax(watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]) -> Tensor:
    """A `softmax` that is no attention, as of classes: to first order, where that counts."""
    if not watched.accounts or live[0].lineage.kind == "scores":
        return func(*args, **kwargs)  # type: ignore[no-any-return]
    x = args[0]
    dim = argument(args, kwargs, 1, "dim", -1)
    with torch.no_grad():
        value: Tensor = func(*args, **kwargs)

    def back(gradient: Tensor) -> Tensor:
        return value * (gradient - (gradient * value).sum(dim, keepdim=True))

    return linear(x, value, back, watched.added(value - back(x.detach().to(value.dtype))))


def _multiplied(watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]) -> Any:
    """A product of two: a factor that was made of the other one is its gate; else each counts half."""
    if len(live) != 2 or not all(value.requires_grad for value in args[:2]):
        return func(*args, **kwargs)  # one is a constant already
    first, second = live
    if args[0] is args[1] or _made_of(args[1], second, args[0], first):
        return func(args[0], held(args[1]), *args[2:], **kwargs)
    if _made_of(args[0], first, args[1], second):
        if func.__name__.endswith("_") or func.__name__.startswith("__i"):
            return args[0].copy_(held(args[0]).clone() * args[1])
        return func(held(args[0]), args[1], *args[2:], **kwargs)
    out: Tensor = func(*args, **kwargs)
    return _halved(out)


def _made_of(made: Tensor, live: Live, of: Tensor, other: Live) -> bool:
    """Whether a tensor was made of another one, and not of another part of what that is a part of."""
    if not other.lineage.identity <= live.lineage.ancestors:
        return False
    seen, waiting = {of.grad_fn}, [made.grad_fn]
    while waiting:
        node = waiting.pop()
        for before, output in () if node is None else node.next_functions:
            if before is of.grad_fn and output == of.output_nr:
                return True
            if before not in seen:
                seen.add(before)
                waiting.append(before)
    return False


def _halved(out: Tensor) -> Tensor:
    if out.requires_grad:
        out.register_hook(_half)
    return out


def _half(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient / 2  # None: a way back of relevance alone


def _divided(watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]) -> Any:
    """A quotient: what divides is a scale."""
    return func(args[0], *(held(value) for value in args[1:]), **kwargs)


def _product(watched: Watched, func: Function, args: Any, kwargs: dict[str, Any], live: list[Live]) -> Any:
    """A matrix product of two that is no attention."""
    out = func(*args, **kwargs)
    return _halved(out) if len(live) == 2 and all(t.requires_grad for t in tensors(args)) else out


RULES: dict[Function, Held] = {
    **gates.RULES,
    **norms.RULES,
    **dict.fromkeys(named("log_softmax"), _log_softmax),
    **dict.fromkeys(SOFTMAX, _softmax),
    **dict.fromkeys(SUMS | JOINED, _added),
    **dict.fromkeys(named("linear") | CONVOLUTIONS | TRANSPOSED, _biased),
    **dict.fromkeys(named("lerp", "lerp_"), _blended),
    **dict.fromkeys(named("addcmul", "addcmul_"), _added_product),
    **dict.fromkeys(MULTIPLIED, _multiplied),
    **dict.fromkeys(DIVIDED, _divided),
    **dict.fromkeys(PRODUCTS, _product),
}

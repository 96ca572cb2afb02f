"""Sums and differences, of several values or of one and a constant."""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.attention import Attention
from vitx.tape.call import Call, rule
from vitx.tape.expanded import fitted, scaled
from vitx.tape.rules.products import product
from vitx.tape.sums import Sum, terms_of
from vitx.tape.values import Back, Value, reduced

Summand = tuple[Any, float | Tensor]  # a value, tensor or number, and its factor


@rule("add", "sub", "rsub")
def sum_of_two(call: Call) -> list[Value]:
    """Follows a sum or a difference."""
    alpha = 1 if call["alpha"] is None else call["alpha"]
    signs = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[call.name]
    return [total(call, [(call["self"], signs[0]), (call["other"], signs[1])])]


@rule("lerp")
def blended(call: Call) -> list[Value]:
    """Follows a weighted mean of two; the weight is held."""
    weight = call["weight"]
    of_constant = call.value(weight) is None
    weight = weight.detach() if isinstance(weight, Tensor) else weight
    return [total(call, [(call["self"], 1 - weight), (call["end"], weight)], exact=of_constant)]


@rule("addcmul", "addcdiv")
def added_product(call: Call) -> list[Value]:
    """Follows a sum of something and a product or a quotient of two."""
    start, first, second = (call["self"], 1), call["tensor1"], call["tensor2"]
    factor = 1 if call["value"] is None else call["value"]
    quotient = call.name == "addcdiv"
    if call.value(second) is None:
        return [total(call, [start, (first, factor / second if quotient else factor * second)])]
    if call.value(first) is None and not quotient:
        return [total(call, [start, (second, factor * first)])]
    function = torch.ops.aten.div if quotient else torch.ops.aten.mul
    of_product = product(call.inner(function.Tensor, first, second), first, second, quotient=quotient)
    return [total(call, [start, (of_product, factor)])]


def total(call: Call, summands: Sequence[Summand], *, exact: bool = True) -> Value:
    """Follows a sum of values, tensors and numbers, each times a factor, of which some are live.

    It is exact where all factors are constants.
    """
    tape, shape = call.tape, call.out.shape
    terms = [(one if isinstance(one, Value) else call.value(one), one, factor) for one, factor in summands]
    live = [(value, factor) for value, _, factor in terms if value is not None]
    own = []
    if tape.accounts:
        own = [tape.constant(_constant(one, k, call.out)) for value, one, k in terms if value is None]
    sources = [value for value, _ in live] + own
    factors = [factor for _, factor in live] + [1] * len(own)
    shapes = [value.shape for value in sources]

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        return [fitted(scaled(arrived[0], k), s) for k, s in zip(factors, shapes, strict=True)]

    counted = [value for value, factor in live if len(live) == 1 or not _is_size(value, factor, shape)]
    if len(counted) == 1:
        found = _shifted(call, counted[0], gradient, sources, alone=len(live) == 1)
    else:
        found = _summed(call, counted, [value for value, _ in live], gradient, sources, exact)
    if len(live) == 2:
        _name_logarithm(found, *live)
    return found


def _name_logarithm(found: Value, one: tuple[Value, Any], other: tuple[Value, Any]) -> None:
    """Notes x less the logarithm of its sum of exponentials, and that sum put together of its parts."""
    (first, _), (second, sign) = one, other
    if second.kind == "normalizer" and first.kind != "size" and isinstance(sign, (int, float)) and sign < 0:
        found.kind, found.dim = "log", reduced(found.shape, second.shape)
    elif {first.kind, second.kind} == {"normalizer", "size"}:
        found.kind = "normalizer"


def _is_size(value: Value, factor: Any, shape: Sequence[int]) -> bool:
    """Returns whether a term says how large others are, or is their mean, which a norm takes away."""
    negative = isinstance(factor, (int, float)) and factor < 0
    return value.is_constant or value.kind in ("size", "normalizer") or (negative and value.shape != shape)


def _summed(
    call: Call,
    counted: Sequence[Value],
    live: Sequence[Value],
    gradient: Back,
    sources: Sequence[Value],
    exact: bool,
) -> Value:
    """Follows a sum of several values."""
    shape, terms = call.out.shape, terms_of(counted or live)
    alike = all(shape == term.shape for term in terms)
    found = call.make(
        *(list(terms), None, gradient),
        sources=sources,
        axes=(lambda of: reduce(ax.merged, of)) if alike else None,
        kind=partial(Sum, vias={term: via for term, via in terms.items() if via is not None}),
        exact=exact,
    )
    step = found.made_by
    assert isinstance(step, Sum)
    found.sum = step
    if step.stream is None:
        _refuse_residual_within(call, step)
    else:
        step.axes = None
        _close(call, found, step, step.stream, live)
    kinds = {value.kind for value in counted}
    if "scores" in kinds or kinds == {"weights"}:
        found.kind = "scores" if "scores" in kinds else "weights"
    if len({value.base for value in live}) == 1 and all(value.shape == shape for value in live):
        found.base, found.proportional = live[0].base, all(value.proportional for value in live)
    return found


def _shifted(call: Call, value: Value, gradient: Back, sources: Sequence[Value], *, alone: bool) -> Value:
    """Follows a value and constants, or what says how large it is: all relevance is the value's."""
    before, shape = value.shape, call.out.shape
    found = call.make(
        [value],
        lambda r: [fitted(r[0], before)],
        gradient,
        sources=sources,
        axes=lambda of: ax.broadcast(of[0], shape),
        exact=True,
    )
    if before == shape:
        found.fan, found.place, found.via = value.fan, value.place, value.via
        if alone:
            found.roots, found.sum = value.roots, value.sum
        if not value.proportional:
            found.base, found.proportional = value.base, False
    if value.kind in ("scores", "size", "exp", "weights"):
        found.kind = value.kind
        found.along = value.along if before == shape else None
    found.total = value.total
    if sources[1:]:
        call.tape.shifted[value] = found, call.tape.keeper.keep(call.out)
    return found


def _refuse_residual_within(call: Call, step: Sum) -> None:
    """Lets no relevance through a residual of which something else was made inside."""
    origins = [attention.origin for term in step.inputs for attention in term.open]
    others = [term for term in step.inputs if not term.open]
    later = call.tape.residuals >> (max(origins, default=0) + 1) << (max(origins, default=0) + 1)
    if origins and any((term.above | 1 << term.number) & later for term in others):
        step.relevance = None


def _close(call: Call, found: Value, step: Sum, stream: Value, live: Sequence[Value]) -> None:
    """Notes a residual; what it opened is no residual of its own."""
    tape = call.tape
    for value in live:
        opened = value.sum
        if opened is not None and value not in step.inputs:
            for attention in opened.closes:
                attention.residuals.discard(opened)
            for output in opened.outputs:
                tape.streams.pop(output, None)
    tape.residuals |= 1 << found.number
    found.open = stream.open
    for attention in step.closes:
        attention.residuals.add(step)
    if tape.accounts:
        # One over channels counts, which is in no layer.
        before = len(tape.layers) or any(isinstance(one, Attention) for one in tape.steps)
        tape.streams[found] = tape.keeper.keep(call.out), int(before)


def _constant(constant: Any, factor: Any, out: Tensor) -> Tensor:
    dtype = torch.promote_types(out.dtype, torch.float32)
    found: Tensor = torch.as_tensor(constant, dtype=dtype, device=out.device) * factor
    return found.to(dtype)

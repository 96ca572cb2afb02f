"""Sums and differences, of several values or of one and a constant."""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.call import Call
from vitx.tape.expanded import fitted
from vitx.tape.registry import rule
from vitx.tape.rules.products import product
from vitx.tape.sums import Sum, terms_of
from vitx.tape.values import Value, reduced

Summand = tuple[Any, float | Tensor]  # a tensor or number, and its factor


@rule("add", "sub", "rsub")
def sum_of_two(call: Call) -> list[Value]:
    """Follows a sum or a difference."""
    alpha = 1 if call["alpha"] is None else call["alpha"]
    first, second = call["self"], call["other"]
    signs = {"rsub": (-alpha, 1)}.get(call.name, (1, alpha if call.name == "add" else -alpha))
    return [total(call, [(first, signs[0]), (second, signs[1])])]


@rule("lerp")
def blended(call: Call) -> list[Value]:
    """Follows a weighted mean of two."""
    weight = call["weight"]
    if isinstance(weight, Tensor) and call.value(weight) is not None:
        weight = weight.detach()
        live = [
            (v, k)
            for t, k in ((call["self"], 1 - weight), (call["end"], weight))
            if (v := call.value(t)) is not None
        ]
        return [total_of(call, live, exact=False)]
    return [total(call, [(call["self"], 1 - weight), (call["end"], weight)])]


@rule("addcmul", "addcdiv")
def added_product(call: Call) -> list[Value]:
    """Follows a sum of something and a product or a quotient of two."""
    start, first, second = call["self"], call["tensor1"], call["tensor2"]
    factor = 1 if call["value"] is None else call["value"]
    quotient = call.name == "addcdiv"
    if call.value(second) is None:
        return [total(call, [(start, 1), (first, factor / second if quotient else factor * second)])]
    if call.value(first) is None and not quotient:
        return [total(call, [(start, 1), (second, factor * first)])]
    function = torch.ops.aten.div if quotient else torch.ops.aten.mul
    of_product = product(call.inner(function.Tensor, first, second), first, second, quotient=quotient)
    return [total(call, [(start, 1)], [(of_product, factor)])]


def total(call: Call, summands: Sequence[Summand], more: Sequence[tuple[Value, Any]] = ()) -> Value:
    """Follows a sum of tensors and numbers, each times a factor, of which some are live."""
    live: list[tuple[Value, Any]] = list(more)
    constants: list[tuple[Any, Any]] = []
    for tensor, factor in summands:
        value = call.value(tensor) if isinstance(tensor, Tensor) else None
        if value is None:
            constants.append((tensor, factor))
        else:
            live.append((value, factor))
    found = total_of(call, live, constants)
    _name_logarithm(found, live)
    return found


def _name_logarithm(found: Value, live: Sequence[tuple[Value, Any]]) -> None:
    """Notes x less the logarithm of its sum of exponentials, and that sum put together of its parts."""
    if len(live) != 2:
        return
    (first, _), (second, sign) = live
    if second.kind == "normalizer" and first.kind != "size" and isinstance(sign, (int, float)) and sign < 0:
        found.kind, found.dim = "log", reduced(found.shape, second.shape)
    elif {first.kind, second.kind} == {"normalizer", "size"}:
        found.kind = "normalizer"


def total_of(
    call: Call,
    live: Sequence[tuple[Value, Any]],
    constants: Sequence[tuple[Any, Any]] = (),
    *,
    exact: bool = True,
) -> Value:
    """Makes the value of a sum of values, each times a factor, and constants.

    It is exact where all factors are constants.
    """
    tape, shape = call.tape, call.out.shape
    own = []
    if tape.accounts:
        own = [tape.constant(_constant(c, k, call.out)) for c, k in constants if not _is_zero(c)]
    sources = [value for value, _ in live] + own
    shapes = [value.shape for value in sources]
    factors = [factor for _, factor in live] + [1] * len(own)

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0]
        return [fitted(_times(g, k), s) for k, s in zip(factors, shapes, strict=True)]

    if len(live) == 1:
        return _shifted(call, live[0][0], gradient, sources)
    counted = [value for value, factor in live if not _is_size(value, factor, shape)]
    if len(counted) == 1:
        found = _shifted(call, counted[0], gradient, sources)
        found.roots, found.sum = 1 << found.number, None
        return found
    terms = terms_of(counted or [value for value, _ in live])

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
    if step.stream is not None:
        step.axes = None
    _close(call, found, step, [value for value, _ in live])
    kinds = {value.kind for value in counted}
    if "scores" in kinds or kinds == {"weights"}:
        found.kind = "scores" if "scores" in kinds else "weights"
    same = {value.base for value, _ in live}
    if len(same) == 1 and all(value.shape == shape for value, _ in live):
        found.base = same.pop()
        found.proportional = all(value.proportional for value, _ in live)
    return found


def _is_size(value: Value, factor: Any, shape: Sequence[int]) -> bool:
    """Returns whether a term says how large others are, or is their mean, which a norm takes away."""
    negative = isinstance(factor, (int, float)) and factor < 0
    return value.is_constant or value.kind in ("size", "normalizer") or (negative and value.shape != shape)


def _shifted(call: Call, value: Value, gradient: Any, sources: Sequence[Value]) -> Value:
    """A value and constants: all relevance is the value's."""
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
        found.roots, found.sum, found.fan, found.place = value.roots, value.sum, value.fan, value.place
        found.via = value.via
        if not value.proportional:
            found.base, found.proportional = value.base, False
    if value.kind in ("scores", "size", "exp", "weights"):
        found.kind = value.kind
        found.along = value.along if before == shape else None
    found.total = value.total
    if sources[1:]:
        call.tape.shifted[value] = found, call.tape.keeper.keep(call.out)
    return found


def _close(call: Call, found: Value, step: Sum, direct: Sequence[Value]) -> None:
    """Notes a residual; what it opened is no residual of its own."""
    tape = call.tape
    found.sum = step
    if step.stream is None:
        origins = [attention.origin for term in step.inputs for attention in term.open]
        others = [term for term in step.inputs if not term.open]
        later = tape.residuals >> (max(origins, default=0) + 1) << (max(origins, default=0) + 1)
        if origins and any((term.above | 1 << term.number) & later for term in others):
            step.relevance = (
                None  # a residual around the attention, of which something else was made in between
            )
        return
    for value in direct:
        opened = value.sum
        if opened is not None and value not in step.inputs:
            for attention in opened.closes:
                attention.residuals.discard(opened)
            for output in opened.outputs:
                tape.streams.pop(output, None)
    tape.residuals |= 1 << found.number
    found.open = step.stream.open
    for attention in step.closes:
        attention.residuals.add(step)
    if tape.accounts and step.stream is not None:
        tape.streams[found] = tape.keeper.keep(call.out), len(tape.layers)


def _constant(constant: Any, factor: Any, out: Tensor) -> Tensor:
    tensor = constant if isinstance(constant, Tensor) else torch.full((), constant)
    found: Tensor = tensor.to(out.device) * factor
    return found.to(torch.promote_types(out.dtype, torch.float32))


def _is_zero(constant: Any) -> bool:
    return isinstance(constant, (int, float)) and constant == 0


def _times(g: Tensor, factor: Any) -> Tensor:
    return g if isinstance(factor, (int, float)) and factor == 1 else g * factor

"""Propagation rules: relevance and the gradient of the linearized network, back through each operator.

A rule is looked up by the operator's name alone. `views` and `rearranged` move elements; `contractions`,
`attention` and `layers` multiply and add up; `elementwise`, `products` and `sums` leave elements in place.
Operators that torch tags as pointwise are functions of each element.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._decomp import decomposition_table

from vitx.tape.call import Call
from vitx.tape.registry import RULES, OperatorRule, unknown
from vitx.tape.rules import contractions, layers, rearranged  # noqa: F401, and the rules they use
from vitx.tape.rules.attention import fused
from vitx.tape.rules.elementwise import gated

_SUMS = ("addcmul", "addcdiv")  # these are tagged as pointwise, too


def rule_of(call: Call) -> OperatorRule:
    """Return the rule of a call; a copying view, as in functionalized programs, has the rule of the view."""
    found = RULES.get(call.name) or RULES.get(call.name.removesuffix("_copy"))
    if found is fused and call.value(call["value"]) is None:
        return unknown  # no attention, but a function of the queries
    if found is None:
        pointwise = torch.Tag.pointwise in call.overload.function.tags and call.name not in _SUMS
        found = gated if pointwise else unknown
    return found


def decomposition_of(call: Call) -> Callable[..., Any] | None:
    """Return torch's decomposition of an operator into others; None if there is none that can be followed."""
    function = call.overload.function
    if RULES.get(call.name) is fused:
        return partial(_written_out, call)
    if torch.Tag.nondeterministic_seeded in function.tags or call.out.is_complex():
        return None  # those of complex numbers write into storage as if it held real ones
    if call.overload.in_place:
        function = getattr(getattr(torch.ops.aten, call.name, None), function._overloadname, None)
    found: Callable[..., Any] | None = decomposition_table.get(function)
    return found


def _written_out(call: Call, *_: Any, **__: Any) -> Any:
    """Run a fused attention as products and a softmax."""
    mask = call["attn_mask"] if call["attn_mask"] is not None else call["attn_bias"]
    operands = (call[name] for name in ("query", "key", "value"))
    attention: Any = torch.ops.aten._scaled_dot_product_attention_math
    return attention(*operands, mask, 0.0, bool(call["is_causal"]), scale=call["scale"])

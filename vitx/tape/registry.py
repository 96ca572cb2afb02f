"""The rules by the names of their operators."""

from collections.abc import Callable
from typing import TypeVar

from vitx.tape.call import Call
from vitx.tape.values import Value

OperatorRule = Callable[[Call], list[Value]]
RULES: dict[str, OperatorRule] = {}
R = TypeVar("R", bound=OperatorRule)


def rule(*names: str) -> Callable[[R], R]:
    """Register a rule, from a call to the values of its outputs, for the operators of these names."""

    def register(function: R) -> R:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def unknown(call: Call) -> list[Value]:
    """Record an operator without a rule: an error only if relevance or a gradient reaches it."""
    return call.make_all(call.values, None)

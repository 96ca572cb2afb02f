"""The rules by the names of operators."""

from collections.abc import Callable

from vitx.tape.call import Call
from vitx.tape.values import Value

Rule = Callable[[Call], list[Value]]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a function from a call to the values of its outputs, for operators of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def unknown(call: Call) -> list[Value]:
    """Follows an operator without a rule: an error only if relevance or a gradient must go through it."""
    return call.make_all(call.values, None)

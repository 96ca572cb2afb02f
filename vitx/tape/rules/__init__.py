"""How relevance and the gradient of the linearised network go back through each operator.

A rule is found by the operator's name alone. An operator has one in `shapes` if it moves elements, in
`averages` if it adds up some, in `elementwise`, `norms`, in `linear` if it multiplies by weights, in
`products` if it multiplies values by each other, and in `sums`.
"""

from vitx.tape.call import Call
from vitx.tape.registry import RULES, Rule, unknown
from vitx.tape.rules import averages as averages
from vitx.tape.rules import elementwise as elementwise
from vitx.tape.rules import linear as linear
from vitx.tape.rules import norms as norms
from vitx.tape.rules import products as products
from vitx.tape.rules import shapes as shapes
from vitx.tape.rules import sums as sums


def rule_of(call: Call) -> Rule:
    """Returns the rule of a call."""
    return RULES.get(call.name, unknown)

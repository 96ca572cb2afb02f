"""How relevance and the gradient of the linearised network go back through each operator.

A rule is found by the operator's name alone. `views` and `rearranged` move elements, `contractions`,
`attention` and `convolution` multiply and add up; `products`, `elementwise`, `norms` and `sums` leave
elements where they are.
"""

from vitx.tape.call import RULES, Call, Rule, unknown
from vitx.tape.rules import contractions, convolution, norms, rearranged  # noqa: F401, and the rules they use


def rule_of(call: Call) -> Rule:
    """Returns the rule of a call; a view that is a copy, as functionalised programs have it, is as any."""
    found = RULES.get(call.name)
    return found or RULES.get(call.name.removesuffix("_copy"), unknown)

"""The gradient of a score, along the tape and without autograd."""

from collections.abc import Collection

from torch import Tensor

from vitx.errors import VitxError
from vitx.tape.tape import Tape
from vitx.tape.values import Step, Value
from vitx.tape.walk import Sent, Walk, walk


def gradients(
    tape: Tape, starts: dict[Value, Tensor], watched: Collection[Value], *, whole: bool = False
) -> Walk:
    """Takes the gradient of a score back along the tape, in the network for which it was recorded.

    Args:
        tape: the pass.
        starts: the gradient of the score with respect to what it was read from.
        watched: the values whose gradient is asked for.
        whole: whether it is also that of the image and of the model's constants.

    Raises:
        VitxError: It reached an operator without a rule.
    """
    first = min((value.made_by.index for value in watched if value.made_by is not None), default=0)

    def send(step: Step, arrived: list[Tensor]) -> Sent:
        if step.gradient is None:
            raise VitxError(f"the gradient reached {told(step)}, and no rule takes it through that call")
        return zip(step.sources, step.gradient(arrived), strict=False)

    return walk(tape, starts, send, watched=watched, steps=range(0 if whole else first, len(tape.steps)))


def told(step: Step) -> str:
    """Names a step as a user knows it."""
    if step.place is None:
        return step.name
    module, line = step.place
    return f"{step.name}, in {module}" + (f" (`{line}`)" if line else "")

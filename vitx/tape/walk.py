"""The one loop of both ways back: last step first, a dictionary of what has arrived so far."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from vitx.tape.expanded import added
from vitx.tape.tape import Tape
from vitx.tape.values import Step, Value

Sent = Iterable[tuple[Value, Tensor | None]]


@dataclass
class Walk:
    """What a way back found.

    Attributes:
        arrived: at values that no step made, or at which it ended.
        passed: at the values that were asked for.
    """

    arrived: dict[Value, Tensor]
    passed: dict[Value, Tensor] = field(default_factory=dict)


def walk(
    tape: Tape,
    starts: dict[Value, Tensor],
    send: Callable[[Step, list[Tensor]], Sent],
    *,
    ends: Collection[Value] = (),
    watched: Collection[Value] = (),
    steps: range | None = None,
) -> Walk:
    """Takes what begins at some values back along the steps.

    Args:
        tape: the pass.
        starts: what begins where.
        send: says what a step sends where, from what arrived at its outputs.
        ends: values at which it stays.
        watched: values at which it is asked what passed.
        steps: which of them; all by default.
    """
    found = Walk(dict(starts))
    arrived = found.arrived
    for index in reversed(range(len(tape.steps)) if steps is None else steps):
        step = tape.steps[index]
        here = [output for output in step.outputs if output in arrived and output not in ends]
        if not here:
            continue
        some = {output: arrived.pop(output) for output in here}
        like = some[here[0]]
        for output in here:
            if output in watched:
                found.passed[output] = some[output]
        given = [
            some[output] if output in some else like.new_zeros(()).expand(output.shape)
            for output in step.outputs
        ]
        for value, part in send(step, given):
            if part is not None:
                arrived[value] = added(arrived[value], part) if value in arrived else part
    return found

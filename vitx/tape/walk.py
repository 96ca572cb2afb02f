"""The one loop of all ways back: last step first, a dictionary of what has arrived so far."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.models.isolation import without_autocast
from vitx.tape.attention import Attention
from vitx.tape.axes import Axes, channel_dims
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

    def at(self, attention: Attention) -> Tensor:
        """Returns what passed an attention, (T, H, Q, d): 0 where nothing did."""
        like, value = attention.weights, attention.value
        zero = torch.zeros((), dtype=like.dtype, device=like.device)
        return attention.arrived(self.passed.get(value, zero.expand(value.shape)))


def walk(
    tape: Tape,
    starts: dict[Value, Tensor],
    send: Callable[[Step, list[Tensor]], Sent],
    *,
    watched: Collection[Value] = (),
    steps: range | None = None,
) -> Walk:
    """Takes what begins at some values back along the steps: `send` says what a step sends where."""
    found, watched = Walk(dict(starts)), frozenset(watched)
    arrived = found.arrived
    for index in reversed(range(len(tape.steps)) if steps is None else steps):
        step = tape.steps[index]
        some = {value: arrived.pop(value) for value in step.outputs if value in arrived}
        if not some:
            continue
        for value in watched.intersection(some):
            found.passed[value] = some[value]
        if len(some) < len(step.outputs):
            zero = next(iter(some.values())).new_zeros(())
            some = {value: some.get(value, zero.expand(value.shape)) for value in step.outputs}
        for value, part in send(step, list(some.values())):
            if part is not None:
                arrived[value] = added(arrived[value], part) if value in arrived else part
    return found


def through(step: Step, arrived: list[Tensor]) -> Sent:
    """Sends relevance through a step for which no method has a rule of its own."""
    return [] if step.relevance is None else zip(step.inputs, step.relevance(arrived), strict=False)


def gradients(
    tape: Tape, starts: dict[Value, Tensor], watched: Collection[Value], *, whole: bool = False
) -> Walk:
    """Takes the gradient of a score back along the tape, in the network for which it was recorded.

    It goes to the watched values; where it is `whole`, on to the image and the model's constants. At its
    starts it is known: nothing that arrives there is added.
    """

    def send(step: Step, arrived: list[Tensor]) -> Sent:
        if step.gradient is None:
            raise VitxError(f"the gradient reached {step}, and no rule takes it through that call")
        pairs = zip(step.sources, step.gradient(arrived), strict=False)
        return [(value, part) for value, part in pairs if value not in starts]

    first = min((value.made_by.index for value in watched if value.made_by is not None), default=0)
    with torch.no_grad(), without_autocast(next(iter(starts.values())).device):
        return walk(tape, starts, send, watched=watched, steps=range(0 if whole else first, len(tape.steps)))


def marks(shape: Sequence[int], axes: Axes = ()) -> Tensor:
    """Returns numbers that tell tokens apart on a way back: the same for all channels of a token."""
    channels = channel_dims(axes)
    sizes = [1 if dim in channels else size for dim, size in enumerate(shape)]
    found = torch.rand(sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    return found.expand(*shape)

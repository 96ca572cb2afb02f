"""The loop behind all backward walks: last step first, with a dictionary of what has arrived so far."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.functional.weights import Fuse, Weights
from vitx.models.isolation import without_autocast
from vitx.tape.attention import Attention
from vitx.tape.axes import Axes, channel_dims
from vitx.tape.expanded import added
from vitx.tape.tape import Tape
from vitx.tape.tensors import Kept
from vitx.tape.values import Step, Value

Sent = Iterable[tuple[Value, Tensor | None]]


@dataclass
class Walk:
    """The result of a backward walk.

    Attributes:
        arrived: what arrived at values that no step made, or where the walk ended.
        passed: what passed the watched values.
        fused: one matrix in place of A and its gradient, for attentions whose heads were fused on the way.
        products: what passed some values, times their tensors.
    """

    arrived: dict[Value, Tensor]
    passed: dict[Value, Tensor] = field(default_factory=dict)
    fused: dict[Attention, Weights] = field(default_factory=dict)
    products: dict[Value, Tensor] = field(default_factory=dict)

    def at(self, attention: Attention) -> Tensor:
        """Return what passed an attention, (T, H, Q, d); 0 if nothing did."""
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
    """Walk back along the steps from some values; `send` returns what a step sends to which values."""
    found, watched = Walk(dict(starts)), frozenset(watched)
    arrived = found.arrived
    for index in reversed(range(len(tape.steps)) if steps is None else steps):
        step = tape.steps[index]
        some = [arrived.pop(value, None) for value in step.outputs]
        given = [part for part in some if part is not None]
        if not given:
            continue
        if watched:
            pairs = zip(step.outputs, some, strict=True)
            found.passed |= {value: part for value, part in pairs if value in watched and part is not None}
        if len(given) < len(some):
            zero, pairs = given[0].new_zeros(()), zip(step.outputs, some, strict=True)
            given = [zero.expand(value.shape) if part is None else part for value, part in pairs]
        for value, part in send(step, given):
            if part is not None:
                arrived[value] = added(arrived[value], part) if value in arrived else part
    return found


def through(step: Step, arrived: list[Tensor]) -> Sent:
    """Send relevance through a step by the rule of its operator, if there is one."""
    return [] if step.relevance is None else zip(step.inputs, step.relevance(arrived), strict=False)


def gradients(
    tape: Tape,
    starts: dict[Value, Tensor],
    watched: Collection[Value],
    *,
    whole: bool = False,
    fused: Mapping[Attention, Fuse] | None = None,
    times: Mapping[Value, Kept] | None = None,
) -> Walk:
    """Take the gradient of a score back along the tape, in the network for which it was recorded.

    It goes to the watched values and, if `whole`, on to the image and the model's constants. At its starts,
    it is known: whatever arrives there is ignored. On the way, it fuses the heads of some attentions, and is
    multiplied by the tensors of some values, `times`. Results that stay, even small ones, lie apart from
    temporary tensors: the memory between them could not be reused.
    """
    fused, times = fused or {}, times or {}
    found_fused, products = dict[Attention, Weights](), dict[Value, Tensor]()

    def send(step: Step, arrived: list[Tensor]) -> Sent:
        for value, g in zip(step.outputs, arrived, strict=True):
            if value in times:
                out = tape.memory.empty(g.shape, g)
                products[value] = torch.mul(times[value].tensor.to(g.dtype), g, out=out)
        if step.gradient is None:
            raise VitxError(f"the gradient reached {step}, and no rule takes it through that call")
        if isinstance(step, Attention) and step in fused:
            part, found_fused[step] = step.weights.fused_gradient(step.arrived(arrived[0]), fused[step])
            return [(step.inputs[0], step.layout.to_values(part))]
        pairs = zip(step.sources, step.gradient(arrived), strict=False)
        return [
            (value, tape.memory.keep(part) if value.is_constant and part is not None else part)
            for value, part in pairs
            if value not in starts
        ]

    ends = [value.made_by.index for value in watched if value.made_by] + [one.index for one in fused]
    first = min(ends, default=0)
    with torch.no_grad(), without_autocast(next(iter(starts.values())).device):
        found = walk(tape, starts, send, watched=watched, steps=range(0 if whole else first, len(tape.steps)))
    found.fused, found.products = found_fused, products
    return found


def marks(shape: Sequence[int], axes: Axes = ()) -> Tensor:
    """Return random numbers that identify tokens on a backward walk: equal for all channels of a token."""
    channels = channel_dims(axes)
    sizes = [1 if dim in channels else size for dim, size in enumerate(shape)]
    seed = torch.Generator().manual_seed(0)
    found = torch.rand(sizes, generator=seed, dtype=torch.float64, device="cpu") + 0.5
    return found.expand(*shape)

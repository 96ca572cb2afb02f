"""One ATen call: its arguments by name, and the values among them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from vitx.tape.axes import Axes
from vitx.tape.overload import Overload, overload
from vitx.tape.tape import Tape
from vitx.tape.tensors import Factors, Tensors
from vitx.tape.values import Back, Step, Value
from vitx.tape.vjp import Transpose


class Call:
    """A call that ran, of which at least one argument is live.

    Attributes:
        tape: the pass.
        tensors: what is known of its tensors.
        overload: the operator.
        name: its name.
        args: arguments by place.
        kwargs: arguments by name.
        live: each live tensor among them, with its value, in their order.
        values: these values.
        outs: the tensors that it put out, or wrote into.
        factors: what the output is the product of, if a rule says so.
        fused: A with its heads fused, if it was kept as the call ran.
    """

    factors: Factors = None
    fused: Tensor | None = None

    def __init__(
        self,
        tape: Tape,
        tensors: Tensors,
        overload: Overload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        live: Sequence[tuple[Tensor, Value]],
    ) -> None:
        """Describes a call before it runs."""
        self.tape, self.tensors, self.overload, self.name = tape, tensors, overload, overload.name
        self.args, self.kwargs, self.live = args, kwargs, live
        self.values = [value for _, value in live]
        self.outs: Sequence[Tensor] = ()

    def __getitem__(self, name: str) -> Any:
        """Returns an argument by its name in the schema; its default, or None, where it was not given."""
        place = self.overload.places.get(name)
        if place is not None and place < len(self.args):
            return self.args[place]
        return self.kwargs.get(name, self.overload.defaults.get(name))

    def value(self, tensor: Any) -> Value | None:
        """Returns the value of an argument; None if it is not live."""
        for one, value in self.live:
            if one is tensor:
                return value
        return None

    @property
    def out(self) -> Tensor:
        """The first output."""
        return self.outs[0]

    @property
    def linearised(self) -> bool:
        """Whether the gradient of the linearised network will be asked for."""
        return self.tape.network == "linearised"

    def is_fixed(self, constant: Tensor) -> bool:
        """Returns whether a constant was not learned."""
        return self.tensors.is_fixed(constant)

    def factors_of(self, tensor: Tensor) -> Factors:
        """Returns what a tensor is the product of, element by element, where that is known."""
        known = self.tensors.get(tensor)
        return None if known is None else known.factors

    def learned(self, weight: Tensor | None) -> Tensor | None:
        """Returns a weight that stays: as it is, or a copy where the model lets go of it after the call."""
        if weight is None or self.tape.network is None or self.tensors.is_of_model(weight):
            return weight
        return weight.detach().clone()

    def inner(self, function: Any, *args: Tensor) -> "Call":
        """Returns a call that is a part of this one, as the product in a sum of something and a product."""
        live = [(tensor, value) for tensor, value in self.live if any(tensor is one for one in args)]
        part = Call(self.tape, self.tensors, overload(function), args, {}, live)
        part.outs = self.outs
        return part

    def answers(self) -> list[Value]:
        """Returns the live values of which masks and indices among the arguments were made."""
        given = self.overload.tensors(self.args, self.kwargs)
        known = [self.tensors.get(tensor) for tensor in given if not tensor.is_floating_point()]
        return [one.source for one in known if one is not None and one.source is not None]

    def constants(self) -> list[Tensor]:
        """Returns the floating-point tensors among the arguments that are not live."""
        read = {name: value for name, value in self.kwargs.items() if name not in self.overload.written}
        given = self.overload.tensors(self.args, read)
        return [tensor for tensor in given if tensor.is_floating_point() and self.value(tensor) is None]

    def make(
        self,
        inputs: Sequence[Value],
        relevance: Back | None,
        gradient: Back | None = None,
        *,
        sources: Sequence[Value] | None = None,
        axes: Callable[[list[Axes]], Axes | None] | None = None,
        name: str | None = None,
        kind: Callable[..., Step] = Step,
        exact: bool = False,
        outs: Sequence[Tensor] = (),
    ) -> Value:
        """Adds the step of this call, and returns the value of its first output.

        Args:
            inputs: where relevance goes.
            relevance: as for `Step`.
            gradient: of the linearised network, as for `Step`.
            sources: where the gradient goes; the inputs by default.
            axes: as for `Step`.
            name: of the step; that of the operator by default.
            kind: of the step.
            exact: whether the gradient is that of the network as it is, too.
            outs: the outputs that get a value; the first one by default.
        """
        tape, given = self.tape, self.values
        if inputs != given:
            given = [*given, *inputs]
        made = [tape.value(out.shape, given) for out in outs or self.outs[:1]]
        if tape.network is None:
            gradient = None
        elif tape.network == "plain" and not exact:
            tensors = [tensor for tensor, _ in self.live]
            sources, gradient = self.values, Transpose(self, tensors, tensors)
        tape.append(kind(name or self.name, inputs, made, relevance, gradient, sources, axes))
        return made[0]

    def make_all(
        self, inputs: Sequence[Value], relevance: Back | None, gradient: Back | None = None, **options: Any
    ) -> list[Value]:
        """Does the same for a call of several outputs, and returns the values of all."""
        step = self.make(inputs, relevance, gradient, outs=self.outs, **options).made_by
        assert step is not None
        return step.outputs

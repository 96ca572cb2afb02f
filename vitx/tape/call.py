"""One ATen call: its arguments by name, and the values among them."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitx.tape.axes import Axes
from vitx.tape.tape import Tape
from vitx.tape.values import Back, Step, Value
from vitx.tape.vjp import Transpose


class Overload(NamedTuple):
    """What is known of an operator.

    Attributes:
        function: the overload.
        name: of the operator, without the underscore of what writes in place.
        places: of its arguments.
        defaults: of its arguments.
        written: the arguments that it writes its result into.
        composite: whether it is made of other operators, and of nothing else.
        views: whether it returns views of its first argument.
    """

    function: Any
    name: str
    places: dict[str, int]
    defaults: dict[str, Any]
    written: tuple[str, ...]
    composite: bool
    views: bool


@cache
def overload(function: Any) -> Overload:
    """Reads the schema of an operator, once."""
    schema = function._schema
    name = schema.name.partition("::")[2]
    if not schema.name.startswith("aten::"):
        name = schema.name
    in_place = name.endswith("_") and not name.endswith("__")
    arguments = list(schema.arguments)
    into = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    by_name = {a.name for a in arguments if a.kwarg_only}
    written = tuple(into[:1]) if in_place else tuple(n for n in into if n in by_name)
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return Overload(
        function,
        name.removesuffix("_") if in_place else name,
        {a.name: place for place, a in enumerate(arguments)},
        {a.name: a.default_value for a in arguments if a.has_default_value()},
        written,
        torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), key),
        not written and any(r.alias_info is not None for r in schema.returns),
    )


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """Yields the tensors among arguments or results, in their order."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(*value)
        elif isinstance(value, dict):
            yield from tensors_in(*value.values())


class Call:
    """A call that ran, of which at least one argument is live.

    Attributes:
        tape: the pass.
        overload: the operator.
        name: its name.
        args: arguments by place.
        kwargs: arguments by name.
        live: each live tensor among them, with its value, in their order.
        outs: the tensors that it put out, or wrote into.
        is_fixed: tells whether a constant was not learned.
        factors_of: tells what a tensor is the product of, element by element.
        answer_of: tells of which live value a mask or an index was made.
        passing: tells whether a weight may be gone after the call, as that of a sharded model.
        factors: what the output is the product of, if a rule says so.
        fused: A with its heads fused, if it was kept as the call ran.
    """

    def __init__(
        self,
        tape: Tape,
        known: Overload,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        live: list[tuple[Tensor, Value]],
        is_fixed: Callable[[Tensor], bool],
        factors_of: Callable[[Tensor], Any],
        answer_of: Callable[[Tensor], Value | None],
        passing: Callable[[Tensor], bool],
    ) -> None:
        """Describes a call before it runs."""
        self.tape, self.overload, self.name = tape, known, known.name
        self.args, self.kwargs, self.live = args, kwargs, live
        self.outs: list[Tensor] = []
        self.is_fixed, self.factors_of, self.answer_of = is_fixed, factors_of, answer_of
        self.passing = passing
        self.factors: list[tuple[Tensor, Value | None]] | None = None
        self.fused: Tensor | None = None

    def __getitem__(self, name: str) -> Any:
        """Returns an argument by its name in the schema; its default, or None, where it was not given."""
        place = self.overload.places.get(name)
        if place is not None and place < len(self.args):
            return self.args[place]
        return self.kwargs[name] if name in self.kwargs else self.overload.defaults.get(name)

    def value(self, tensor: Any) -> Value | None:
        """Returns the value of an argument; None if it is not live."""
        return next((value for one, value in self.live if one is tensor), None)

    @property
    def out(self) -> Tensor:
        """The first output."""
        return self.outs[0]

    @property
    def values(self) -> list[Value]:
        """The values of the live arguments."""
        return [value for _, value in self.live]

    @property
    def linearised(self) -> bool:
        """Whether the gradient of the linearised network will be asked for."""
        return self.tape.network == "linearised"

    def learned(self, weight: Tensor | None) -> Tensor | None:
        """Returns a weight that stays: as it is, or a copy where the model lets go of it after the call."""
        if weight is None or self.tape.network is None or not self.passing(weight):
            return weight
        return weight.detach().clone()

    def inner(self, function: Any, *args: Tensor) -> "Call":
        """Returns a call that is a part of this one, as the product in a sum of something and a product."""
        given = [(t, v) for t, v in self.live if any(t is one for one in args)]
        part = Call(
            *(self.tape, overload(function), args, {}, given),
            self.is_fixed,
            self.factors_of,
            self.answer_of,
            self.passing,
        )
        part.outs = self.outs
        return part

    def answers(self) -> list[Value]:
        """Returns the live values of which masks and indices among the arguments were made."""
        given = tensors_in(self.args, self.kwargs)
        return [v for t in given if not t.is_floating_point() and (v := self.answer_of(t)) is not None]

    def constants(self) -> list[Tensor]:
        """Returns the floating-point tensors among the arguments that are not live."""
        given = tensors_in(
            self.args, {k: v for k, v in self.kwargs.items() if k not in self.overload.written}
        )
        return [t for t in given if t.is_floating_point() and self.value(t) is None]

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
        """
        (found,) = self.make_all(
            *(inputs, relevance, gradient),
            outs=[self.out],
            sources=sources,
            axes=axes,
            name=name,
            kind=kind,
            exact=exact,
        )
        return found

    def make_all(
        self,
        inputs: Sequence[Value],
        relevance: Back | None,
        gradient: Back | None = None,
        *,
        outs: Sequence[Tensor] | None = None,
        sources: Sequence[Value] | None = None,
        axes: Callable[[list[Axes]], Axes | None] | None = None,
        name: str | None = None,
        kind: Callable[..., Step] = Step,
        exact: bool = False,
    ) -> list[Value]:
        """Does the same for a call of several outputs."""
        tape = self.tape
        given = list(dict.fromkeys([*self.values, *inputs]))
        outputs = [tape.value(out.shape, given) for out in (self.outs if outs is None else outs)]
        if tape.network is None:
            gradient = None
        elif tape.network == "plain" and not exact:
            sources, gradient = self.values, Transpose.plain(self)
        step = kind(name or self.name, inputs, outputs, relevance, gradient, sources, axes)
        tape.append(step)
        return outputs

"""One ATen call: its operator, its arguments by name, and the values among them; and the rules for calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitx.tape.tape import Tape
from vitx.tape.tensors import Factors, Tensors
from vitx.tape.values import AxesOf, Back, Step, Value
from vitx.tape.vjp import Transpose


class Overload(NamedTuple):
    """What the schema of an operator says.

    Attributes:
        name: of the operator, without the underscore of what writes in place.
        places: of its arguments, as `defaults`.
        holders: name and place of each argument that may hold tensors.
        written: the arguments that it writes its result into; its first one if it works `in_place`.
        composite: whether it is made of other operators, and of nothing else.
        views: whether it returns views of its first argument.
    """

    function: Any
    name: str
    places: dict[str, int]
    defaults: dict[str, Any]
    holders: list[tuple[str, int]]
    written: list[str]
    in_place: bool
    composite: bool
    views: bool

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Lists the tensors among arguments."""
        found: list[Tensor] = []
        for name, place in self.holders:
            given = args[place] if place < len(args) else kwargs.get(name)
            if isinstance(given, Tensor):
                found.append(given)
            elif given is not None:
                found += tensors_in(given)
        return found


@cache
def overload(function: Any) -> Overload:
    """Reads the schema of an operator, once."""
    schema = function._schema
    name = schema.name.removeprefix("aten::")
    in_place = name.endswith("_") and not name.endswith("__")
    places = {a.name: place for place, a in enumerate(schema.arguments)}
    into = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    written = [a.name for a in into if in_place or a.kwarg_only][: 1 if in_place else None]
    return Overload(
        function,
        name.removesuffix("_") if in_place else name,
        places,
        {a.name: a.default_value for a in schema.arguments if a.has_default_value()},
        [(a.name, places[a.name]) for a in schema.arguments if "Tensor" in str(a.type)],
        written,
        in_place,
        torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"),
        not written and any(r.alias_info is not None for r in schema.returns),
    )


def tensors_in(value: Any) -> list[Tensor]:
    """Lists the tensors in an argument or a result, in their order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for one in value for tensor in tensors_in(one)]


@dataclass(eq=False)
class Call:
    """A call that ran, of which at least one argument is live.

    Attributes:
        tensors: what is known of those of the pass.
        live: each live tensor among the arguments, with its value, in their order.
        outs: the tensors that it put out, or wrote into.
        factors: what the output is the product of, if a rule says so.
        fused: A with its heads fused, if it was kept as the call ran.
    """

    tape: Tape
    tensors: Tensors
    overload: Overload
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    live: Sequence[tuple[Tensor, Value]]
    outs: Sequence[Tensor] = ()
    factors: Factors = None
    fused: Tensor | None = None

    def __post_init__(self) -> None:
        self.name = self.overload.name
        self.values = [value for _, value in self.live]

    def __getitem__(self, name: str) -> Any:
        """Returns an argument by its name in the schema; its default, or None, where it was not given."""
        place = self.overload.places.get(name)
        if place is not None and place < len(self.args):
            return self.args[place]
        return self.kwargs.get(name, self.overload.defaults.get(name))

    def value(self, tensor: Any) -> Value | None:
        """Returns the value of an argument; None if it is not live."""
        return next((value for one, value in self.live if one is tensor), None)

    @property
    def out(self) -> Tensor:
        """The first output."""
        return self.outs[0]

    @property
    def linearised(self) -> bool:
        """Whether the gradient of the linearised network will be asked for."""
        return self.tape.network == "linearised"

    def factors_of(self, tensor: Tensor) -> Factors:
        """Returns what a tensor is the product of, element by element; None where that is not known."""
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
        return Call(self.tape, self.tensors, overload(function), args, {}, live, self.outs)

    def answers(self) -> list[Value]:
        """Returns the live values of which masks and indices among the arguments were made."""
        return [known.source for known in map(self.tensors.get, self._given()) if known and known.source]

    def constants(self) -> list[Tensor]:
        """Returns the floating-point tensors among the arguments that are not live."""
        return [one for one in self._given() if one.is_floating_point() and self.value(one) is None]

    def _given(self) -> list[Tensor]:
        """Lists the tensors among the arguments, but those by name that it only writes into."""
        read = {name: value for name, value in self.kwargs.items() if name not in self.overload.written}
        return self.overload.tensors(self.args, read)

    def make(
        self,
        inputs: Sequence[Value],
        relevance: Back | None,
        gradient: Back | None = None,
        *,
        sources: Sequence[Value] | None = None,
        axes: AxesOf | None = None,
        name: str | None = None,
        kind: Callable[..., Step] = Step,
        exact: bool = False,
        outs: Sequence[Tensor] = (),
    ) -> Value:
        """Adds the step of this call, and returns the value of its first output.

        All is as for `Step`, but the gradient is that of the linearised network; where it is `exact`, it is
        that of the network as it is, too. `outs` are the outputs that get a value: by default, the first one.
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

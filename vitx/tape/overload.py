"""Operators, as their schemas describe them, and the tensors among what they are given."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Overload(NamedTuple):
    """What is known of an operator.

    Attributes:
        function: the overload.
        name: of the operator, without the underscore of what writes in place.
        places: of its arguments.
        defaults: of its arguments.
        holders: place and name of each argument that may hold tensors.
        written: the arguments that it writes its result into.
        in_place: whether it writes into its first argument.
        composite: whether it is made of other operators, and of nothing else.
        views: whether it returns views of its first argument.
    """

    function: Any
    name: str
    places: dict[str, int]
    defaults: dict[str, Any]
    holders: list[tuple[int, str]]
    written: Sequence[str]
    in_place: bool
    composite: bool
    views: bool

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Lists the tensors among arguments."""
        found: list[Tensor] = []
        for place, name in self.holders:
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
    library, _, name = schema.name.partition("::")
    in_place = name.endswith("_") and not name.endswith("__")
    name = name if library == "aten" else schema.name
    arguments = list(schema.arguments)
    into = [a for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    written = [a.name for a in (into[:1] if in_place else into) if in_place or a.kwarg_only]
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return Overload(
        function,
        name.removesuffix("_") if in_place else name,
        {a.name: place for place, a in enumerate(arguments)},
        {a.name: a.default_value for a in arguments if a.has_default_value()},
        [(place, a.name) for place, a in enumerate(arguments) if "Tensor" in str(a.type)],
        written,
        in_place,
        torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), key),
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

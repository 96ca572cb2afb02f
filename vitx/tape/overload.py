"""The schemas of operators, each read once."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

# The dtypes of tensors that wrap numbers.
WRAPPED = {bool: torch.bool, int: torch.int64, float: torch.float64}


class Overload:
    """The schema of an operator."""

    def __init__(self, function: Any) -> None:
        schema = function._schema
        name = schema.name.removeprefix("aten::")
        into = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        self.function = function
        self.in_place = name.endswith("_") and not name.endswith("__")  # it writes into its first argument
        self.name: str = name.removesuffix("_") if self.in_place else name
        self.places = {a.name: place for place, a in enumerate(schema.arguments)}
        self.defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        written = into[:1] if self.in_place else [a for a in into if a.kwarg_only]
        self.written = [a.name for a in written]  # the arguments that it writes its result into
        # Whether it returns views of its first argument; reads only the shape and type of that argument; is
        # composed entirely of other operators.
        self.views = not self.written and any(r.alias_info is not None for r in schema.returns)
        self.makes_new = name.startswith("new_") or name.endswith("_like")
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        self.composite = has_kernel(function.name(), "CompositeImplicitAutograd")
        numbers = torch._C._should_allow_numbers_as_tensors(name)
        self._tensors = [] if numbers else [isinstance(a.type, torch.TensorType) for a in schema.arguments]

    def wrapped(self, args: Sequence[Any]) -> Sequence[Any]:
        """Turn numbers into tensors where the operator needs them: torch unwraps those of frozen graphs."""
        found = list(args)
        for place, needed in enumerate(self._tensors[: len(found)]):
            dtype = WRAPPED.get(type(found[place])) if needed else None
            if dtype is not None:
                found[place] = torch.scalar_tensor(found[place], dtype=dtype, device="cpu")
        return found


overload = cache(Overload)  # each schema is read once


def tensors_in(*values: Any) -> list[Tensor]:
    """List the tensors in arguments or results, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            if value and type(value[0]) is not int:  # not a shape
                found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found

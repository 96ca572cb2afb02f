"""Tensors in nested structures, by their paths."""

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

_LIBRARIES = ("builtins", "torch")  # whose objects are leaves


def tensors_of(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a structure with its path of keys, positions and attributes, such as `1.age`."""
    if isinstance(value, Tensor):
        yield path, value
    for name, part in _parts(value).items():
        yield from tensors_of(part, f"{path}.{name}" if path else name)


def last(path: str) -> str:
    """Return the last part of a path: the tensor's key, position or attribute."""
    return path.rsplit(".", 1)[-1]


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return a copy of a structure with a function applied to each leaf."""
    if not (parts := _parts(value)):
        return function(value)
    made = {name: mapped(part, function) for name, part in parts.items()}
    if hasattr(value, "_make"):  # a named tuple
        return value._make(made.values())
    if isinstance(value, (tuple, list)):
        return type(value)(made.values())
    found, keyed = copy.copy(value), isinstance(value, Mapping)
    for name, part in zip([*value] if keyed else made, made.values(), strict=True):
        (operator.setitem if keyed else setattr)(found, name, part)
    return found


def _parts(value: Any) -> dict[str, Any]:
    """Return the items of a mapping, tuple or list, or the attributes of a plain object, by name."""
    held: Mapping[Any, Any] = {}
    if isinstance(value, Mapping):
        held = value
    elif hasattr(value, "_asdict"):
        held = value._asdict()
    elif isinstance(value, (tuple, list)):
        held = dict(enumerate(value))
    elif type(value).__module__.split(".")[0] not in _LIBRARIES and not callable(value):
        held = getattr(value, "__dict__", {})
    return {str(name): part for name, part in held.items()}

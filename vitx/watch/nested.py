"""Tensors in nested structures, by the path that leads to them."""

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

_LIBRARIES = ("builtins", "torch")  # whose objects are no structures


def tensors_of(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a structure with its path, as `1.age`: keys, positions and attributes."""
    if isinstance(value, Tensor):
        yield path, value
    for name, part in _parts(value).items():
        yield from tensors_of(part, f"{path}.{name}" if path else name)


def last(path: str) -> str:
    """Return the last part of a path, by which its holder calls a tensor."""
    return path.rsplit(".", 1)[-1]


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return a copy of a structure with each leaf as a function makes it."""
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
    """Return items of a mapping, a tuple or a list, or attributes of a plain object, by their names."""
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

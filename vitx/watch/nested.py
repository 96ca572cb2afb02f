"""Tensors in nested structures, by the path that leads to them."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

_LIBRARIES = ("builtins", "torch")  # whose objects are no structures


def tensors_of(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a structure with its path, as `1.age`: keys, positions and attributes."""
    if isinstance(value, Tensor):
        yield path, value
    for name, part in _parts(value):
        yield from tensors_of(part, f"{path}.{name}" if path else name)


def last(path: str) -> str:
    """Return the last part of a path, by which its holder calls a tensor."""
    return path.rsplit(".", 1)[-1]


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return a copy of a structure with each leaf as a function makes it."""
    if not (parts := dict(_parts(value))):
        return function(value)
    made = {name: mapped(part, function) for name, part in parts.items()}
    if hasattr(value, "_make"):  # a named tuple
        return value._make(made.values())
    if isinstance(value, (tuple, list)):
        return type(value)(made.values())
    found = copy.copy(value)
    for name, part in made.items():
        if isinstance(value, Mapping):
            found[next(key for key in value if str(key) == name)] = part
        else:
            setattr(found, name, part)
    return found


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield items of a mapping, a tuple or a list, or attributes of a plain object, by their names."""
    if isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif hasattr(value, "_asdict"):
        yield from value._asdict().items()
    elif isinstance(value, (tuple, list)):
        yield from ((str(place), part) for place, part in enumerate(value))
    elif type(value).__module__.split(".")[0] not in _LIBRARIES and not callable(value):
        yield from getattr(value, "__dict__", {}).items()

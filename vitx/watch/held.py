"""The parts of an object of the user's, a few levels deep, and the random numbers that it draws."""

import gc
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OPAQUE = (str, bytes, int, float, bool, type, ModuleType, Tensor, type(None))
_LIBRARIES = ("builtins", "torch", "torchvision", "lightning", "pytorch_lightning", "typing", "collections")
_DEEP = 9  # attributes of attributes
_MOST = 256  # parts of one: what has more holds samples


def held_by(*values: Any, whole: Callable[[Any], Any] = lambda one: False) -> Iterator[Any]:
    """Yield objects and what they consist of, level by level, each once; not the parts of what is `whole`.

    Nothing is computed on the way: properties of a data set may be slow. Of a function, it looks at what that
    refers to outside of itself; of an object, also at its class.
    """
    level, seen = list(values), set[int]()
    for _ in range(_DEEP):
        new = {id(one): one for one in level if id(one) not in seen and not _is_opaque(one)}
        seen.update(new)
        yield from new.values()
        level = [part for one in new.values() if not whole(one) for part in _parts(one)]


def attributes(value: Any) -> Mapping[str, Any]:
    """Return the attributes that are kept, not computed; of a function, the names it refers to."""
    if isinstance(value, FunctionType):
        return dict(_used_by(value))
    with suppress(AttributeError):
        return dict(object.__getattribute__(value, "__dict__"))
    return {}


@contextmanager
def seeded(*holders: Any) -> Iterator[None]:
    """Run its block with generators that start from the same seed each time, and put their states back.

    These are torch's (CPU and CUDA), numpy's and Python's own, and those that the holders hold. So random
    transforms give the same images in every run, and a model that hides patches hides the same ones.
    """
    devices = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    with ExitStack() as restoring:
        for one in (random, np.random, torch.default_generator, *devices, *held_by(*holders)):
            if isinstance(one, torch.Generator):
                restoring.callback(one.set_state, one.get_state())
                one.manual_seed(0)
            elif one is random or (isinstance(one, random.Random) and type(one) is not random.SystemRandom):
                restoring.callback(one.setstate, one.getstate())
                one.seed(0)
            elif one is np.random or isinstance(one, np.random.RandomState):
                restoring.callback(one.set_state, one.get_state())
                one.seed(0)
            elif isinstance(one, np.random.Generator):
                bits = one.bit_generator
                restoring.callback(setattr, bits, "state", bits.state)
                bits.state = type(bits)(0).state
        yield


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, (Mapping, list, tuple, set, partial, MethodType)):
        parts = gc.get_referents(value)
        yield from parts if len(parts) <= _MOST else ()
        return
    yield from attributes(value).values()
    for kind in type(value).__mro__:  # what all objects of a class share, and its methods refer to
        if kind.__module__.split(".")[0] not in _LIBRARIES:
            yield from vars(kind).values()


def _used_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not yet filled
            yield name, cell.cell_contents
    codes = [function.__code__]
    for code in codes:  # and those of the functions inside
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
        held = function.__globals__
        yield from ((name, held[name]) for name in code.co_names if name in held)


def _is_opaque(value: Any) -> bool:
    """Return whether to look no further: a value, or what the data belongs to."""
    if isinstance(value, nn.Module):
        return any(True for _ in value.parameters())
    trains = callable(getattr(type(value), "fit", None))  # and holds the data of the training, too
    return trains or isinstance(value, _OPAQUE)

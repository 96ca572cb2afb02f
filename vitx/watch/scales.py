"""How images were normalised: what the data holds, and what the hooks that prepare a batch hold."""

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitx.inputs.preprocessing import normalization
from vitx.pictures.colors import BYTES, UNSCALED, Scale, fits

_OTHERS = (str, bytes, int, float, bool, type, ModuleType, Tensor, type(None))
_LIBRARIES = ("builtins", "torch", "torchvision", "lightning", "pytorch_lightning", "typing", "collections")
_DEEP = 9  # attributes of attributes
_MOST = 256  # parts of one: what has more holds samples
_CHANNELS = 64  # at most
_NAMES = ("mean", "std"), ("image_mean", "image_std")  # the second ones are those of image processors


def likely_scales(
    model: nn.Module, images: Tensor, of_data: Iterable[Scale], holders: Iterable[Any] = ()
) -> Iterator[Scale]:
    """Yields the normalisations that may have made the watched images, the likeliest first.

    What the holders hold and what the model declares may be done to the images later, in its forward: it is
    left out where the images would then be neither dark nor bright anywhere.

    Args:
        model: the one that is trained.
        images: (n, C, H, W), as the model takes them.
        of_data: what the data set holds, see `held_by`.
        holders: what else may hold a normalisation.

    Yields:
        What the data holds; that which changes nothing; and what the holders hold and the model declares.
    """
    yield from of_data
    yield UNSCALED
    if bool((images == images.round()).all()):
        yield BYTES
    yield from (one for one in held_by(*holders) if fits(images, one, whole=True))
    if fits(images, declared := normalization(model), whole=True):
        yield declared


def held_by(*holders: Any) -> Iterator[Scale]:
    """Yields mean and std of each transform that a data set or a function holds, a few levels deep.

    Transforms are known by having a mean and a std, as torchvision's, albumentations', kornia's and timm's
    do: numbers, one or one for each channel. A function that refers to a mean and a std is one, too.
    """
    level, seen = list(holders), set[int]()
    for _ in range(_DEEP):
        new = {id(one): one for one in level if id(one) not in seen and not _is_no_transform(one)}
        seen.update(new)
        scales = {key: _scale(one) for key, one in new.items()}
        yield from filter(None, scales.values())
        level = [part for key, one in new.items() if scales[key] is None for part in _parts(one)]


def _scale(value: Any) -> Scale | None:
    """Mean and std, of the object itself or among its options, as kornia's augmentations have them."""
    kept = _kept(value)
    options = [one for one in (kept, kept.get("flags"), kept.get("_buffers")) if isinstance(one, Mapping)]
    for named in options if kept.get("do_normalize", True) else ():
        for names in _NAMES:
            mean, std = (_numbers(named.get(name)) for name in names)
            if mean and std and min(std) > 0:
                return mean, std
    return None


def _kept(value: Any) -> Mapping[str, Any]:
    """The attributes that are kept, not computed: those of a data set may be slow, or not be there.

    Of a function, what it refers to outside of itself.
    """
    if isinstance(value, FunctionType):
        return dict(_used_by(value))
    if isinstance(value, torch.jit.ScriptModule):  # whose attributes are not Python's
        known = {name: getattr(value, name, None) for names in _NAMES for name in names}
        return {**known, **dict(value.named_children())}
    with suppress(AttributeError):
        return dict(object.__getattribute__(value, "__dict__"))
    return {}


def _numbers(value: Any) -> tuple[float, ...]:
    with suppress(TypeError, ValueError, RuntimeError):
        numbers = torch.as_tensor(value, dtype=torch.float64).flatten()
        return tuple(numbers.tolist()) if len(numbers) <= _CHANNELS and not isinstance(value, bool) else ()
    return ()


def _parts(value: Any) -> Iterator[Any]:
    """What an object consists of."""
    if isinstance(value, (Mapping, list, tuple, set, partial, MethodType)):
        parts = gc.get_referents(value)
        yield from parts if len(parts) <= _MOST else ()
    else:
        yield from _kept(value).values()
        for kind in type(value).__mro__:  # what all objects of a class share, and its methods refer to
            if kind.__module__.split(".")[0] not in _LIBRARIES:
                yield from vars(kind).values()


def _used_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function refers to outside of itself, with its name."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not yet filled
            yield name, cell.cell_contents
    codes = [function.__code__]
    for code in codes:  # and those of the functions inside
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
        held = function.__globals__
        yield from ((name, held[name]) for name in code.co_names if name in held)


def _is_no_transform(value: Any) -> bool:
    """Whether to look no further: values, and what the data belongs to."""
    if isinstance(value, nn.Module):
        return any(True for _ in value.parameters())
    trains = callable(getattr(type(value), "fit", None))  # and holds the data of the training, too
    return trains or isinstance(value, _OTHERS)

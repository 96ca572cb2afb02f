"""How images were normalised: what the data says of it, and what the hooks that prepare a batch hold."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitx.inputs.preprocessing import normalisation
from vitx.pictures.colours import UNSCALED, Colours, Scale, choose_colours

_OTHERS = (str, bytes, int, float, bool, type, ModuleType, Tensor)
_LIBRARIES = ("builtins", "torch", "torchvision", "lightning", "pytorch_lightning", "typing", "collections")
_DEEP = 12  # attributes of attributes
_MOST = 20_000  # objects looked at


def true_colours(
    model: nn.Module,
    images: Tensor,
    of_data: Iterable[Scale],
    holders: Iterable[Any] = (),
    given: Scale | None = None,
    bands: Sequence[int] | None = None,
) -> Colours:
    """Finds how the watched images are shown.

    Args:
        model: as for `likely_scales`.
        images: as for `likely_scales`.
        of_data: as for `likely_scales`.
        holders: as for `likely_scales`.
        given: mean and std that were asked for; then nothing is searched.
        bands: the channels to show.

    Raises:
        VitxError: Mean, std or bands do not fit the images.
    """
    return choose_colours(images, likely_scales(model, images, of_data, holders), bands, given)


def likely_scales(
    model: nn.Module, images: Tensor, of_data: Iterable[Scale], holders: Iterable[Any] = ()
) -> Iterator[Scale]:
    """Yields the normalisations that may have made the watched images, the likeliest first.

    Args:
        model: the one that is trained.
        images: (n, C, H, W), as the model takes them.
        of_data: what the data set holds, see `held_by`.
        holders: what else may hold a normalisation.

    Yields:
        What the data holds; what the holders hold beside networks; that which changes nothing, if
        all values lie in [0, 1]; and what the model declares.
    """
    yield from of_data
    yield from held_by(list(holders))
    if images.amin() >= 0 and images.amax() <= 1:
        yield UNSCALED
    yield normalisation(model)
    yield UNSCALED


def held_by(value: Any) -> Iterator[Scale]:
    """Yields mean and std of each transform that a data set, or what it consists of, holds.

    Transforms are known by having a mean and a std, as torchvision's, albumentations', kornia's and timm's
    do: numbers, one or one for each channel.
    """
    seen: set[int] = set()
    waiting = [(value, 0)]
    while waiting and len(seen) < _MOST:
        one, deep = waiting.pop(0)
        if id(one) in seen or _is_no_transform(one):
            continue
        seen.add(id(one))
        scale = _scale(one)
        if scale is not None:
            yield scale
        elif deep < _DEEP:
            waiting += [(part, deep + 1) for part in _parts(one)]


def _scale(value: Any) -> Scale | None:
    """Mean and std, of the object itself or among its options, as kornia's augmentations have them."""
    kept = _kept(value)
    for named in (kept, kept.get("flags"), kept.get("_buffers")):
        if isinstance(named, Mapping):
            mean, std = _numbers(named.get("mean")), _numbers(named.get("std"))
            if mean and std and all(number > 0 for number in std):
                return mean, std
    return None


def _kept(value: Any) -> Mapping[str, Any]:
    """The attributes that are kept, not computed: those of a data set may be slow, or not be there."""
    try:
        kept = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return kept if isinstance(kept, Mapping) else {}


def _numbers(value: Any) -> tuple[float, ...]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (float(value),)
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64).flatten()
    except (TypeError, ValueError, RuntimeError):
        return ()
    return tuple(numbers.tolist()) if 0 < len(numbers) <= 64 else ()


def _parts(value: Any) -> Iterator[Any]:
    """What an object consists of; of long collections the first items, which are samples."""
    if isinstance(value, Mapping):
        yield from list(value.values())[:64]
    elif isinstance(value, (list, tuple, set)):
        yield from list(value)[:64]
    else:
        yield from _kept(value).values()
        if isinstance(value, MethodType):
            yield value.__self__
            yield value.__func__
        if isinstance(value, partial):
            yield from (value.func, value.args, value.keywords)
        if isinstance(value, FunctionType):
            yield from _used_by(value)
        for kind in type(value).__mro__:  # what all objects of a class share, and its methods refer to
            if kind.__module__.split(".")[0] not in _LIBRARIES:
                yield from vars(kind).values()


def _used_by(function: FunctionType) -> Iterator[Any]:
    """What a function refers to outside of itself."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not yet filled
            yield cell.cell_contents
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
        yield from (function.__globals__[name] for name in code.co_names if name in function.__globals__)


def _is_no_transform(value: Any) -> bool:
    """Whether to look no further: values, and what the data belongs to."""
    if isinstance(value, nn.Module):
        return any(True for _ in value.parameters())
    trains = callable(getattr(type(value), "fit", None))  # and holds the data of the training, too
    return value is None or trains or isinstance(value, _OTHERS)

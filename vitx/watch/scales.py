"""Normalizations of images: those that the data holds, and those of hooks that prepare a batch."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from vitx.inputs.preprocessing import normalization
from vitx.pictures.colors import BYTES, UNSCALED, Scale, fits
from vitx.watch.held import attributes, held_by

_CHANNELS = 64  # at most
_NAMES = ("mean", "std"), ("image_mean", "image_std")  # the second ones are those of image processors


def likely_scales(
    model: nn.Module, images: Tensor, of_data: Iterable[Scale], holders: Iterable[Any] = ()
) -> Iterator[Scale]:
    """Yield the normalizations that may have made the watched images, the likeliest first.

    First comes what the data holds. What the holders hold and the model declares may be done to the images,
    (n, C, H, W), later, in its forward: it is left out where they would be neither dark nor bright anywhere.
    """
    yield from of_data
    yield UNSCALED
    if bool((images == images.round()).all()):
        yield BYTES
    yield from (one for one in scales_in(*holders) if fits(images, one, whole=True))
    if fits(images, declared := normalization(model), whole=True):
        yield declared


def scales_in(*holders: Any) -> Iterator[Scale]:
    """Yield mean and std of each transform that a data set or a function holds, a few levels deep.

    A transform is what has a mean and a std, one or one for each channel, as torchvision's, albumentations',
    kornia's and timm's do, or refers to them, as a function.
    """
    yield from filter(None, map(_scale, held_by(*holders, whole=_scale)))


def _scale(value: Any) -> Scale | None:
    """Return mean and std of an object, or among its options, as kornia's augmentations have them."""
    kept = attributes(value)
    if isinstance(value, torch.jit.ScriptModule):  # whose attributes are not Python's
        kept = {name: getattr(value, name, None) for names in _NAMES for name in names}
    options = [one for one in (kept, kept.get("flags"), kept.get("_buffers")) if isinstance(one, Mapping)]
    for named in options if kept.get("do_normalize", True) else ():
        for names in _NAMES:
            mean, std = (_numbers(named.get(name)) for name in names)
            if mean and std and min(std) > 0:
                return mean, std
    return None


def _numbers(value: Any) -> tuple[float, ...]:
    with suppress(TypeError, ValueError, RuntimeError):
        numbers = torch.as_tensor(value, dtype=torch.float64).flatten()
        return tuple(numbers.tolist()) if len(numbers) <= _CHANNELS and not isinstance(value, bool) else ()
    return ()

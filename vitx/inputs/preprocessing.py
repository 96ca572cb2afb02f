"""Preprocessing: size, crop and normalization, as a model declares them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from vitx.inputs.reading import ARRAYS, MOST_PIXELS, SUFFIXES, read_image

_CROPS = {"shortest": "center", "squash": "squash"}  # crop modes of open_clip, with their names in timm


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of images."""

    suffixes: ClassVar[frozenset[str]] = SUFFIXES | ARRAYS  # of the files that it can read
    size: tuple[int, int]  # height and width, in pixels
    mean: tuple[float, ...]  # subtracted from each channel, in units of [0, 1]
    std: tuple[float, ...]  # each channel is then divided by it
    interpolation: str = "bicubic"
    crop_pct: float = 1.0  # share of the resized image that is kept
    crop_mode: str = "center"  # or "squash" or "border", as in timm
    multiple: int = 1  # with `keep_aspect`, height and width are multiples of it
    keep_aspect: bool = False  # keep the whole image and its proportions, with about as many pixels as `size`
    channels: int = 1  # the dimension of channels in a batch: 2 for clips whose frames come first
    most_pixels: int = MOST_PIXELS  # of a file: larger ones are refused before they are decoded
    process: Callable[[Any], Tensor] | None = None  # a transformers processor that replaces all this

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a prepared image, (C, H, W)."""
        return (len(self.mean), *self.size)

    def read(self, path: Path) -> Any:
        """Read a picture, or an array of channels; see `read_image`."""
        return read_image(path, len(self.mean), self.most_pixels)

    def __call__(self, picture: Image.Image | NDArray[np.float32]) -> Tensor:
        """Return an image, or an array of channels (C, H, W), prepared for the model, (C, H, W)."""
        if self.process is not None:
            return self.process(picture)
        from timm.data import create_transform

        channels, interpolation, crop = len(self.mean), self.interpolation, self.crop_mode
        given: Image.Image | Tensor
        if isinstance(picture, Image.Image):
            given = picture.convert("L") if channels == 1 else picture
            width, height = given.size
        else:
            given = torch.from_numpy(picture)
            height, width = given.shape[1:]
            # Timm supports other interpolations, and padding, only for PIL images.
            interpolation = interpolation if interpolation in ("bilinear", "bicubic") else "bicubic"
            crop = "center" if crop == "border" else crop
        transform: Callable[[Image.Image | Tensor], Tensor] = create_transform(
            input_size=(channels, *self._size_of(height, width)),
            mean=self.mean,
            std=self.std,
            interpolation=interpolation,
            crop_pct=1.0 if self.keep_aspect else self.crop_pct,
            crop_mode="squash" if self.keep_aspect else crop,
        )
        return transform(given)

    def _size_of(self, *sides: int) -> tuple[int, ...]:
        """Return the size to which an image with this height and width is resized."""
        if not self.keep_aspect:
            return self.size
        scale = (prod(self.size) / prod(sides)) ** 0.5
        return tuple(max(1, round(side * scale / self.multiple)) * self.multiple for side in sides)


def normalization(module: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and std that the model declares, as timm models do; else 0 and 1."""
    config = declared(module, "pretrained_cfg", "mean", "std")
    return ((0.0,), (1.0,)) if config is None else (config["mean"], config["std"])


def channels_taken(model: nn.Module) -> int:
    """Return the number of input channels, from the first convolution; 3 if there is none."""
    kinds = (nn.Conv2d, nn.Conv3d)
    return next((layer.in_channels for layer in model.modules() if isinstance(layer, kinds)), 3)


def declared(model: nn.Module, config: str, *names: str) -> Mapping[str, Any] | None:
    """Return the attribute `config` of the first submodule where it is a mapping with all these names."""
    configs = (getattr(part, config, None) for part in model.modules())
    return next((one for one in configs if isinstance(one, Mapping) and one.keys() >= {*names}), None)


def of_open_clip(config: Mapping[str, Any]) -> Preprocessing | None:
    """Return the preprocessing in a config of open_clip; None if it pads images."""
    crop = _CROPS.get(config.get("resize_mode", ""))
    if crop is None:
        return None
    size = config["size"]
    return Preprocessing(
        size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_mode=crop,
    )

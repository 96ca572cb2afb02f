"""Preprocessing: size, crop and normalisation, as a model declares them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:  # PIL is not imported before it is needed
    from numpy.typing import NDArray
    from PIL import Image

_CROPS = {"shortest": "center", "squash": "squash"}  # as timm calls what open_clip does


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of images."""

    size: tuple[int, int]  # height and width, in pixels
    mean: tuple[float, ...]  # of each channel, in units of [0, 1], which is subtracted
    std: tuple[float, ...]  # of each channel, by which it is then divided
    interpolation: str = "bicubic"
    crop_pct: float = 1.0  # share of the resized image that is kept
    crop_mode: str = "center"  # or "squash" or "border", as timm knows them
    multiple: int = 1  # with `keep_aspect`, height and width are multiples of it
    keep_aspect: bool = False  # keep the whole image and its proportions, with about as many pixels

    @property
    def shape(self) -> tuple[int, ...]:
        """Return that of an image, (C, H, W)."""
        return (len(self.mean), *self.size)

    @property
    def channels(self) -> int:
        """Return the dimension of the channels in a batch."""
        return 1

    @property
    def suffixes(self) -> frozenset[str]:
        """Return those of the files that it can read."""
        from vitx.inputs.reading import ARRAYS, SUFFIXES

        return SUFFIXES | ARRAYS

    def read(self, path: Path, most_pixels: int | None = None) -> Any:
        """Read a picture, or an array of channels; see `vitx.inputs.bands.read_image`."""
        from vitx.inputs.bands import read_image
        from vitx.inputs.reading import MOST_PIXELS

        return read_image(path, len(self.mean), most_pixels or MOST_PIXELS)

    def __call__(self, picture: "Image.Image | NDArray[np.float32]") -> Tensor:
        """Return the image, or channels (C, H, W), as the model takes it, (C, H, W)."""
        if isinstance(picture, np.ndarray):
            return self._of_channels(torch.from_numpy(picture))
        from timm.data import create_transform

        channels = len(self.mean)
        if channels == 1:
            picture = picture.convert("L")
        transform: Any = create_transform(
            input_size=(channels, *self._size_of(picture.width, picture.height)),
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=1.0 if self.keep_aspect else self.crop_pct,
            crop_mode="squash" if self.keep_aspect else self.crop_mode,
        )
        tensor: Tensor = transform(picture)
        return tensor

    def _of_channels(self, channels: Tensor) -> Tensor:
        """Resize an array of channels, cut it to its middle, and normalise it."""
        height, width = channels.shape[1:]
        wanted = self._size_of(width, height)
        resized = wanted
        if not self.keep_aspect and self.crop_mode != "squash":
            scale = max(wanted[0] / height, wanted[1] / width) / self.crop_pct
            resized = round(height * scale), round(width * scale)
        mode = self.interpolation if self.interpolation in ("bilinear", "bicubic") else "bicubic"
        found = F.interpolate(channels[None], resized, mode=mode, antialias=True)[0]
        top, left = ((have - want) // 2 for have, want in zip(resized, wanted, strict=True))
        found = found[:, top : top + wanted[0], left : left + wanted[1]]
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (found - mean) / std

    def _size_of(self, width: int, height: int) -> tuple[int, int]:
        if not self.keep_aspect:
            return self.size
        scale = (self.size[0] * self.size[1] / (height * width)) ** 0.5
        return self._rounded(height * scale), self._rounded(width * scale)

    def _rounded(self, length: float) -> int:
        return max(1, round(length / self.multiple)) * self.multiple


def normalization(module: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and std that the model declares (timm does), else those that change nothing."""
    config = declared(module, "mean", "std")
    return ((0.0,), (1.0,)) if config is None else (config["mean"], config["std"])


def channels_taken(model: nn.Module) -> int:
    """Return the number of channels that the model takes."""
    kinds = (nn.Conv2d, nn.Conv3d)
    return next((layer.in_channels for layer in model.modules() if isinstance(layer, kinds)), 3)


def declared(model: nn.Module, *names: str) -> Mapping[str, Any] | None:
    """Return the config of the first part of the model that declares all these names, as timm's do."""
    for part in model.modules():
        config: Any = getattr(part, "pretrained_cfg", None)
        if isinstance(config, Mapping) and all(name in config for name in names):
            return config
    return None


def of_open_clip(declared: Mapping[str, Any]) -> Preprocessing | None:
    """Return how a model of open_clip wants its images, in the words of its config; None: padded."""
    crop = _CROPS.get(declared.get("resize_mode", ""))
    if crop is None:
        return None
    size = declared["size"]
    return Preprocessing(
        size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        mean=tuple(declared["mean"]),
        std=tuple(declared["std"]),
        interpolation=declared["interpolation"],
        crop_mode=crop,
    )

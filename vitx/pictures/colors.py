"""Colors: the channels and the scale that turn the input of a model into pictures for people."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitx.errors import VitxError

Scale = tuple[Sequence[float], Sequence[float]]  # mean and std, one value for all channels or one for each
Scales = Iterable[Scale | None]
Bands = Sequence[int] | None
_BEYOND = 0.02  # tolerance around [0, 1]: resampling overshoots
_FEW = 0.01  # share of the values that may exceed the tolerance
_DARK, _BRIGHT = 0.01, 0.99  # quantiles shown as black and as white if the scale is unknown
UNSCALED: Scale = ((0.0,), (1.0,))
BYTES: Scale = ((0.0,), (1 / 255,))
GUESSED = "colors guessed"


@dataclass(frozen=True)
class Colors:
    """The conversion of images to pictures."""

    bands: tuple[int, ...]  # one is shown as gray, two as their mean, three as red, green and blue
    scale: Scale | None  # the normalization to undo; None to stretch each channel by its percentiles
    note: str = ""  # for the legend of a picture

    def __str__(self) -> str:
        if self.scale is None:
            return self.note
        if self.scale in (UNSCALED, BYTES):
            return "colors as they are"
        mean, std = (", ".join(f"{value:.3g}" for value in values) for values in self.scale)
        return f"mean {mean} and std {std} undone"

    def pixels(self, images: Tensor) -> Tensor:
        """Draw images: (B, C, H, W) -> (B, H, W, 3) uint8 on the CPU."""
        chosen = images.detach().float().cpu()[:, list(self.bands)]
        shown = _stretched(chosen) if self.scale is None else _undone(chosen, self.scale)
        if len(self.bands) == 2:
            shown = shown.mean(1, keepdim=True)
        pixels = (shown.clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()

    def draw(self, images: Tensor, channels: int | None) -> Tensor:
        """Draw anything that `as_images` takes: (B, ...) -> (B, ..., 3), without the channels."""
        pixels = self.pixels(as_images(images, channels))
        return pixels.view(len(images), -1, *pixels.shape[1:]) if images.ndim == 5 else pixels


def draw(
    images: Tensor, channels: int | None, scales: Scales, bands: Bands = None, given: Scale | None = None
) -> tuple[Tensor, str]:
    """Draw anything that `as_images` takes in colors of `choose_colors`: (B, ..., 3) uint8, and a note."""
    colors = choose_colors(as_images(images, channels), scales, bands, given, channels is not None)
    return colors.draw(images, channels), colors.note


def as_images(images: Tensor, channels: int | None) -> Tensor:
    """Rearrange images, clips, volumes or spectrograms, (B, ...), to (N, C, H, W), frame by frame."""
    if channels is None:
        return images[:, None]
    return images.movedim(channels, 2).flatten(0, 1) if images.ndim == 5 else images.movedim(channels, 1)


def choose_colors(
    images: Tensor, scales: Scales, bands: Bands = None, given: Scale | None = None, colored: bool = True
) -> Colors:
    """Choose the colors in which to show images, (B, C, H, W).

    `scales` are normalizations that may have been applied, most likely first. The first one that, undone,
    brings the images into [0, 1] is used; if none does, the colors are guessed. A `given` one is used in
    place of them, if there are one or three channels. Spectrograms are not `colored`: they are stretched.
    """
    if images.ndim != 4:
        raise VitxError(f"images must be (B, C, H, W), found {tuple(images.shape)}")
    channels = images.shape[1]
    chosen = tuple(range(min(channels, 3)))
    if bands is not None:
        if len(bands) not in (1, 3) or not all(0 <= band < channels for band in bands):
            known = f"bands must be one or three channels, from 0 to {channels - 1}"
            raise VitxError(f"{known}, found {tuple(bands)}")
        return Colors(tuple(bands), None, f"bands {', '.join(map(str, bands))}, stretched")
    if channels == 2:
        return Colors(chosen, None, "mean of 2 channels, stretched")
    if channels > 3:
        return Colors(chosen, None, f"channels 0, 1, 2 of {channels}, stretched (bands= shows others)")
    if given is not None:
        for name, one in zip(("mean", "std"), given, strict=True):
            if not _fit(one, channels):
                raise VitxError(f"{name} has {len(one)} values for {channels} channels: give one for each")
        return Colors(chosen, given)
    if not colored:
        return Colors(chosen, None)
    known_scale = next((scale for scale in scales if scale is not None and fits(images, scale)), None)
    return Colors(chosen, known_scale, "" if known_scale else GUESSED)


def fits(images: Tensor, scale: Scale, whole: bool = False) -> bool:
    """Test whether a normalization may have been applied to images, (B, C, H, W): undone, they are in [0, 1].

    With `whole`, each channel must also reach black or white, as all photographs together do if they have
    undergone it. Images in [-1, 1] would lie between .26 and .71, were ImageNet's mean and std undone.
    """
    if not all(_fit(one, images.shape[1]) for one in scale):
        return False
    values = _undone(images.detach().float().cpu(), scale)
    if ((values < -_BEYOND) | (values > 1 + _BEYOND)).float().mean() > _FEW:
        return False
    ends = (values.amin((0, 2, 3)) < _BEYOND) | (values.amax((0, 2, 3)) > 1 - _BEYOND)
    return not whole or bool(ends.all())


def _fit(values: Sequence[float], channels: int) -> bool:
    return len(values) in (1, channels) or (channels == 1 and len(values) > 0)


def _undone(images: Tensor, scale: Scale) -> Tensor:
    """Undo a normalization; for one channel, if values for three are declared, by their mean."""
    mean, std = (
        torch.tensor([float(value) for value in values], device="cpu").view(-1, 1, 1) for values in scale
    )
    if images.shape[1] == 1:
        mean, std = mean.mean(), std.mean()
    return images * std + mean


def _stretched(values: Tensor) -> Tensor:
    """Stretch each channel from its 1st to its 99th percentile over all images."""
    flat = values.transpose(0, 1).flatten(1).nan_to_num()
    ordered = flat.sort(1).values  # quantile() takes at most 16 million values
    low, high = (ordered[:, round(share * (flat.shape[1] - 1))].view(-1, 1, 1) for share in (_DARK, _BRIGHT))
    return (values - low) / torch.where(high > low, high - low, 1)

"""Files, PIL images and arrays, prepared as tensors in the way that a model declares."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.inputs.preprocessing import Preprocessing, channels_taken, declared, of_open_clip
from vitx.inputs.processors import saved_preprocessing
from vitx.inputs.reading import read_picture, to_rgb

IMAGES = ("image", "images", "pixel_values", "input_values", "video", "img", "x")  # usual names in batches
Picture = str | Path | Image.Image | np.ndarray | Tensor  # one image, not normalized
Images = Tensor | Picture | Sequence[Picture]


def prepared(model: nn.Module, images: Any) -> tuple[Any, Preprocessing | None]:
    """Prepare images for the model, (B, C, H, W), and return its preprocessing, too.

    Images are a file, a PIL image, a uint8 array (H, W, 3) or (H, W), or a uint8 tensor (3, H, W); or several
    of these, in a list or stacked. Other values are returned unchanged, with None.
    """
    pictures = _pictures(images)
    if pictures is None:
        return images, None
    weight = next(model.parameters(), torch.empty(0))
    prepare = preprocessing_of(model)
    return to_tensor(pictures, prepare).to(weight.device, weight.dtype), prepare


def images_in(batch: Any) -> Tensor:
    """Return the images of a batch: its first item, or one named in `IMAGES`; else raise a VitxError."""
    images = batch
    if isinstance(batch, Mapping):
        images = next((batch[name] for name in IMAGES if name in batch), None)
    elif isinstance(batch, (list, tuple)) and batch:
        images = batch[0]
    if not isinstance(images, Tensor):
        raise VitxError("the batches of the DataLoader must be images (B, C, H, W), or begin with them")
    return images


def to_tensor(pictures: Sequence[Any], prepare: Preprocessing) -> Tensor:
    """Prepare images, each as for `prepared`, and stack them to (B, C, H, W) on the CPU."""
    tensors = [prepare(_opened(picture, len(prepare.mean), prepare.read)) for picture in pictures]
    if len({tensor.shape for tensor in tensors}) > 1:
        raise VitxError("images that keep their proportions have several sizes: explain them one by one")
    return torch.stack(tensors)


def pictures_of(images: Any) -> list[Image.Image] | None:
    """Open the images that `prepared` takes as RGB pictures; None if they are already prepared."""
    found = _pictures(images)
    return None if found is None else [_opened(one, 3, read_picture) for one in found]


def _pictures(images: Any) -> list[Any] | None:
    """Return the images as a list; None unless they have to be prepared."""
    if isinstance(images, (str, Path, Image.Image)):
        return [images]
    if isinstance(images, (list, tuple)):
        found = [one[0] for one in map(_pictures, images) if one is not None and len(one) == 1]
        return found if images and len(found) == len(images) else None
    if isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim in (3, 4):
        images = images.movedim(-3, -1).cpu().numpy()
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        if images.ndim == 2 or (images.ndim == 3 and images.shape[-1] in (1, 3, 4)):
            return [images]
        if images.ndim == 4 and images.shape[-1] in (1, 3, 4):
            return list(images)
    return None


def _opened(picture: Any, channels: int, read: Callable[[Path], Any]) -> Any:
    """Return a picture in RGB for the preprocessing, or read it from a file."""
    if isinstance(picture, (str, Path)):
        return read(Path(picture))
    if channels not in (1, 3):
        said = f"the model takes {channels} channels, and pictures have 1 or 3"
        raise VitxError(f"{said}: give a tensor (B, C, H, W)")
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture[..., 0] if picture.shape[2:] == (1,) else picture)
    return to_rgb(picture)


def preprocessing_of(
    model: nn.Module,
    *,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep_aspect: bool = False,
) -> Preprocessing:
    """Return the preprocessing that a model, or a part of it, declares.

    `size` (height and width), and `mean` and `std` of each channel, replace the declared values. With
    `keep_aspect`, images are not cropped and keep their proportions.
    """
    from timm.data import resolve_data_config

    config = declared(model, "pretrained_cfg", "input_size")
    if config is None and None in (size, mean, std):
        found = saved_preprocessing(model) or of_open_clip(declared(model, "preprocess_cfg") or {})
        if found and not keep_aspect and (size, mean, std) == (None, None, None):
            return found
        said = "the model does not declare its preprocessing, as timm's do: give a tensor (B, C, H, W)"
        raise VitxError(f"{said}, or in the shell --input-options size=PIXELS mean=V std=V")
    known = resolve_data_config(pretrained_cfg=dict(config or {"crop_pct": 1.0}))  # else do not crop
    holder = next((part for part in model.modules() if getattr(part, "patch_embed", None) is not None), None)
    embedding: Any = getattr(holder, "patch_embed", None)
    if keep_aspect and not getattr(holder, "dynamic_img_size", False):
        said = "the model takes images of one size only"
        raise VitxError(f"{said}: make it with dynamic_img_size=True to keep proportions")
    own = getattr(embedding, "img_size", None) or known["input_size"][1:]
    if std and min(std) <= 0:
        raise VitxError(f"std must be above 0, found {[*std]}")
    taken = channels_taken(model)
    return Preprocessing(
        size=(size, size) if size else (int(own[0]), int(own[1])),
        mean=_channels("mean", mean or known["mean"], taken),
        std=_channels("std", std or known["std"], taken),
        interpolation=known["interpolation"],
        crop_pct=known["crop_pct"],
        crop_mode=known["crop_mode"],
        multiple=int(max(embedding.patch_size)) if keep_aspect else 1,
        keep_aspect=keep_aspect,
    )


def _channels(name: str, values: Sequence[float], taken: int) -> tuple[float, ...]:
    """Return one value for each channel; for a single channel, average the values of three."""
    values = tuple(map(float, values))
    if taken == 1 and len(values) == 3:
        values = (sum(values) / 3,)
    if len(values) == 1:
        values *= taken
    if len(values) != taken:
        said = f"{name} has {len(values)} values, and the model takes {taken} channels"
        option = f"--input-options {name}=V with one value for each, or one for all"
        raise VitxError(f"{said}: give a tensor (B, C, H, W), or in the shell {option}")
    return values

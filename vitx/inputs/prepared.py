"""From files, PIL images and arrays to the tensors that a model takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.inputs.choosing import preprocessing_of
from vitx.inputs.preprocessing import Preprocessing
from vitx.inputs.reading import read_picture, to_rgb

IMAGES = ("image", "images", "pixel_values", "input_values", "video", "img", "x")  # what batches call them
Picture = str | Path | Image.Image | np.ndarray | Tensor  # one image, not normalised
Images = Tensor | Picture | Sequence[Picture]


def prepared(model: nn.Module, images: Any) -> tuple[Any, Preprocessing | None]:
    """Prepare images as the model takes them.

    Args:
        model: timm's, or one that contains it.
        images: an image file, a PIL image, a uint8 array (H, W, 3) or (H, W), a uint8 tensor (3, H, W);
            several of these in a list, or stacked.

    Returns:
        (B, C, H, W), on the model's device, and their preprocessing; other values as they are, with None.
    """
    pictures = _pictures(images)
    if pictures is None:
        return images, None
    weight = next(model.parameters(), torch.empty(0))
    prepare = preprocessing_of(model)
    return to_tensor(pictures, prepare).to(weight.device, weight.dtype), prepare


def images_in(batch: Any) -> Tensor:
    """Return the images of a batch: itself, its first item, or that under one of `IMAGES`.

    Raises a VitxError if it has none.
    """
    images = batch
    if isinstance(batch, Mapping):
        images = next((batch[name] for name in IMAGES if name in batch), None)
    elif isinstance(batch, (list, tuple)) and batch:
        images = batch[0]
    if not isinstance(images, Tensor):
        raise VitxError("the batches of the DataLoader must be images (B, C, H, W), or begin with them")
    return images


def to_tensor(pictures: Sequence[Any], prepare: Preprocessing, most_pixels: int | None = None) -> Tensor:
    """Prepare images, one by one as for `prepared`, as a tensor (B, C, H, W) on the CPU."""
    tensors = []
    for picture in pictures:
        file = isinstance(picture, (str, Path))
        opened = prepare.read(Path(picture), most_pixels) if file else _opened(picture, len(prepare.mean))
        tensors.append(prepare(opened))
    if len({tensor.shape for tensor in tensors}) > 1:
        raise VitxError("images that keep their proportions have several sizes: explain them one by one")
    return torch.stack(tensors)


def pictures_of(images: Any) -> list[Image.Image] | None:
    """Open pictures as for `prepared`; None if they are tensors that were prepared."""
    if (found := _pictures(images)) is None:
        return None
    return [read_picture(one) if isinstance(one, (str, Path)) else _opened(one, 3) for one in found]


def _pictures(images: Any) -> list[Any] | None:
    """Return the images one by one; None if there are none that are to be prepared."""
    if isinstance(images, (str, Path, Image.Image)):
        return [images]
    if isinstance(images, (list, tuple)):
        found = [_pictures(image) for image in images]
        if not found or any(one is None or len(one) != 1 for one in found):
            return None
        return [one[0] for one in found if one]
    if isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim in (3, 4):
        images = images.movedim(-3, -1).cpu().numpy()
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        if images.ndim == 2 or (images.ndim == 3 and images.shape[-1] in (1, 3, 4)):
            return [images]
        if images.ndim == 4 and images.shape[-1] in (1, 3, 4):
            return list(images)
    return None


def _opened(picture: Any, channels: int) -> Image.Image:
    if channels not in (1, 3):
        raise VitxError(
            f"the model takes {channels} channels, and pictures have 1 or 3: give a tensor (B, C, H, W)"
        )
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture[..., 0] if picture.shape[2:] == (1,) else picture)
    return to_rgb(picture)

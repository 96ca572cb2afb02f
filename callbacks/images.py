"""Which images the callback watches: the same ones at every firing and in every run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from vitx.errors import VitxError

_IMAGE_KEYS = ("image", "images", "pixel_values", "img", "x")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y")
_MASK_KEYS = ("mask", "masks")


@dataclass(frozen=True)
class Samples:
    """Images to watch, with what is known of them.

    Attributes:
        images: (n, C, H, W), as the model takes them.
        labels: (n,) long, or None.
        masks: (n, H, W) bool, True on the object, or None.
        indices: their places in the data set, or None.
        class_names: the data set's own, or None.
    """

    images: Tensor
    labels: Tensor | None = None
    masks: Tensor | None = None
    indices: tuple[int, ...] | None = None
    class_names: tuple[str, ...] | None = None


def choose_samples(images: Any, count: int, trainer: pl.Trainer, model: nn.Module) -> Samples | None:
    """Chooses the images to watch, and moves them to the device as a validation batch is moved.

    Args:
        images: a tensor (n, C, H, W), a data set, a list of image files, or None for the validation set.
        count: how many to take of a data set, evenly spaced.
        trainer: gives the validation set, and the way to the device.
        model: gives the transform for image files.

    Returns:
        The samples, or None if there is no validation set.

    Raises:
        VitxError: The images are of another kind, or a batch holds none.
    """
    collate, data = default_collate, images
    if images is None:
        loader = _validation_loader(trainer)
        if loader is None:
            return None
        collate, data = loader.collate_fn, loader.dataset
    if isinstance(data, Tensor):
        return _to_samples(data, trainer)
    if isinstance(data, Sequence) and data and all(isinstance(item, (str, Path)) for item in data):
        return _to_samples(_load_files(data, model), trainer)
    picked, indices = _pick(data, count)
    return replace(_to_samples(collate(picked), trainer), indices=indices, class_names=_class_names(data))


def _validation_loader(trainer: pl.Trainer) -> DataLoader[Any] | None:
    loaders = trainer.val_dataloaders
    while isinstance(loaders, (list, tuple, dict)):
        items = list(loaders.values() if isinstance(loaders, dict) else loaders)
        loaders = items[0] if items else None
    return loaders if isinstance(loaders, DataLoader) else None


def _pick(data: Any, count: int) -> tuple[list[Any], tuple[int, ...] | None]:
    """Takes evenly spaced samples; of a stream, the first ones."""
    if isinstance(data, IterableDataset):
        return list(islice(iter(data), count)), None
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise VitxError(
            f"images must be a tensor, a data set, a list of files or None, found {type(data).__name__}"
        )
    count = min(count, len(data))
    if count == 0:
        raise VitxError("the data set to take images from is empty")
    indices = evenly_spaced(len(data), count)
    return [data[index] for index in indices], indices


def evenly_spaced(length: int, count: int) -> tuple[int, ...]:
    """Returns `count` places in a list, from the middles of equal parts.

    Example:
        >>> evenly_spaced(100, 4)
        (12, 37, 62, 87)
    """
    return tuple(int((place + 0.5) * length / count) for place in range(count))


def _to_samples(batch: Any, trainer: pl.Trainer) -> Samples:
    batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
    return Samples(*_unpack(batch))


def _unpack(batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Finds images, labels and masks in a batch: a tensor, a sequence in that order, or a mapping."""
    if isinstance(batch, Tensor):
        batch = (batch,)
    if isinstance(batch, Mapping):
        images, labels, masks = (_first(batch, keys) for keys in (_IMAGE_KEYS, _LABEL_KEYS, _MASK_KEYS))
    elif isinstance(batch, Sequence):
        images, labels, masks = (*batch[:3], None, None, None)[:3]
    else:
        images = labels = masks = None
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise VitxError(
            f"no images (B, C, H, W) were found in a batch of type {type(batch).__name__}: give the callback "
            "a tensor of images"
        )
    return images.detach(), _class_indices(labels, images), _object_masks(masks, images)


def _first(batch: Mapping[Any, Any], keys: Sequence[str]) -> Any:
    return next((batch[key] for key in keys if key in batch), None)


def _class_indices(labels: Any, images: Tensor) -> Tensor | None:
    fits = isinstance(labels, Tensor) and labels.shape == images.shape[:1]
    return labels if fits and not labels.is_floating_point() else None


def _object_masks(masks: Any, images: Tensor) -> Tensor | None:
    fits = isinstance(masks, Tensor) and masks.shape == (len(images), *images.shape[2:])
    return masks > 0 if fits else None


def _class_names(data: Any) -> tuple[str, ...] | None:
    """Finds the `classes` of a data set, as torchvision's have them, also below a Subset."""
    while data is not None:
        if names := getattr(data, "classes", None):
            return tuple(map(str, names))
        data = getattr(data, "dataset", None)
    return None


def _load_files(files: Sequence[str | Path], model: nn.Module) -> Tensor:
    """Reads image files through the transform that the model was trained with."""
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    owner = next((module for module in model.modules() if hasattr(module, "pretrained_cfg")), None)
    if owner is None:
        raise VitxError("image files need a timm model, which knows its transform: give a tensor of images")
    transform = create_transform(**resolve_model_data_config(owner))
    try:
        return torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    except OSError as error:
        raise VitxError(f"an image file could not be read: {error}") from error

"""What a batch holds: images, and what is known of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.inputs.prepared import IMAGES
from vitx.metrics import box_masks

LABELS = ("label", "labels", "target", "targets", "y")
MASKS = ("mask", "masks")
ITEM = "item {}"  # of a sequence
_DIMENSIONS = 5, 4, 3  # of clips and volumes, images, spectrograms
_FEWEST = min(_DIMENSIONS)
SPECTROGRAMS = "input_values"  # as Hugging Face's processors of sounds call them
_NEARLY_ALL = 0.95
BOXES = ("box", "boxes", "bbox", "bboxes")


@dataclass(frozen=True)
class Content:
    """What was found in a batch of B images.

    Attributes:
        images: (B, C, H, W); clips and volumes have five dimensions, spectrograms three.
        labels: (B, ...): classes, several for each image, or numbers; None if there are none.
        masks: (B, h, w) bool, True on the object (or in its boxes), or None.
        inputs: whatever comes with each image, by the name or place it has in the batch, (B, ...).
        name: what the batch calls the images.
    """

    images: Tensor
    labels: Tensor | None = None
    masks: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    name: str = ITEM.format(0)

    def cpu(self) -> "Content":
        """Returns the same in host memory."""
        return Content(
            self.images.cpu(),
            None if self.labels is None else self.labels.cpu(),
            None if self.masks is None else self.masks.cpu(),
            {name: value.detach().cpu() for name, value in self.inputs.items()},
            self.name,
        )


def read_batch(batch: Any) -> Content:
    """Finds images, labels, and masks or boxes in a batch.

    What has a usual name (`IMAGES`, `LABELS`, `MASKS`, `BOXES`) goes by it, if it has such a form. The rest
    goes by its form: images are (B, C, H, W), clips have a dimension more; labels come first that are no
    numbers of samples; masks have the form of the images; boxes lie within them.

    Args:
        batch: images; a sequence of images and other things; a mapping, also of mappings; or an object with
            attributes of the usual names.

    Raises:
        VitxError: There are no images (B, C, H, W).
    """
    named = _by_name(batch)
    images = _images(named)
    if images is None:
        raise VitxError(
            f"no images (B, C, H, W) were found in {_description(batch)}: give "
            'batch_transform=lambda batch: {"image": ..., "label": ...}'
        )
    # Subclasses of Tensor, as MONAI has them, bring rules of their own for slices.
    per_image = {
        name: value.detach().as_subclass(Tensor)
        for name, value in named.items()
        if isinstance(value, Tensor) and value.ndim and len(value) == len(images) and value is not images
    }
    size = _size(images)
    masks = _first(per_image, MASKS, lambda value: _is_mask(value, size))
    boxes = _first(per_image, BOXES, lambda value: _are_boxes(value, size))
    label = _label(per_image, [name for name in (masks, boxes) if name])
    return Content(
        images.detach().as_subclass(Tensor),
        None if label is None else per_image[label],
        object_masks(
            None if masks is None else per_image[masks], None if boxes is None else per_image[boxes], size
        ),
        per_image,
        next(name for name, value in named.items() if value is images),
    )


def object_masks(masks: Tensor | None, boxes: Tensor | None, size: tuple[int, int]) -> Tensor | None:
    """Returns masks (B, h, w) bool of masks (B, [1,] h, w), else of boxes (B, [K,] 4), else None."""
    if masks is not None and masks.ndim == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if masks is not None and masks.ndim == 3:
        return masks > 0
    if boxes is not None and boxes.ndim in (2, 3) and boxes.shape[-1] == 4:
        return box_masks(boxes, size)
    return None


def _by_name(batch: Any) -> dict[str, Any]:
    """All that a batch holds, by its name, or by its place as "item 1"."""
    if hasattr(batch, "_asdict"):  # a named tuple
        batch = batch._asdict()
    if isinstance(batch, Mapping):
        nested = [_by_name(value) for value in batch.values() if isinstance(value, Mapping)]
        below = {name: value for part in nested for name, value in part.items()}
        return below | {str(name): value for name, value in batch.items()}
    if isinstance(batch, Tensor):
        return {ITEM.format(0): batch}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        items = {ITEM.format(place): value for place, value in enumerate(batch)}
        below = {
            name: v for value in batch if isinstance(value, Mapping) for name, v in _by_name(value).items()
        }
        return below | items
    return {name: getattr(batch, name) for name in (*IMAGES, *LABELS, *MASKS, *BOXES) if hasattr(batch, name)}


def _images(named: Mapping[str, Any]) -> Tensor | None:
    """What is called so, else the first item, else the only tensor of that form: clips, images or others."""
    for dims in _DIMENSIONS:
        found = _of_dimensions(named, dims)
        if found is not None:
            return found
    return None


def _of_dimensions(named: Mapping[str, Any], dims: int) -> Tensor | None:
    fit = {
        name: value
        for name, value in named.items()
        if isinstance(value, Tensor) and value.ndim == dims and (name in IMAGES or value.dtype != torch.bool)
    }
    if dims == _FEWEST:  # masks have as many, and so has a single image
        fit = {name: value for name, value in fit.items() if name == SPECTROGRAMS}
    usual = next((fit[name] for name in IMAGES if name in fit), None)
    if usual is not None:
        return usual
    others = [value for name, value in fit.items() if name not in MASKS]
    in_order = next((value for name, value in fit.items() if is_item(name)), None)
    return in_order if in_order is not None else others[0] if len(others) == 1 else None


def _first(
    per_image: Mapping[str, Tensor], usual: Sequence[str], fits: Callable[[Tensor], bool]
) -> str | None:
    """The name of what has the form, and the usual name if anything has, or no name."""
    fit = [name for name, value in per_image.items() if fits(value)]
    return next((name for name in usual if name in fit), next(filter(is_item, fit), None))


def _label(per_image: Mapping[str, Tensor], others: Sequence[str]) -> str | None:
    """The name of the labels: the usual one, else the first that may be classes, else the first item."""
    left = [name for name in per_image if name not in (*others, *MASKS, *BOXES)]
    usual = next((name for name in LABELS if name in left), None)
    if usual is not None:
        return usual
    classes = [name for name in left if _are_classes(per_image[name])]
    items = [name for name in left if is_item(name) and per_image[name].ndim <= 2]
    numbers = [name for name in left if _are_whole(per_image[name])]
    return next(iter((*classes, *items, *numbers)), None)


def is_item(name: str) -> bool:
    """Whether it is a place in a sequence."""
    return name.startswith(ITEM[:-2])


def _are_whole(values: Tensor) -> bool:
    return values.ndim == 1 and not values.is_floating_point() and values.dtype != torch.bool


def _are_classes(values: Tensor) -> bool:
    """Whether there is a whole number for each image, but not each another, or 0 or 1 for each class."""
    if values.ndim == 2:
        return values.shape[1] > 1 and bool(((values == 0) | (values == 1)).all())
    numbered = len(values) > 2 and len(values.unique()) == len(values) and bool(values.max() >= len(values))
    return _are_whole(values) and not numbered


def _is_mask(values: Tensor, size: tuple[int, int]) -> bool:
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 3:
        return False
    height, width = values.shape[1:]
    return values.dtype == torch.bool or height * size[1] == width * size[0]


def _are_boxes(values: Tensor, size: tuple[int, int]) -> bool:
    """Whether nearly all are x1, y1, x2, y2 within the images; what is all zeros stands for no box."""
    if values.ndim not in (2, 3) or values.shape[-1] != 4 or values.is_complex():
        return False
    boxes = values.flatten(0, -2).float()
    boxes = boxes[(boxes != 0).any(1)]
    x1, y1, x2, y2 = boxes.unbind(1)
    good = (x1 >= 0) & (x1 < x2) & (x2 <= size[1] + 1) & (y1 >= 0) & (y1 < y2) & (y2 <= size[0] + 1)
    return len(boxes) > 0 and bool(good.float().mean() >= _NEARLY_ALL)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def _description(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a batch with the keys {', '.join(map(str, batch))}"
    if isinstance(batch, Tensor):
        return f"a batch of shape {tuple(batch.shape)}"
    return f"a batch of type {type(batch).__name__}"

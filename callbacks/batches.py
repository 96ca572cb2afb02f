"""What a batch holds: images, and what is known of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.inputs import IMAGES
from vitx.metrics import box_masks

LABELS = ("label", "labels", "target", "targets", "y")
MASKS = ("mask", "masks")
BOXES = ("box", "boxes", "bbox", "bboxes")


@dataclass(frozen=True)
class Content:
    """What was found in a batch of B images.

    Attributes:
        images: (B, C, H, W).
        labels: (B, ...): classes, several for each image, or numbers; None if there are none.
        masks: (B, h, w) bool, True on the object (or in its boxes), or None.
        inputs: whatever else comes with each image, by the name it has in the batch, (B, ...).
    """

    images: Tensor
    labels: Tensor | None = None
    masks: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def cpu(self) -> "Content":
        """Returns the same in host memory."""
        return Content(
            self.images.cpu(),
            None if self.labels is None else self.labels.cpu(),
            None if self.masks is None else self.masks.cpu(),
            {name: value.detach().cpu() for name, value in self.inputs.items()},
        )


def read_batch(batch: Any) -> Content:
    """Finds images, labels, and masks or boxes in a batch.

    Args:
        batch: images; a sequence of images, labels, and masks or boxes; a sequence of images and a
            mapping; a mapping, or an object with attributes, with the usual names (`IMAGES`, `LABELS`,
            `MASKS`, `BOXES`).

    Raises:
        VitxError: There are no images (B, C, H, W).
    """
    named = _by_name(batch)
    images = _first(named, IMAGES)
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise VitxError(
            f"no images (B, C, H, W) were found in {_description(batch)}: give a batch_transform "
            "that turns a batch into images, or into images, labels and masks"
        )
    per_image = {
        name: value
        for name, value in named.items()
        if isinstance(value, Tensor) and value.ndim and len(value) == len(images)
    }
    masks = object_masks(_first(per_image, MASKS), _first(per_image, BOXES), _size(images))
    inputs = {name: value for name, value in per_image.items() if name not in IMAGES}
    # Subclasses of Tensor, as MONAI has them, bring rules of their own for slices.
    return Content(images.detach().as_subclass(Tensor), _first(per_image, LABELS), masks, inputs)


def object_masks(masks: Tensor | None, boxes: Tensor | None, size: tuple[int, int]) -> Tensor | None:
    """Returns masks (B, h, w) bool of masks (B, [1,] h, w), else of boxes (B, [K,] 4), else None."""
    if masks is not None and masks.ndim == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if masks is not None and masks.ndim == 3:
        return masks > 0
    if boxes is not None and boxes.ndim in (2, 3) and boxes.shape[-1] == 4:
        return box_masks(boxes, size)
    return None


def _by_name(batch: Any) -> Mapping[str, Any]:
    if hasattr(batch, "_asdict"):  # a named tuple
        batch = batch._asdict()
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, Tensor):
        return {"image": batch}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return _sequence_by_name(batch)
    return {name: getattr(batch, name) for name in (*IMAGES, *LABELS, *MASKS, *BOXES) if hasattr(batch, name)}


def _sequence_by_name(batch: Sequence[Any]) -> Mapping[str, Any]:
    images, second, third = (*batch[:3], None, None, None)[:3]
    if isinstance(second, Mapping):
        return {**second, "image": images}
    is_mask = isinstance(third, Tensor) and (third.dtype == torch.bool or third.shape[-1] != 4)
    return {"image": images, "label": second, "mask" if is_mask else "box": third}


def _first(named: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((named[name] for name in names if name in named), None)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[3]


def _description(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a batch with the keys {', '.join(map(str, batch))}"
    if isinstance(batch, Tensor):
        return f"a batch of shape {tuple(batch.shape)}"
    return f"a batch of type {type(batch).__name__}"

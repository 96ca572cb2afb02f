"""What a batch holds: images, and what is known of them; seen in the user's step, told, or by usual names."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.evaluation.metrics import box_masks
from vitx.inputs.prepared import IMAGES
from vitx.watch.nested import last, tensors_of
from vitx.watch.seen import Seen

LABELS = ("label", "labels", "target", "targets")
MASKS = ("mask", "masks")
BOXES = ("box", "boxes", "bbox", "bboxes")
SPECTROGRAMS = "input_values"  # as Hugging Face's processors of sounds call them
_DIMENSIONS = (5, 4, 3)  # of clips and volumes, images, spectrograms
_GIVE = 'give batch_transform=lambda batch: {"image": ..., "label": ...}'

Name = str | int  # of an item of a batch: its key, or its place


@dataclass(frozen=True)
class Told:
    """What the user says of a batch.

    Attributes:
        show: the item that holds the images, where there are several.
        labels: the item that holds the labels.
        boxes: the item that holds boxes or masks.
    """

    show: Name | None = None
    labels: Name | None = None
    boxes: Name | None = None


@dataclass(frozen=True)
class Content:
    """What was found in a batch of B images.

    Attributes:
        images: (B, C, H, W); clips and volumes have five dimensions, spectrograms three.
        labels: (B, ...): classes, several for each image, or numbers; None if there are none.
        masks: (B, h, w) bool, True on the object (or in its boxes), or None.
        inputs: whatever comes with each image, by its path in the batch, (B, ...).
        name: the path of the images.
        found: what was found where, in words.
    """

    images: Tensor
    labels: Tensor | None = None
    masks: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    name: str = "0"
    found: tuple[str, ...] = ()

    def cpu(self) -> "Content":
        """Returns the same in host memory."""
        return replace(
            self,
            images=self.images.cpu(),
            labels=None if self.labels is None else self.labels.cpu(),
            masks=None if self.masks is None else self.masks.cpu(),
            inputs={name: value.detach().cpu() for name, value in self.inputs.items()},
        )


def read_batch(batch: Any, told: Told | None = None, seen: Seen | None = None) -> Content:
    """Finds images, labels, and masks or boxes in a batch.

    What is told comes first, then what was seen in the user's step, then what has a usual name. In a pair,
    images come first and labels second. The rest is left out.

    Args:
        batch: images; a sequence of images and other things; a mapping; or an object with attributes; one
            may hold the other.
        told: what the user says of it.
        seen: what the user's step did with such a batch.

    Raises:
        VitxError: There are no images (B, C, H, W), several and none is chosen, or no item that was told.
    """
    # Subclasses of Tensor, as MONAI has them, bring rules of their own for slices.
    named = {path: value.detach().as_subclass(Tensor) for path, value in tensors_of(batch)}
    told = told or Told()
    name, how = _images(batch, named, told, seen)
    images = named[name]
    count = len(images)
    per_image = {path: value for path, value in named.items() if value.ndim and len(value) == count}
    masks, noted = _masks(batch, per_image, told, (images.shape[-2], images.shape[-1]))
    labels, labelled = _labels(batch, per_image, told, seen, masks is not None)
    found = (f"images {how}", labelled, *noted)
    inputs = {path: value for path, value in per_image.items() if path != name}
    return Content(images, labels, masks, inputs, name, found)


def objects(given: Tensor, size: tuple[int, int]) -> tuple[Tensor, str]:
    """Returns masks of objects, of masks or of boxes, and what to say of them.

    Args:
        given: masks (B, h, w) or (B, 1, h, w); or boxes (B, 4) or (B, K, 4), x1, y1, x2, y2 in pixels, or as
            shares of the picture, if all lie in [0, 1]. A box of zeros is none.
        size: height and width of the images.

    Returns:
        (B, h, w) bool, True on the object.

    Raises:
        VitxError: They are neither.
    """
    if given.ndim == 4 and given.shape[1] == 1:
        given = given[:, 0]
    height, width = size
    if given.ndim == 3 and (given.dtype == torch.bool or given.shape[1] * width == given.shape[2] * height):
        return given > 0, "masks"
    if given.ndim not in (2, 3) or given.shape[-1] != 4 or given.is_complex():
        raise VitxError(
            f"neither boxes (n, 4) or (n, K, 4) nor masks (n, h, w) of the images: {tuple(given.shape)}"
        )
    boxes = given.float()
    x1, y1, x2, y2 = boxes[(boxes != 0).any(-1)].unbind(-1)
    shares = max(size) > 1 and bool((boxes >= 0).all() and (boxes <= 1).all())
    right, below = (1, 1) if shares else (width + 1, height + 1)
    good = (x1 >= 0) & (x1 < x2) & (x2 <= right) & (y1 >= 0) & (y1 < y2) & (y2 <= below)
    if len(x1) == 0 or not bool(good.all()):
        wrong = tuple(round(value, 2) for value in boxes.flatten(0, -2)[0].tolist())
        raise VitxError(
            f"boxes must be x1 < x2, y1 < y2 within {width} x {height} pixels, found as {wrong}: change "
            "them, or give boxes="
        )
    if shares:
        boxes = boxes * torch.tensor([width, height, width, height], device=boxes.device)
    return box_masks(boxes, size), "boxes, shares of the picture, scaled" if shares else "boxes"


def item(named: Mapping[str, Tensor], name: Name, what: str) -> str:
    """Returns the path of what the user calls an item.

    Raises:
        VitxError: There is no such item, or there are several.
    """
    found = [path for path in named if path == str(name)] or [p for p in named if last(p) == str(name)]
    if len(found) != 1:
        has = ", ".join(named) or "no tensors"
        raise VitxError(f"{what}={name!r} names no single item of the batch, which has {has}")
    return found[0]


def _images(batch: Any, named: Mapping[str, Tensor], told: Told, seen: Seen | None) -> tuple[str, str]:
    """Returns the path of the images, and how it was found."""
    if told.show is not None:
        return item(named, told.show, "show"), "as told"
    if seen is not None and seen.images[0] in named:
        return seen.images[0], f"as {seen.where} takes them"
    for dims in _DIMENSIONS:
        fit = [path for path, value in named.items() if value.ndim == dims and value.dtype != torch.bool]
        usual = [path for name in IMAGES for path in fit if last(path) == name]
        if dims == min(_DIMENSIONS):  # as many as masks have, and a single image
            usual = fit = [path for path in usual if last(path) == SPECTROGRAMS]
        if usual:
            return usual[0], f"in {usual[0]!r}"
        fit = [path for path in fit if last(path) not in MASKS]
        if fit and (len(fit) == 1 or _in_order(batch)):
            return fit[0], "first" if _in_order(batch) else f"in {fit[0]!r}"
        if fit:
            raise VitxError(
                f"{len(fit)} items of the batch may be the images, {', '.join(fit)}: give show={fit[0]!r}"
            )
    raise VitxError(f"no images (B, C, H, W) were found in {_description(batch)}: {_GIVE}")


def _labels(
    batch: Any,
    per_image: Mapping[str, Tensor],
    told: Told,
    seen: Seen | None,
    has_objects: bool,
) -> tuple[Tensor | None, str]:
    """Returns the labels, and how they were found."""
    count = len(next(iter(per_image.values())))
    if told.labels is not None:
        path = item(per_image, told.labels, "labels")
        return per_image[path], f"labels in {path!r} as told"
    if seen is not None and (labels := seen.labels(per_image, count)) is not None:
        return labels, f"labels as {seen.where} compares them"
    usual = [path for name in LABELS for path in per_image if last(path) == name]
    second = _in_order(batch) and "1" in per_image and per_image["1"].ndim <= 2
    if usual:
        return per_image[usual[0]], f"labels in {usual[0]!r}"
    if second and len(batch) == (3 if has_objects else 2):
        return per_image["1"], "labels second"
    others = [path for path, value in per_image.items() if value.ndim <= 2]
    hint = f" (if they are {others[0]!r}, say labels={_name(others[0])!r})" if others else ""
    return None, f"no labels{hint}"


def _masks(
    batch: Any, per_image: Mapping[str, Tensor], told: Told, size: tuple[int, int]
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Returns the masks of the objects, and what to say of them."""
    if told.boxes is not None:
        path = item(per_image, told.boxes, "boxes")
        masks, said = objects(per_image[path], size)
        return masks, (f"{said} in {path!r} as told",)
    usual = [path for name in (*MASKS, *BOXES) for path in per_image if last(path) == name]
    if usual:
        try:
            masks, said = objects(per_image[usual[0]], size)
            return masks, (f"{said} in {usual[0]!r}",)
        except VitxError as error:
            return None, (f"{usual[0]!r} left out, {error}",)
    if _in_order(batch) and len(batch) == 3 and "2" in per_image:  # (images, labels, boxes)
        with suppress(VitxError):
            masks, said = objects(per_image["2"], size)
            return masks, (f"{said} third",)
    return None, ()


def _in_order(batch: Any) -> bool:
    return isinstance(batch, Sequence) and not isinstance(batch, str) and not hasattr(batch, "_asdict")


def _name(path: str) -> Name:
    return int(path) if path.isdigit() else path


def _description(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a batch with the keys {', '.join(map(str, batch))}"
    if isinstance(batch, Tensor):
        return f"a batch of shape {tuple(batch.shape)}"
    return f"a batch of type {type(batch).__name__}"

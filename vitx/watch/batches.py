"""Images in a batch, and what is known of them: by the user's step, by options, or by usual names."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.evaluation.metrics import box_masks
from vitx.inputs.prepared import IMAGES
from vitx.watch.nested import last, tensors_of
from vitx.watch.observed import ObservedStep

LABELS = ("label", "labels", "target", "targets")
MASKS = ("mask", "masks")
BOXES = ("box", "boxes", "bbox", "bboxes")
SPECTROGRAMS = "input_values"  # as Hugging Face's processors of sounds call them
_DIMENSIONS = (5, 4, 3)  # of clips and volumes, images, spectrograms
_GIVE = 'give batch_transform=lambda batch: {"image": ..., "label": ...}'

Name = str | int  # of an item of a batch: its key, or its place


@dataclass(frozen=True)
class ItemNames:
    """Items of a batch that the user names: images, where there are several, labels, boxes or masks."""

    show: Name | None = None
    labels: Name | None = None
    boxes: Name | None = None


@dataclass(frozen=True)
class Content:
    """The content of a batch of B images."""

    images: Tensor  # (B, C, H, W); clips and volumes have five dimensions, spectrograms three
    labels: Tensor | None = None  # (B, ...): classes, several for each image, or numbers
    masks: Tensor | None = None  # (B, h, w) bool, True on the object, or in its boxes
    inputs: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # of each image, by paths in the batch, (B, ...)
    name: str = "0"  # the path of the images
    found: tuple[str, ...] = ()  # what was found where, in words

    def __len__(self) -> int:
        return len(self.images)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Content":
        """Return the same with each tensor as a function makes it."""
        return replace(
            self,
            images=function(self.images),
            labels=None if self.labels is None else function(self.labels),
            masks=None if self.masks is None else function(self.masks),
            inputs={name: function(value) for name, value in self.inputs.items()},
        )


def read_batch(batch: Any, names: ItemNames | None = None, observed: ObservedStep | None = None) -> Content:
    """Find images, labels, and masks or boxes in a batch: a tensor, sequence, mapping, object, or a mixture.

    What the user names comes first, then what the user's step showed, then what has a usual name. In a pair,
    images come first and labels second. The rest is left out.

    Raises:
        VitxError: There are no images (B, C, H, W), several and none is chosen, or no item of a given name.
    """
    # Subclasses of Tensor, as MONAI has them, bring rules of their own for slices.
    tensors = {path: value.detach().as_subclass(Tensor) for path, value in tensors_of(batch)}
    names, in_order = names or ItemNames(), _in_order(batch)
    name, how = _images(batch, tensors, names, observed)
    images = tensors[name]
    per_image = {path: value for path, value in tensors.items() if value.ndim and len(value) == len(images)}
    size, parts = (images.shape[-2], images.shape[-1]), len(batch) if in_order else 0
    masks, noted = _masks(per_image, parts, names, size)
    labels, labelled = _labels(per_image, 3 if masks is not None else 2, parts, names, observed)
    inputs = {path: value for path, value in per_image.items() if path != name}
    return Content(images, labels, masks, inputs, name, (f"images {how}", labelled, *noted))


def objects(given: Tensor, size: tuple[int, int]) -> tuple[Tensor, str]:
    """Return masks of objects, of masks or of boxes, and what to say of them.

    Args:
        given: masks (B, h, w) or (B, 1, h, w); or boxes (B, 4) or (B, K, 4), x1, y1, x2, y2 in pixels, or as
            shares of the picture, if all lie in [0, 1]. A box of zeros is none.
        size: height and width of the images.
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


def _images(
    batch: Any, tensors: Mapping[str, Tensor], names: ItemNames, observed: ObservedStep | None
) -> tuple[str, str]:
    if names.show is not None:
        return _item(tensors, names.show, "show"), "as told"
    if observed is not None and observed.images[0] in tensors:
        return observed.images[0], f"as {observed.where} takes them"
    in_order = _in_order(batch)
    for dims in _DIMENSIONS:
        fit = [path for path, value in tensors.items() if value.ndim == dims and value.dtype != torch.bool]
        usual = _usual(fit, IMAGES)
        if dims == min(_DIMENSIONS):  # as many as masks have, and a single image
            usual = fit = _usual(fit, (SPECTROGRAMS,))
        if usual:
            return usual[0], f"in {usual[0]!r}"
        fit = [path for path in fit if last(path) not in MASKS]
        if fit and (len(fit) == 1 or in_order):
            return fit[0], "first" if in_order else f"in {fit[0]!r}"
        if fit:
            raise VitxError(
                f"{len(fit)} items of the batch may be the images, {', '.join(fit)}: give show={fit[0]!r}"
            )
    raise VitxError(f"no images (B, C, H, W) were found in {_description(batch)}: {_GIVE}")


def _labels(
    per_image: Mapping[str, Tensor], usually: int, parts: int, names: ItemNames, observed: ObservedStep | None
) -> tuple[Tensor | None, str]:
    """Return the labels, and how they were found; they are the second of so many parts, usually."""
    count = len(next(iter(per_image.values())))
    if names.labels is not None:
        path = _item(per_image, names.labels, "labels")
        return per_image[path], f"labels in {path!r} as told"
    if observed is not None and (labels := observed.labels(per_image, count)) is not None:
        return labels, f"labels as {observed.where} compares them"
    flat = [path for path, value in per_image.items() if value.ndim <= 2]
    if usual := _usual(per_image, LABELS):
        return per_image[usual[0]], f"labels in {usual[0]!r}"
    if "1" in flat and parts == usually:
        return per_image["1"], "labels second"
    name = int(flat[0]) if flat and flat[0].isdigit() else flat and flat[0]
    return None, f"no labels (if they are {flat[0]!r}, say labels={name!r})" if flat else "no labels"


def _masks(
    per_image: Mapping[str, Tensor], parts: int, names: ItemNames, size: tuple[int, int]
) -> tuple[Tensor | None, tuple[str, ...]]:
    if names.boxes is not None:
        path = _item(per_image, names.boxes, "boxes")
        masks, said = objects(per_image[path], size)
        return masks, (f"{said} in {path!r} as told",)
    if usual := _usual(per_image, (*MASKS, *BOXES)):
        try:
            masks, said = objects(per_image[usual[0]], size)
            return masks, (f"{said} in {usual[0]!r}",)
        except VitxError as error:
            return None, (f"{usual[0]!r} left out, {error}",)
    if parts == 3 and "2" in per_image:  # (images, labels, boxes)
        with suppress(VitxError):
            masks, said = objects(per_image["2"], size)
            return masks, (f"{said} third",)
    return None, ()


def _item(tensors: Mapping[str, Tensor], name: Name, option: str) -> str:
    found = [path for path in tensors if path == str(name)] or _usual(tensors, (str(name),))
    if len(found) != 1:
        has = ", ".join(tensors) or "no tensors"
        raise VitxError(f"{option}={name!r} names no single item of the batch, which has {has}")
    return found[0]


def _usual(paths: Iterable[str], names: Sequence[str]) -> list[str]:
    """Return the paths that end in one of these names, in the order of the names."""
    return [path for name in names for path in paths if last(path) == name]


def _in_order(batch: Any) -> bool:
    return isinstance(batch, Sequence) and not isinstance(batch, str) and not hasattr(batch, "_asdict")


def _description(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a batch with the keys {', '.join(map(str, batch))}"
    if isinstance(batch, Tensor):
        return f"a batch of shape {tuple(batch.shape)}"
    return f"a batch of type {type(batch).__name__}"

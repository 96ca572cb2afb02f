"""The images, labels and masks in a batch, found by the user's step, by options, or by common names."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
# Common names by dimensions: clips and volumes (5), images (4), Hugging Face's spectrograms (3).
_USUAL = {5: IMAGES, 4: IMAGES, 3: ("input_values",)}
_ITEM = re.compile(r"(?<![^.])\d+\.")  # of a list, in a path that goes on into the item
_ROUNDED = 1.01  # of a box that ends at the border
_GIVE = 'give batch_transform=lambda batch: {"image": ..., "label": ...}'

PARTS = ("images", "labels", "masks")  # the fields of Content that are tensors

Name = str | int  # of an item of a batch: its key or its position
Items = Mapping[str, Name | None]  # items that the user names: "show" (images), "labels", "boxes" (or masks)


@dataclass(frozen=True)
class Content:
    """The content of a batch of B images."""

    images: Tensor  # (B, C, H, W); clips and volumes have five dimensions, spectrograms three
    labels: Tensor | None = None  # (B, ...): a class for each image, several classes, or numbers
    masks: Tensor | None = None  # (B, h, w) bool, True on the object or inside its boxes
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  # other tensors, (B, ...), by path
    name: str = "0"  # the path of the images
    found: tuple[str, ...] = ()  # descriptions of what was found where
    unsure: bool = False  # whether the masks may be wrong: nothing tells in which form the boxes are

    def __len__(self) -> int:
        return len(self.images)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Content":
        """Return a copy with a function applied to each tensor."""
        made: dict[str, Any] = {"inputs": {name: function(one) for name, one in self.inputs.items()}}
        made |= {name: function(part) for name in PARTS if (part := vars(self)[name]) is not None}
        return replace(self, **made)


def read_batch(batch: Any, items: Items | None = None, observed: ObservedStep | None = None) -> Content:
    """Find images, labels, and masks or boxes in a batch of tensors, sequences, mappings and objects.

    Items that the user names take precedence, then those that the user's step used, then common names. In a
    pair, the images come first and the labels second. Other tensors with an entry per image become `inputs`.
    """
    # Tensor subclasses, such as MONAI's, may slice in their own way.
    tensors = {path: value.detach().as_subclass(Tensor) for path, value in tensors_of(batch)}
    in_order = isinstance(batch, Sequence) and not isinstance(batch, str) and not hasattr(batch, "_asdict")
    items, parts = items or {}, len(batch) if in_order else 0
    if items.get("show") is not None:
        name = _item(tensors, items, "show")
    elif observed is not None and observed.images[0] in tensors:
        name = observed.images[0]
    else:
        name = _images(batch, tensors, in_order)
    images, of_one = tensors[name], _lists(tensors, name, len(tensors[name]))
    per_image = {
        path: value
        for path, value in tensors.items()
        if value.ndim and len(value) == len(images) and not path.startswith(of_one)
    }
    nested = name.rpartition(".")[0]  # what lies there, beside the images, is as a mask of their padding
    taken = [path for path in per_image if nested and path.rpartition(".")[0] == nested]
    taken += observed.output.leaves if observed is not None else []
    masks, noted, unsure = _masks(per_image, parts, items, (images.shape[-2], images.shape[-1]), taken)
    labels, labeled = _labels(per_image, 3 if masks is not None else 2, parts, items, observed)
    inputs = {path: value for path, value in per_image.items() if path != name}
    shown = [f"images: {_place(name)} of a batch"] if name else []
    return Content(images, labels, masks, inputs, name, (*shown, f"labels: {labeled}", *noted), unsure)


def objects(given: Tensor, size: tuple[int, int]) -> tuple[Tensor, str]:
    """Return the masks of objects, given as masks or boxes, and a word for what was given.

    Args:
        given: masks (B, h, w) or (B, 1, h, w); or boxes (B, 4) or (B, K, 4) as x1, y1, x2, y2 in pixels, or
            as fractions of width and height if all lie in [0, 1]. A box of zeros is ignored.
        size: height and width of the images.
    """
    if given.ndim == 4 and given.shape[1] == 1:
        given = given[:, 0]
    height, width = size
    if given.ndim == 3 and (given.dtype == torch.bool or given.shape[1] * width == given.shape[2] * height):
        return given > 0, "masks"
    if given.ndim not in (2, 3) or given.shape[-1] != 4 or given.is_complex():
        shape = tuple(given.shape)
        raise VitxError(f"boxes must be (n, 4) or (n, K, 4), or masks (n, h, w) of the images, found {shape}")
    boxes = given.float()
    x1, y1, x2, y2 = boxes[(boxes != 0).any(-1)].unbind(-1)
    shares = max(size) > 1 and bool((boxes >= 0).all() and (boxes <= 1).all())
    right, below = (1, 1) if shares else (width + 1, height + 1)
    good = (x1 >= 0) & (x1 < x2) & (x2 <= right) & (y1 >= 0) & (y1 < y2) & (y2 <= below)
    if len(x1) == 0 or not bool(good.all()):
        wrong = tuple(round(value, 2) for value in boxes.flatten(0, -2)[0].tolist())
        within = f"x1 < x2 and y1 < y2 within {width} x {height} pixels"
        raise VitxError(f"boxes must have {within}, found {wrong}: change them, or give boxes=")
    if shares:
        boxes = boxes * torch.tensor([width, height, width, height], device=boxes.device)
    return box_masks(boxes, size), "boxes, shares of the picture, scaled" if shares else "boxes"


def _images(batch: Any, tensors: Mapping[str, Tensor], in_order: bool) -> str:
    """Return the path of the images by common conventions."""
    for dims, usual in _USUAL.items():
        fit = [path for path, value in tensors.items() if value.ndim == dims and value.dtype != torch.bool]
        if found := _usual(fit, usual):
            return found[0]
        # Masks and single images have as many dimensions as spectrograms, which need a common name.
        fit = [path for path in fit if last(path) not in MASKS and dims > min(_USUAL)]
        if fit and (len(fit) == 1 or in_order):
            return fit[0]
        if fit:
            several = f"{len(fit)} items of the batch may be the images, {', '.join(fit)}"
            raise VitxError(f"{several}: give show={fit[0]!r}")
    if cut := [path for path in _usual(tensors, IMAGES) if tensors[path].ndim == 2]:
        shape = tuple(tensors[cut[0]].shape)
        raise VitxError(
            f"{cut[0]!r} holds patches cut by a processor, {shape}, which cannot be shown in a training: "
            "leave the callback out, and explain a checkpoint with `vitx ask`, or with vitx.explain(model, "
            "files, target=vitx.targets.word(...))"
        )
    kind = f"a batch of type {type(batch).__name__}"
    if isinstance(batch, Mapping):
        kind = f"a batch with the keys {', '.join(map(str, batch))}"
    if isinstance(batch, Tensor):
        kind = f"a batch of shape {tuple(batch.shape)}"
    raise VitxError(f"no images (B, C, H, W) were found in {kind}: {_GIVE}")


def _labels(
    per_image: Mapping[str, Tensor], usually: int, parts: int, items: Items, observed: ObservedStep | None
) -> tuple[Tensor | None, str]:
    """Return the labels and where they were found; in a batch of `usually` parts, they are the second."""
    if items.get("labels") is not None:
        path = _item(per_image, items, "labels")
        return per_image[path], _place(path)
    if observed is not None and (labels := observed.labels(per_image)) is not None:
        alike = {path: value.to(labels) for path, value in per_image.items() if value.shape == labels.shape}
        same = [path for path, value in alike.items() if torch.equal(value, labels)]
        return labels, _place(same[0]) if same else f"as {observed.where} compares them"
    if usual := _usual(per_image, LABELS):
        return per_image[usual[0]], _place(usual[0])
    flat = [path for path, value in per_image.items() if value.ndim <= 2]
    if "1" in flat and parts == usually:
        return per_image["1"], _place("1")
    name = _named(flat[0]) if flat else None
    return None, f"none (if they are {_place(flat[0])}, give labels={name!r})" if flat else "none"


def _masks(
    per_image: Mapping[str, Tensor], parts: int, items: Items, size: tuple[int, int], taken: Collection[str]
) -> tuple[Tensor | None, tuple[str, ...], bool]:
    """Return the masks of objects, where they were found, and whether they may be wrong.

    The items that the model has `taken` are doubted.
    """
    told = items.get("boxes") is not None
    named = [_item(per_image, items, "boxes")] if told else _usual(per_image, (*MASKS, *BOXES))
    if not named and not (parts == 3 and "2" in per_image):  # (images, labels, boxes)
        return None, (), False
    given = per_image[path := named[0] if named else "2"]
    try:
        masks, said = objects(given, size)
    except VitxError as error:
        if told:
            raise
        return None, (f"{_place(path)} left out: {error}",) if named else (), False
    corners, form = said != "masks", "masks of objects"
    if corners:
        form, sure = "x1, y1, x2, y2", _are_corners(given, size)
    else:  # of the size of the images, with one value on the objects
        sure = tuple(given.shape[-2:]) == size and len(given[given > 0].unique()) <= 1 and path not in taken
    if told or sure:
        return masks, (f"{said}: {_place(path)}",), False
    doubt = f"{_place(path)} left out, as it may not hold {form}: if it does, give boxes={_named(path)!r}"
    return masks if corners else None, (doubt,), corners


def _are_corners(boxes: Tensor, size: tuple[int, int]) -> bool:
    """Return whether some boxes would leave the picture as corner and size, and some as center and size."""
    first, last = boxes.float().split(2, -1)
    most = _ROUNDED * torch.tensor(size[::-1] if boxes.max() > 1 else (1, 1), device=boxes.device)
    as_corner, as_center = first + last > most, (first < last / 2) | (first + last / 2 > most)
    return bool(as_corner.any() and as_center.any())


def _lists(paths: Iterable[str], images: str, count: int) -> tuple[str, ...]:
    """Return the paths of lists of one structure for each of `count` images, such as a detector's targets."""
    items = defaultdict[str, set[str]](set)
    for path in paths:
        for item in _ITEM.finditer(path):
            items[path[: item.start()]].add(item.group())
    return tuple(one for one, held in items.items() if len(held) == count and not images.startswith(one))


def _item(tensors: Mapping[str, Tensor], items: Items, option: str) -> str:
    name = str(items[option])
    found = [name] if name in tensors else _usual(tensors, (name,))
    if len(found) > 1:
        raise VitxError(f"several items of the batch end in {name!r}: give {option}={found[0]!r}")
    if not found:
        each = "" if option == "show" else " for each image"
        known = " and ".join(filter(None, tensors)) or "without names"
        raise VitxError(f"the batch has no item {items[option]!r}{each}: its items are {known}")
    return found[0]


def _place(path: str) -> str:
    return f"item {path if path.isdigit() else repr(path)}"


def _named(path: str) -> Name:
    """Return the name of an item as an option takes it."""
    return int(path) if path.isdigit() else path


def _usual(paths: Iterable[str], names: Sequence[str]) -> list[str]:
    """Return the paths that end in one of these names, in the order of the names."""
    return [path for name in names for path in paths if last(path) == name]

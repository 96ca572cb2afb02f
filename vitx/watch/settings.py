"""Options of a watch: which images, which methods, when it fires, and how results are shown."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NoReturn

from torch import Tensor
from torch.utils.data import IterableDataset

from vitx.attribution import find_method, with_options
from vitx.errors import VitxError
from vitx.pictures.render import palette
from vitx.targets import Question, Text
from vitx.watch.batches import Items, Name
from vitx.watch.calling import Forward
from vitx.watch.data_sets import are, names_in, numbers_in

TargetOption = str | int | Callable[[Tensor], Tensor] | Question


def _one_of(*known: Any) -> tuple[Callable[[Any], bool], str]:
    return lambda one: isinstance(one, (str, int)) and one in known, " or ".join(map(repr, known))


def _whole(one: Any, least: int = 0) -> bool:
    return isinstance(one, Integral) and int(one) >= least


def _several(one: Any, counts: Sequence[int], fits: Callable[[Any], Any]) -> bool:
    return hasattr(one, "__len__") and len(one) in counts and all(map(fits, one))


def _images(one: Any) -> bool:
    return hasattr(one, "__getitem__") and (hasattr(one, "__len__") or isinstance(one, IterableDataset))


def _amount(one: Any) -> bool:
    return _whole(one, 1) or _several(one, [2], lambda part: _whole(part, 1))


def _target(one: Any) -> bool:
    known = one in ("predicted", "label", "caption") if isinstance(one, str) else _whole(one)
    return known or callable(one) or isinstance(one, Question)


# The names of options, a test that all values but the default must pass, and what passes it, in words.
_RULES: Sequence[tuple[str, Callable[[Any], Any], str]] = (
    ("images", _images, "a tensor, a data set, a list of files, or indices into the validation set"),
    ("per_class at_start on_validate", *_one_of(True, False)),
    ("weights", *_one_of("current", "ema")),
    ("save_maps", *_one_of(True, False, "all")),
    ("on_error", *_one_of("warn", "raise")),
    ("batch_transform forward_fn", callable, "a function"),
    ("every_n_epochs every_n_steps", lambda one: one is None or _whole(one), "a whole number, or None"),
    ("faithfulness", _whole, "True, False or a number of images"),
    ("num_images", _amount, "a whole number from 1, or two of them"),
    ("dataloader_idx", lambda one: isinstance(one, (str, int)), "the number or the name of a loader"),
    ("labels show", lambda one: isinstance(one, (str, int)), "an item of a batch, by key or position"),
    ("boxes", lambda one: isinstance(one, (str, int, Tensor)), "a tensor, or an item of a batch"),
    ("class_names", names_in, "a list of names, or a mapping between names and 0, 1, ..."),
    ("normalization", lambda one: _several(one, [2], numbers_in), "(mean, std), numbers for the channels"),
    ("bands", lambda one: _several(one, [1, 3], _whole), "one or three channels, in a list"),
    ("target", _target, '"predicted", "label", "caption", a class, a function or one of vitx.targets'),
)


class Settings:
    """The options of a watch, shared by all callbacks."""

    def __init__(
        self,
        images: Any = None,
        num_images: int | tuple[int, int] = 8,
        per_class: bool = False,
        dataloader_idx: int | str = 0,
        batch_transform: Callable[[Any], Any] | None = None,
        methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("rollout", "grad_rollout"),
        target: TargetOption = "predicted",
        forward_fn: Forward | None = None,
        weights: Literal["current", "ema"] = "current",
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        at_start: bool = True,
        on_validate: bool = False,
        class_names: Sequence[str] | Mapping[Any, Any] | None = None,
        labels: Name | None = None,
        show: Name | None = None,
        boxes: Tensor | Name | None = None,
        normalization: tuple[float | Sequence[float], float | Sequence[float]] | None = None,
        bands: Sequence[int] | None = None,
        colormap: str = "inferno",
        faithfulness: int | bool = False,
        save_maps: Literal["all"] | bool = True,
        on_error: Literal["warn", "raise"] = "warn",
        **_unknown: NoReturn,
    ) -> None:
        """Check and store the options.

        Args:
            images: a tensor (n, C, H, W), a data set, image files, or indices into the validation set. The
                default, None, takes evenly spaced images of the validation set.
            num_images: how many images of a tensor or a data set the grid shows (files and indices are all
                shown); or a pair: how many the grid shows, and how many the numbers are averaged over.
            per_class: take one image of each class of the data set instead of evenly spaced ones.
            dataloader_idx: which of several validation loaders to use, by number or by name.
            batch_transform: a function from a batch of your loader, or from the tensor of images given, to
                images, to (images, labels, masks), or to a mapping with such keys.
            methods: names of methods, or a mapping from names to their options; see `vitx.methods()`.
            target: what gradient methods explain: the class "predicted" or "label", a class by its index, a
                function from logits to scores, one of `vitx.targets` (of several texts, the one nearest to
                each image), or "caption" for each image's own text, given as token ids in the batch.
            forward_fn: a function from (module, images) to logits; by default the module's own forward. Other
                arguments that either one requires are taken by name from batches that are mappings.
            weights: "current", or "ema" for averaged weights that a callback or the module holds.
            every_n_epochs: fire at the end of every n-th epoch; None or 0 for never.
            every_n_steps: fire after every n-th step; None or 0 for never.
            at_start: fire before the first step.
            on_validate: also fire when the model is validated or tested outside of a training.
            class_names: names of the classes; by default those of the data set, else class numbers.
            labels: the item of a batch that holds the labels, by key or position; by default the one that
                your step compares the output with.
            show: the item of a batch that holds the images, if several might.
            boxes: the object's location in each image: boxes (n, 4) or (n, K, 4) as x1, y1, x2, y2 in pixels
                or as fractions of width and height, or masks (n, h, w), True on the object; or the item of a
                batch that holds them, by default one named boxes or masks.
            normalization: mean and std, for all channels or for each, with which the images were normalized;
                by default the values that the transforms of the data set, the module or the data module hold,
                or that the model declares, if they fit the images. Otherwise colors are guessed, which is
                reported.
            bands: the channels to show, one or three, such as (3, 2, 1); by default the first three.
            colormap: the name of a matplotlib colormap.
            faithfulness: measure at each firing whether the model relies on what the maps highlight, on all
                measured images or on the first n; see `vitx.metrics.faithfulness` and `reliance`.
            save_maps: save maps, logits, numbers and the images shown in the run's folder `vitx`, for
                `vitx report` and `vitx timelapse`; "all" saves the maps of all measured images.
            on_error: "warn" lets the training continue when an explanation fails; "raise" stops it.

        Raises:
            VitxError: An argument is wrong.
        """
        given, known = locals(), signature(Settings).parameters
        for name in _unknown:
            near = get_close_matches(name, [*known, *signature(type(self)).parameters], 1)
            hint = f"did you mean {near[0]}?" if near else "vitx.watch.Settings lists them"
            raise VitxError(f"{type(self).__name__} has no option {name!r}: {hint}")
        if isinstance(images, (str, Path)):
            kind = "a folder" if Path(images).is_dir() else "a path"
            raise VitxError(f"{str(images)!r} is {kind}: give image files in a list, or a data set")
        for names, fits, form in _RULES:
            for name in names.split():
                if given[name] is not known[name].default and not fits(given[name]):
                    raise VitxError(f"{name} must be {form}, found {reprlib.repr(given[name])}")
        palette(colormap)  # raises a VitxError if there is none of this name
        super().__init__()
        pair: Any = [num_images] * 2 if _whole(num_images) else num_images
        self.num_images, self.num_measured = pair[0], max(pair)
        # Indices may come in a tensor or an array.
        self.images = images.tolist() if getattr(images, "ndim", None) == 1 else images
        self.per_class, self.dataloader_idx, self.batch_transform = per_class, dataloader_idx, batch_transform
        named = boxes if isinstance(boxes, (str, int)) else None
        self.items: Items = {"show": show, "labels": labels, "boxes": named}
        self.boxes = None if isinstance(boxes, (str, int)) else boxes
        alone = isinstance(self.images, Tensor) or are(self.images, (str, Path))
        ignored: Items = {} if batch_transform or not alone else self.items
        chosen = per_class and (alone or are(self.images, int))
        if wrong := [name for name, item in ignored.items() if item is not None] + ["per_class"] * chosen:
            raise VitxError(f"{wrong[0]} has no effect on the images given: leave it out, or give a data set")
        self.methods, self.forward_fn = with_options(methods), forward_fn
        layered = [name for name in self.methods if find_method(name).gradient == "layer scores"]
        if layered and (target == "caption" or isinstance(target, Question)):
            raise VitxError(f"{layered[0]} explains only classes: use another method for this target")
        if isinstance(target, Question):
            target = target.one_each()
        if isinstance(target, Text):
            class_names = target.names if target.kind == "class" else class_names
        self.target, self.class_names = target, names_in(class_names)
        self.every_n_epochs, self.every_n_steps = every_n_epochs or 0, every_n_steps or 0
        self.at_start, self.on_validate = at_start, on_validate
        self.normalization = normalization and (numbers_in(normalization[0]), numbers_in(normalization[1]))
        self.bands, self.colormap = bands, colormap
        self.faithfulness = self.num_measured if faithfulness is True else int(faithfulness)
        self.weights, self.save_maps, self.on_error = weights, save_maps, on_error
        self.reset()

    def reset(self) -> None:
        """Reset the state for a new training."""

"""Options of a watch: which images, which methods, when it fires, and how results are shown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from vitx.attribution import with_options
from vitx.errors import VitxError
from vitx.targets import Question, Text
from vitx.watch.batches import Items, Name
from vitx.watch.calling import Forward
from vitx.watch.data_sets import given_names

TargetOption = str | int | Callable[[Tensor], Tensor] | Question


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
        normalization: tuple[Sequence[float], Sequence[float]] | None = None,
        bands: Sequence[int] | None = None,
        colormap: str = "inferno",
        faithfulness: int | bool = False,
        save_maps: Literal["all"] | bool = True,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        """Check and store the options.

        Args:
            images: a tensor (n, C, H, W), a data set, image files, or indices into the validation set. The
                default, None, takes evenly spaced images of the validation set.
            num_images: how many images of a tensor or a data set the grid shows (files and indices are all
                shown); or a pair: how many the grid shows, and how many the numbers are averaged over.
            per_class: take one image of each class of the data set instead of evenly spaced ones.
            dataloader_idx: which of several validation loaders to use, by number or by name.
            batch_transform: a function from a batch of your loader to images, to (images, labels, masks), or
                to a mapping with such keys.
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
            normalization: mean and std of each channel with which the images were normalized; by default the
                values that the transforms of the data set, the module or the data module hold, or that the
                model declares, if they fit the images. Otherwise colors are guessed, which is reported.
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
        super().__init__()
        pair = (num_images, num_images) if isinstance(num_images, int) else tuple(num_images)
        if len(pair) != 2 or min(pair) < 1:
            raise VitxError(f"num_images must be at least 1, or two such numbers, found {num_images}")
        self.num_images, self.num_measured = pair[0], max(pair)
        # Indices may come in a tensor or an array.
        self.images = images.tolist() if getattr(images, "ndim", None) == 1 else images
        self.per_class, self.dataloader_idx, self.batch_transform = per_class, dataloader_idx, batch_transform
        named = boxes if isinstance(boxes, (str, int)) else None
        self.items: Items = {"show": show, "labels": labels, "boxes": named}
        self.boxes = None if isinstance(boxes, (str, int)) else boxes
        self.methods, self.forward_fn = with_options(methods), forward_fn
        if isinstance(target, str) and target not in ("predicted", "label", "caption"):
            kinds = '"predicted", "label", "caption", a class, a function or one of vitx.targets'
            raise VitxError(f"target must be {kinds}, found {target!r}")
        if isinstance(target, Question):
            target = target.one_each()
        if isinstance(target, Text):
            class_names = target.names if target.kind == "class" else class_names
        self.target, self.class_names = target, given_names(class_names)
        self.every_n_epochs, self.every_n_steps = every_n_epochs or 0, every_n_steps or 0
        self.at_start, self.on_validate = at_start, on_validate
        if normalization is not None and len(normalization) != 2:
            raise VitxError(f"normalization must be (mean, std), found {len(normalization)} values")
        self.normalization, self.bands, self.colormap = normalization, bands, colormap
        if faithfulness < 0:
            raise VitxError(f"faithfulness must be True, False or a number of images, found {faithfulness}")
        self.faithfulness = self.num_measured if faithfulness is True else int(faithfulness)
        for name, value, known in (
            ("weights", weights, ("current", "ema")),
            ("save_maps", save_maps, (True, False, "all")),
            ("on_error", on_error, ("warn", "raise")),
        ):
            if value not in known:
                raise VitxError(f"{name} must be {' or '.join(map(repr, known))}, found {value!r}")
        self.weights, self.save_maps, self.on_error = weights, save_maps, on_error
        self.reset()

    def reset(self) -> None:
        """Reset the state for a new training."""

"""Options of a watch: which images, which methods, when, and how it is shown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from vitx.attribution import with_options
from vitx.errors import VitxError
from vitx.targets import Question, Text
from vitx.watch.batches import Name, Told
from vitx.watch.calling import Forward
from vitx.watch.data_sets import names_in

TargetOption = str | int | Callable[[Tensor], Tensor] | Question


class Settings:
    """The options of a watch, which all callbacks share."""

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
        """Take the options.

        Args:
            images: a tensor (n, C, H, W), a data set, image files, or indices into the validation set; None:
                evenly spaced from the validation set.
            num_images: how many of a tensor or a data set the grid shows (of files and indices: all); or two
                numbers: how many it shows, and how many the numbers are means over.
            per_class: take one image of each class of the data set, not evenly spaced ones.
            dataloader_idx: which of several validation loaders, by its number or its name.
            batch_transform: a function from a batch of your loader to images, to (images, labels, masks), or
                to a mapping with such names.
            methods: names, or a mapping from names to the options of each, see `vitx.methods()`.
            target: the class that gradient methods explain: "predicted", "label", a class, a function from
                logits to scores, or one of `vitx.targets`: of several texts, that which an image is nearest
                to. Or "caption": the text, as token ids, that a batch has for each image.
            forward_fn: a function from (module, images) to logits; by default the module's own forward. What
                else either asks for by name is taken from batches that are mappings.
            weights: "current", or "ema" for averaged ones that a callback or the module keeps.
            every_n_epochs: fire at the end of every n-th epoch; None or 0 for never.
            every_n_steps: fire after every n-th step; None or 0 for never.
            at_start: fire before the first step.
            on_validate: fire when the model is validated or tested outside of a training, too.
            class_names: by default those of the data set, else the numbers.
            labels: the item of a batch that holds the labels, by its key or its place; by default what your
                step compares the output with.
            show: the item of a batch that holds the images, where there are several.
            boxes: where the object is in each image: boxes (n, 4) or (n, K, 4), x1, y1, x2, y2 in pixels or
                as shares of the picture, or masks (n, h, w), True on it; or the item of a batch that holds
                them, by default what is called boxes or masks.
            normalization: mean and std of each channel, by which the images were normalised; by default what
                the transforms of the data set, the module or the data module hold, or the model declares, as
                far as it fits. Else colours are guessed, as is said.
            bands: which channels are shown, one or three, as (3, 2, 1); by default the first three.
            colormap: the name of a colour map of matplotlib.
            faithfulness: measure at each firing, on all measured images or the first so many, whether the
                model needs what the maps name, see `vitx.metrics.faithfulness` and `reliance`.
            save_maps: keep maps, logits, numbers and the images shown in the folder `vitx` of the run, for
                `vitx report` and `vitx timelapse`; "all": the maps of all measured images.
            on_error: "warn" lets the training go on when an explanation fails, "raise" does not.

        Raises:
            VitxError: An argument is wrong.
        """
        super().__init__()
        pair = (num_images, num_images) if isinstance(num_images, int) else tuple(num_images)
        if len(pair) != 2 or min(pair) < 1:
            raise VitxError(f"num_images must be at least 1, or two such numbers, found {num_images}")
        self.num_images, self.num_measured = pair[0], max(pair)
        # Places may be in a tensor or an array.
        self.images = images.tolist() if getattr(images, "ndim", None) == 1 else images
        self.per_class, self.dataloader_idx, self.batch_transform = per_class, dataloader_idx, batch_transform
        named = boxes if isinstance(boxes, (str, int)) else None
        self.items: Told = {"show": show, "labels": labels, "boxes": named}
        self.boxes = None if isinstance(boxes, (str, int)) else boxes
        self.methods, self.forward_fn = with_options(methods), forward_fn
        if isinstance(target, str) and target not in ("predicted", "label", "caption"):
            kinds = '"predicted", "label", "caption", a class, a function or of vitx.targets'
            raise VitxError(f"target must be {kinds}, found {target!r}")
        if isinstance(target, Question):
            target = target.one_each()
        if isinstance(target, Text):
            class_names = target.names if target.kind == "class" else class_names
        self.target, self.class_names = target, names_in(class_names)
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
        """Make ready for a training from its start."""

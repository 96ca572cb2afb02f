"""Options that name a model, and the model that they select."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitx
from vitx.attribution import Methods, find_method, telling
from vitx.cli.options import COUNT, NUMBERS, SWITCH, Kind, add, read_settings
from vitx.errors import VitxError
from vitx.inputs.clips import ClipPreprocessing, VolumePreprocessing
from vitx.inputs.prepared import preprocessing_of, to_tensor
from vitx.inputs.preprocessing import Preprocessing
from vitx.models.classes import find_class, known_class_names, read_class_names, short
from vitx.models.named import load_named
from vitx.passes import Target

PREDICTED = "predicted"
_INPUT: dict[str, Kind] = dict.fromkeys(("size", "frames", "time_axis", "max_pixels"), COUNT)
_INPUT |= dict.fromkeys(("mean", "std", "volume"), NUMBERS) | {"keep_aspect": SWITCH}


@dataclass(frozen=True)
class Subject:
    """A model in eval mode, with its preprocessing, its classes and the methods that explain it."""

    model: nn.Module
    prepare: Preprocessing
    classes: int  # the number of classes, or of texts; 0 if the model returns features
    class_names: tuple[str, ...] | None  # full names
    methods: Methods  # with their options
    tokenizer: Any = None  # for texts

    @cached_property
    def short_names(self) -> list[str] | None:
        """The first synonym of each class, or None."""
        return None if self.class_names is None else [short(name) for name in self.class_names]

    def name(self, index: int) -> str:
        """Return the short name of a class, or its number."""
        return str(index) if self.short_names is None else self.short_names[index]

    def move(self, images: Tensor) -> Tensor:
        """Return images on the device and in the dtype of the model."""
        return images.to(next(self.model.parameters(), images))

    def batch(self, pictures: Sequence[Any]) -> Tensor:
        """Prepare files or images as input of the model, (B, C, H, W)."""
        return self.move(to_tensor(pictures, self.prepare))

    def try_out(self, methods: Methods, target: Target = None) -> Tensor:
        """Explain a blank image, so that unsupported models fail early, and return the logits."""
        blank = self.move(torch.zeros(1, *self.prepare.shape))
        return next(iter(self.explain(blank, methods, target).values())).logits

    def explain(self, images: Tensor, methods: Methods, target: Target = None) -> dict[str, vitx.Explanation]:
        """Explain prepared images, (B, C, H, W), by each method; a target of None is the predicted class."""
        found = vitx.explain_methods(self.model, images, methods, target=target)
        mean, std = self.prepare.mean, self.prepare.std  # the model may declare other values
        return {name: replace(explanation, mean=mean, std=std) for name, explanation in found.items()}

    def find_class(self, target: str) -> int | None:
        """Return the index of a class from its number or name; None for the predicted class."""
        return None if target == PREDICTED else find_class(target, self.classes, self.class_names)


def add_model_options(command: Any, several: bool = False, required: bool = True) -> None:
    """Add the options that name one model, or several."""
    more: dict[str, Any] = {"nargs": "+"} if several else {}
    name = "a name in timm; hf-hub:NAME; a folder; open_clip:NAME; or your own, package.module:name"
    add(command, "--model", "NAME", name, required=required, **more)
    weights = "its weights: .safetensors, .pth, or a .ckpt of Lightning (default: those it comes with)"
    add(command, "--weights", "FILE", weights, **more)


def add_model_details(command: Any) -> None:
    """Add the rarer options of a model."""
    group = command.add_argument_group("more on the model")
    made = "arguments for timm or your own code, such as depth=4; or one JSON object"
    add(group, "--model-options", "KEY=VALUE", made, nargs="+")
    takes = f"how it expects images, if it does not declare this: {', '.join(_INPUT)}"
    add(group, "--input-options", "KEY=VALUE", takes, nargs="+")
    add(group, "--class-names", "FILE", "names of the classes, one per line (default: the model's own)")
    add(group, "--trust", "", "also load files that run code")


def add_picture(command: Any, images: str, help: str, output: str, **models: bool) -> Any:
    """Add the options of a command that writes one picture, and return the group for further options.

    The argument `images` is named "image" or "images"; `models` go to `add_model_options`.
    """
    add(command, images, "IMAGE", help, **({"nargs": "+"} if images == "images" else {}))
    add_model_options(command, **models)
    group = command.add_argument_group("what to draw")
    add(group, "--target", "CLASS", "a number, or a name", default=PREDICTED)
    add(command, "--output", "FILE", "the PNG file to write", default=output)
    add_model_details(command)
    return group


def load_subject(
    options: Any, methods: Methods, *, optional: bool = False, classes: bool = True, texts: bool = False
) -> Subject:
    """Load the model of a command; if it is asked about classes, try the methods on a blank image.

    The model must support all methods, or only the first if they are `optional`. It must be a classifier,
    unless `classes` is False, or compare images with texts if `texts` is True.
    """
    given = read_settings("--input-options", options.input_options, _INPUT)
    most = given.pop("max_pixels", None)
    of_timm = {"img_size": given.get("size"), "dynamic_img_size": given.get("keep_aspect")}
    loaded = load_named(
        options.model,
        None if options.weights is None else Path(options.weights),
        read_settings("--model-options", options.model_options),
        of_timm={key: value for key, value in of_timm.items() if value},
        trust=options.trust,
        texts=texts,
        classes=classes,
    )
    if loaded.prepare is not None and given:
        extra = f"--input-options {', '.join(given)}"
        raise VitxError(f"{options.model} has an image processor of its own: leave out {extra}")
    prepare = loaded.prepare or _prepare(loaded.model, given)
    prepare = replace(prepare, most_pixels=most or prepare.most_pixels)
    subject = Subject(loaded.model, prepare, 0, loaded.names or None, methods, loaded.tokenizer)
    if not classes or texts:
        if options.class_names is not None:
            raise VitxError("--class-names needs a model with classes: leave it out")
        return subject
    headless = loaded.names == () or getattr(loaded.model, "num_classes", None) == 0
    try:
        count = _count_classes(subject, methods, headless)
    except VitxError as error:
        if not optional or len(methods) == 1:
            raise
        first = next(iter(methods))
        methods = {first: methods[first]}
        count = _count_classes(subject, methods, headless)
        print(f"only {first} is shown: {error}", file=sys.stderr)
    names = loaded.names or known_class_names(count)
    if options.class_names is not None:
        names = read_class_names(Path(options.class_names))
        if len(names) != count:
            raise VitxError(
                f"{options.class_names} must name {count} classes, one a line: found {len(names)}"
            )
    return replace(subject, classes=count, class_names=names, methods=methods)


def _prepare(model: nn.Module, given: dict[str, Any]) -> Preprocessing:
    """Return the preprocessing of images, volumes, or the frames of clips, or raise a VitxError."""
    volume, frames, axis = (given.pop(name, None) for name in ("volume", "frames", "time_axis"))
    if axis not in (None, 1, 2) or (axis and not frames):
        raise VitxError(f"time_axis must be 1 or 2, and needs frames: found {axis}")
    if volume is None:
        prepare = preprocessing_of(model, **given)
        if not frames:
            return prepare
        return ClipPreprocessing(**vars(prepare) | {"frames": frames, "channels": 3 - (axis or 2)})
    if len(volume) != 3 or min(volume) < 1 or any(one % 1 for one in volume):
        raise VitxError(f"volume takes three sizes, depth first, as volume=96,96,96: found {volume}")
    if frames or given.keys() & {"size", "keep_aspect"}:
        raise VitxError("volume already gives all sizes: leave out frames, size and keep_aspect")
    depth, height, width = map(int, volume)
    mean, std = given.get("mean", [0.0])[:1], given.get("std", [1.0])[:1]
    return VolumePreprocessing((height, width), tuple(mean), tuple(std), depth=depth)


def _count_classes(subject: Subject, methods: Methods, headless: bool) -> int:
    """Run a blank image, and return the number of classes, 0 for a model without a head."""
    logits = subject.try_out(methods)
    if logits.ndim > 2:
        said = f"the model must return logits (B, classes), found {tuple(logits.shape)}"
        raise VitxError(f"{said}: use vitx explain with --region, --objects or --patch")
    if not headless:
        return 2 if logits.ndim == 1 else max(2, logits.shape[1])  # a single logit stands for two classes
    name = telling(methods)
    if find_method(name).gradient:
        said = f"the model has no head, and {name} explains a class"
        raise VitxError(f"{said}: take --method rollout, or the whole model")
    return 0

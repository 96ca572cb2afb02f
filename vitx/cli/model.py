"""The options that name a model, and the model that they mean."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

import vitx
from vitx.attribution import Methods, find_method
from vitx.cli.options import COUNT, NUMBERS, SWITCH, Kind, add, new_parser, read_settings
from vitx.errors import VitxError
from vitx.inputs.choosing import preprocessing_of
from vitx.inputs.clips import CHANNELS_FIRST, FRAMES_FIRST, ClipPreprocessing
from vitx.inputs.prepared import to_tensor
from vitx.inputs.preprocessing import Preprocessing
from vitx.inputs.volumes import VolumePreprocessing
from vitx.models.classes import find_class, known_class_names, read_class_names, short
from vitx.models.named import Loaded, load_named
from vitx.passes import Target

PREDICTED = "predicted"
_INPUT: Mapping[str, Kind] = {
    **dict.fromkeys(("size", "frames", "time_axis", "max_pixels"), COUNT),
    **dict.fromkeys(("mean", "std", "volume"), NUMBERS),
    "keep_aspect": SWITCH,
}


@dataclass(frozen=True)
class Subject:
    """A model, in eval mode, with its inputs and outputs."""

    model: nn.Module
    prepare: Preprocessing
    classes: int  # the number of classes, or of texts; 0 if the model puts out features
    class_names: tuple[str, ...] | None  # in full
    methods: Methods  # that explain it
    max_pixels: int | None = None  # of the largest file that is read; None: the limit of its kind
    tokenizer: Any = None  # of its texts

    @property
    def predicts(self) -> bool:
        """True if the model tells classes, or texts, apart."""
        return self.classes > 1

    @cached_property
    def short_names(self) -> list[str] | None:
        """The first synonym of each class, or None."""
        return None if self.class_names is None else [short(name) for name in self.class_names]

    def name(self, index: int) -> str:
        """Return the short name of a class, or its number."""
        return str(index) if self.short_names is None else self.short_names[index]

    def batch(self, pictures: Sequence[Any]) -> Tensor:
        """Prepare files, or images, as the model takes them, (B, C, H, W)."""
        images = to_tensor(pictures, self.prepare, self.max_pixels)
        return images.to(next(self.model.parameters(), images))

    def explain(self, images: Tensor, methods: Methods, target: Target = None) -> dict[str, vitx.Explanation]:
        """Explain prepared images, (B, C, H, W), by each method; target None is the predicted class."""
        found = vitx.explain_methods(self.model, images, methods, target=target)
        mean, std = self.prepare.mean, self.prepare.std  # the model may declare others
        return {name: replace(explanation, mean=mean, std=std) for name, explanation in found.items()}

    def find_class(self, target: str) -> int | None:
        """Return the class of a number or a name; None for the predicted one."""
        return None if target == PREDICTED else find_class(target, self.classes, self.class_names)


def add_model_options(parser: ArgumentParser, several: bool = False, required: bool = True) -> None:
    """Add the options that name a model, or several."""
    more: dict[str, Any] = {"nargs": "+"} if several else {}
    name = "of timm; hf-hub:NAME; a folder; open_clip:NAME; or your own, package.module:name"
    add(parser, "--model", "NAME", name, required=required, **more)
    weights = "its weights: .safetensors, .pth, or a .ckpt of Lightning (default: those that it comes with)"
    add(parser, "--weights", "FILE", weights, **more)


def add_model_details(parser: ArgumentParser) -> None:
    """Add the rarer options of a model."""
    group = parser.add_argument_group("more on the model")
    made = "arguments for timm or your own code, as depth=4; or one JSON object"
    add(group, "--model-options", "KEY=VALUE", made, nargs="+")
    takes = f"how it takes images, if it does not declare it: {', '.join(_INPUT)}"
    add(group, "--input-options", "KEY=VALUE", takes, nargs="+")
    add(group, "--class-names", "FILE", "names of the classes, one in each line (default: the model's own)")
    add(group, "--trust", "", "also load files that run code")


def picture_parser(description: str, image: str, output: str, **models: bool) -> tuple[ArgumentParser, Any]:
    """Return the options of a command that writes one picture, and the group for its own ones.

    It takes one image where the help on it begins with "an", and `models` go to `add_model_options`.
    """
    made = new_parser(description)
    one = image.startswith("an ")
    add(made, "image" if one else "images", "IMAGE", image, **({} if one else {"nargs": "+"}))
    add_model_options(made, **models)
    group = made.add_argument_group("what to draw")
    add(group, "--target", "CLASS", "a number, or a name", default=PREDICTED)
    add(made, "--output", "FILE", "the PNG file to write", default=output)
    add_model_details(made)
    return made, group


def load_subject(
    options: Any, methods: Methods, *, optional: bool = False, classes: bool = True, texts: bool = False
) -> Subject:
    """Load a model, and try the methods on a blank image where it is asked for classes.

    Args:
        options: of the command.
        methods: that the model must take.
        optional: the first method is enough, where the model does not take them all.
        classes: the model tells classes apart, or puts out features of images.
        texts: the model compares images with texts.
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
        said = f"{options.model} has an image processor of its own"
        raise VitxError(f"{said}: leave out --input-options {', '.join(given)}")
    prepare = loaded.prepare or _prepare(loaded.model, given)
    subject = Subject(loaded.model, prepare, 0, loaded.names or None, methods, most, loaded.tokenizer)
    if not classes or texts:
        if options.class_names is not None:
            raise VitxError("--class-names are of models that tell classes apart: leave it out")
        return subject
    try:
        count = _classes(loaded, prepare, methods)
    except VitxError as error:
        if not optional or len(methods) == 1:
            raise
        (first, options_of_first), *_ = methods.items()
        methods = {first: options_of_first}
        count = _classes(loaded, prepare, methods)
        print(f"only {first} is shown: {error}", file=sys.stderr)
    names = loaded.names
    if options.class_names is not None:
        names = read_class_names(Path(options.class_names))
        if len(names) != count:
            raise VitxError(f"{options.class_names} names {len(names)} classes, and the model has {count}")
    names = names or known_class_names(count)
    return replace(subject, classes=count, class_names=names, methods=methods)


def _prepare(model: nn.Module, given: Mapping[str, Any]) -> Preprocessing:
    """Return the preprocessing of images, volumes, or the frames of clips, or raise a VitxError."""
    plain = dict(given)
    volume, frames, axis = (plain.pop(name, None) for name in ("volume", "frames", "time_axis"))
    if axis not in (None, FRAMES_FIRST, CHANNELS_FIRST) or (axis and not frames):
        raise VitxError(f"time_axis is 1 or 2, and goes with frames: found {axis}")
    if volume is None:
        prepare = preprocessing_of(model, **plain)
        if not frames:
            return prepare
        return ClipPreprocessing(**vars(prepare), frames=frames, time_axis=axis or CHANNELS_FIRST)
    if len(volume) != 3 or min(volume) < 1 or any(one % 1 for one in volume):
        raise VitxError(f"volume takes three sizes, depth first, as volume=96,96,96: found {volume}")
    if frames or plain.keys() & {"size", "keep_aspect"}:
        raise VitxError("volume has all sizes: leave out frames, size and keep_aspect")
    depth, height, width = map(int, volume)
    mean, std = given.get("mean", [0.0])[:1], given.get("std", [1.0])[:1]
    return VolumePreprocessing((height, width), tuple(mean), tuple(std), depth=depth)


def _classes(loaded: Loaded, prepare: Preprocessing, methods: Methods) -> int:
    """Return the number of classes, from a pass that also tells what cannot be explained."""
    model = loaded.model
    weight = next(model.parameters(), torch.empty(0))
    trial = torch.zeros(1, *prepare.shape, dtype=weight.dtype, device=weight.device)
    logits = next(iter(vitx.explain_methods(model, trial, methods).values())).logits
    if logits.ndim > 2:
        raise VitxError(
            f"the model must put out logits (B, classes), found {tuple(logits.shape)}: ask vitx explain by "
            "--region, --objects or --patch"
        )
    if loaded.names != () and getattr(model, "num_classes", None) != 0:
        return 2 if logits.ndim == 1 else max(2, logits.shape[1])  # one logit tells two apart
    needs = next((name for name in methods if find_method(name).gradient), None)
    if needs:
        said = f"the model has no head, and {needs} explains a class"
        raise VitxError(f"{said}: take --method rollout, or the whole model")
    return 0


def check_target(targets: Sequence[str], methods: Methods, against: str | None = None) -> None:
    """Raise a VitxError if a class is asked for, and no method explains one."""
    asked = [f"--target {target}" for target in targets if target != PREDICTED]
    asked += ["--against"] if against is not None else []
    if asked and not any(find_method(name).gradient for name in methods):
        given = f"{asked[0]} needs a method of a class, and {' and '.join(methods)} is not one"
        raise VitxError(f"{given}: add --method evidence")

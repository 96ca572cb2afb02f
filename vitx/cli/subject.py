"""The options that say which model, and the model that they mean."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn

import vitx
from vitx.attribution import Methods, find_method
from vitx.cli.formatting import HelpFormatter, add, check_least
from vitx.errors import VitxError
from vitx.inputs.choosing import preprocessing_of
from vitx.inputs.clips import CHANNELS_FIRST, FRAMES_FIRST, ClipPreprocessing
from vitx.inputs.preprocessing import Preprocessing
from vitx.inputs.volumes import VolumePreprocessing
from vitx.models.checkpoints import create_model, model_of_weights
from vitx.models.classes import find_class, known_class_names, read_class_names, short
from vitx.models.hub import load_hugging_face
from vitx.models.own import load_module, make_model
from vitx.passes import Target
from vitx.targets import Text

ROLLOUT: Methods = {"rollout": {}}
PREDICTED = "predicted"


@dataclass(frozen=True)
class Subject:
    """A model with what is known of it.

    Of a model that compares images with texts, the texts are its classes.

    Attributes:
        model: whose attention is explained.
        prepare: how it wants its images.
        classes: how many it tells apart; 0 for a backbone without a head, which puts out features.
        class_names: the full name of each, or None.
        texts: those that images are compared with, or None.
    """

    model: nn.Module
    prepare: Preprocessing
    classes: int
    class_names: tuple[str, ...] | None
    texts: Text | None = None

    @cached_property
    def short_names(self) -> list[str] | None:
        """The first synonym of each class, or None."""
        return None if self.class_names is None else [short(name) for name in self.class_names]

    def explain(self, images: Tensor, methods: Methods, target: Target = None) -> dict[str, vitx.Explanation]:
        """Explains prepared images, (B, C, H, W), by each method; target None is the predicted class."""
        found = vitx.explain_methods(self.model, images, methods, target=target)
        mean, std = self.prepare.mean, self.prepare.std  # the model may declare others
        return {name: replace(explanation, mean=mean, std=std) for name, explanation in found.items()}

    def name(self, index: int) -> str:
        """Returns what to call a class."""
        return str(index) if self.class_names is None else short(self.class_names[index])


def add_model_options(parser: ArgumentParser, several: bool = False) -> None:
    """Adds the options that say which model.

    Args:
        parser: of the command.
        several: whether --weights and --checkpoint may be given again and again.
    """
    again = {"action": "append"} if several else {}
    group = parser.add_argument_group("which model")
    add(group, "--model", "NAME", "a Vision Transformer of timm")
    add(group, "--factory", "FUNCTION", "or your own function or class that makes it: package.function")
    weights = "its weights: .safetensors, .pth, or a .ckpt of Lightning (default: timm's, or your function's)"
    add(group, "--weights", "FILE", weights, **again)
    arguments = "arguments for timm or your function, such as '{\"depth\": 4}'"
    add(group, "--model-options", "JSON", arguments, dict[str, Any], default={})
    add(group, "--hf", "NAME", "or a Hugging Face model: a folder, or a name on the hub", **again)
    add(group, "--checkpoint", "CKPT", "or a checkpoint of a LightningModule or another module ...", **again)
    add(group, "--module", "CLASS", "... and its class: package.module.Class")
    arguments = (
        "arguments for the class, instead of those in the checkpoint; an argument with a class_path is "
        'made first: \'{"net": {"class_path": "timm.create_model", "init_args": {...}}}\''
    )
    add(group, "--module-options", "JSON", arguments, dict[str, Any], default={})
    add(group, "--trust", "", "also read files that run code while they are read")
    group = parser.add_argument_group("what the model takes, if it does not declare it")
    add(group, "--image-size", "PIXELS", "height and width of the images", int)
    mean = "mean of each channel, for values in [0, 1]; floating point files keep their own units"
    add(group, "--mean", "V", mean, float, nargs="+")
    add(group, "--std", "V", "standard deviation of each channel", float, nargs="+")
    add(group, "--frames", "N", "how many frames of a clip the model takes", int)
    volume = "depth, height and width of a volume, for models that take volumes of one channel"
    add(group, "--volume", "N", volume, int, nargs="+")
    axis = "the dimension of the frames in a batch: 1 for (B, T, C, H, W), 2 for (B, C, T, H, W) (default)"
    add(group, "--time-axis", "1|2", axis, int)
    aspect = "keep the whole image and its proportions, in models with dynamic_img_size"
    add(group, "--keep-aspect", "", aspect)
    names = "names of the classes, one in each line (default: ImageNet's, for 1,000 classes)"
    add(group, "--class-names", "FILE", names)


def picture_parser(description: str, picture: str, several: bool = False) -> tuple[ArgumentParser, Any]:
    """Returns what commands have in common that write one picture, and the group of what to explain.

    Args:
        description: of the command.
        picture: the file to write, if no other is named.
        several: as for `add_model_options`.
    """
    made = ArgumentParser(description=description, formatter_class=HelpFormatter)
    add_model_options(made, several)
    group = made.add_argument_group("what to explain")
    add(group, "--target", "CLASS", "a number, or a name", default=PREDICTED)
    add(made, "--output", "FILE", "the PNG file to write", default=picture)
    return made, group


def load_subject(
    options: Any,
    weights: str | None = None,
    checkpoint: str | None = None,
    hf: str | None = None,
    *,
    methods: Methods | None = ROLLOUT,
) -> Subject:
    """Loads the model that the options mean.

    Args:
        options: those of `add_model_options`.
        weights: a file, or None.
        checkpoint: of a LightningModule, or None.
        hf: a folder or name of transformers, or None.
        methods: the options of each method that the model must take, by its name; None: it is not asked for
            classes, and may put out anything.

    Raises:
        VitxError: They do not say one model, or it cannot be loaded or explained so.
    """
    _check(options, weights, checkpoint, hf)
    names: tuple[str, ...] | None = None
    if hf is not None:
        model, prepare, names = load_hugging_face(hf, options.trust)
    else:
        model = _model(options, weights, checkpoint)
        prepare = _prepared(model, options)
    model = model.eval()
    classes = 0 if methods is None else _classes(model, prepare, methods)
    if options.class_names is not None:
        names = read_class_names(Path(options.class_names))
        if len(names) != classes:
            raise VitxError(f"{options.class_names} names {len(names)} classes, and the model has {classes}")
    return Subject(model, prepare, classes, names or known_class_names(classes))


def _prepared(model: nn.Module, options: Any) -> Preprocessing:
    """How the model wants its images, its volumes, or each frame of its clips."""
    if options.volume is not None:
        depth, *size = options.volume
        mean, std = (options.mean or [0.0])[:1], (options.std or [1.0])[:1]
        return VolumePreprocessing((size[0], size[1]), tuple(mean), tuple(std), depth=depth)
    given = {name: options[name] for name in ("mean", "std", "keep_aspect")}
    prepare = preprocessing_of(model, size=options.image_size, **given)
    if options.frames is None:
        return prepare
    time_axis = options.time_axis or CHANNELS_FIRST
    return ClipPreprocessing(**vars(prepare), frames=options.frames, time_axis=time_axis)


def _check(options: Any, weights: str | None, checkpoint: str | None, hf: str | None) -> None:
    """Raises a VitxError unless the options say one model."""
    check_least(options, image_size=1, frames=1)
    if options.volume is not None and (len(options.volume) != 3 or min(options.volume) < 1):
        raise VitxError(f"--volume takes three sizes, depth first, found {options.volume}")
    if options.volume is not None and (options.frames or options.image_size or options.keep_aspect):
        raise VitxError("--volume says the whole size: leave out --frames, --image-size and --keep-aspect")
    if options.time_axis not in (None, FRAMES_FIRST, CHANNELS_FIRST) or (
        options.time_axis and options.frames is None
    ):
        raise VitxError(f"--time-axis is 1 or 2, and goes with --frames: found {options.time_axis}")
    if sum(one is not None for one in (options.model, checkpoint, options.factory, hf)) != 1:
        raise VitxError(
            "say which model: either --model NAME, or --checkpoint CKPT with --module CLASS, or "
            "--factory FUNCTION, or --hf NAME"
        )
    if (options.module is None) != (checkpoint is None):
        raise VitxError(
            "--checkpoint CKPT and --module CLASS go together; for a model of timm, --weights FILE"
        )
    for name, owner, kinds in (
        ("model", options.model or options.factory, "--model or --factory"),
        ("module", checkpoint, "--checkpoint"),
    ):
        if options[f"{name}_options"] and not owner:
            raise VitxError(f"--{name}-options are for {kinds}: leave them out")
    if weights is not None and (checkpoint or hf):
        raise VitxError(f"--{'hf' if hf else 'checkpoint'} has weights of its own: leave out --weights")
    if hf is not None:
        check_sizes(options, "--hf")


def check_sizes(options: Any, kind: str) -> None:
    """Raises a VitxError if it is said how images are prepared, which a kind of model knows itself."""
    own = [name for name in ("image_size", "mean", "std", "keep_aspect", "frames", "volume") if options[name]]
    if own:
        option = own[0].replace("_", "-")
        raise VitxError(f"{kind} uses the image processor of the model: leave out --{option}")


def _model(options: Any, weights: str | None, checkpoint: str | None) -> nn.Module:
    if checkpoint is not None:
        return load_module(options.module, Path(checkpoint), _as_given(options.module_options), options.trust)
    file = None if weights is None else Path(weights)
    if options.factory is not None:
        return make_model(options.factory, _as_given(options.model_options), file, options.trust)
    own = _as_given(options.model_options)
    if options.image_size is not None:
        own.setdefault("img_size", options.image_size)
    if options.keep_aspect:
        own.setdefault("dynamic_img_size", True)
    if file is None:
        return create_model(options.model, True, None, own)
    return model_of_weights(options.model, file, own, options.trust)


def _as_given(value: Any) -> Any:
    """Undoes what jsonargparse makes of mappings with a class_path."""
    if isinstance(value, list):
        return [_as_given(one) for one in value]
    if isinstance(value, Namespace):
        value = vars(value)
    return {name: _as_given(one) for name, one in value.items()} if isinstance(value, dict) else value


def _classes(model: nn.Module, prepare: Preprocessing, methods: Methods) -> int:
    """Returns how many classes there are; and tells, before any image is read, what cannot be explained."""
    weight = next(model.parameters(), torch.empty(0))
    trial = torch.zeros(1, *prepare.shape, dtype=weight.dtype, device=weight.device)
    logits = next(iter(vitx.explain_methods(model, trial, methods).values())).logits
    if logits.ndim > 2:
        raise VitxError(
            f"the model must put out logits (B, classes), found {tuple(logits.shape)}: ask vitx explain by "
            "--region, --objects or --patch"
        )
    if getattr(model, "num_classes", None) == 0:
        needs = [name for name in methods if find_method(name).gradient]
        if needs:
            raise VitxError(
                f"the model has no head, and {needs[0]} explains a class: take --method rollout, or the "
                "whole model"
            )
        return 0
    return 2 if logits.ndim == 1 or logits.shape[1] == 1 else logits.shape[1]  # one logit tells two apart


def check_target(targets: Sequence[str], methods: Methods, against: str | None = None) -> None:
    """Raises a VitxError if a class is asked for, and no method explains one."""
    asked = next((f"--target {target}" for target in targets if target != PREDICTED), None)
    asked = asked or (None if against is None else "--against")
    if asked and not any(find_method(name).gradient for name in methods):
        raise VitxError(
            f"{asked} needs a method of a class, and {' and '.join(methods)} is not one: add --method "
            "evidence"
        )


def target_class(subject: Subject, target: str) -> int | None:
    """Returns the class that a target means; None for the predicted one.

    Raises:
        VitxError: There is no such class.
    """
    if target == PREDICTED:
        return None
    return find_class(target, subject.classes, subject.class_names)

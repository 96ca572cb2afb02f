"""Show one picture through several models, and where each looks more and less than the first.

vitx compare cat.jpg --model my_package:MyLightningModule --weights first.ckpt last.ckpt
vitx compare cat.jpg --model deit_tiny_patch16_224 --weights a.safetensors b.safetensors --method evidence
vitx compare cat.jpg --model my_model/ my_finetuned_model/
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitx.attribution import DEFAULT, title_of, with_options
from vitx.cli.asking import check_target
from vitx.cli.folder import write_and_say
from vitx.cli.model import Subject, add_picture, load_subject
from vitx.cli.options import add
from vitx.errors import VitxError
from vitx.files import png_path
from vitx.inputs.reading import find_picture
from vitx.pictures import render
from vitx.pictures.captions import Caption, captions_of
from vitx.runs.saved import names_apart


def add_options(command: Any) -> None:
    """Add the options of the command."""
    group = add_picture(command, "image", "an image file", "vitx-compare.png", several=True)
    add(group, "--method", "NAME", f"one row for each (default: {DEFAULT})", nargs="+")


def run(options: Any) -> int:
    """Run the command and return its exit status."""
    asked = with_options(options.method or DEFAULT)
    check_target([options.target], asked)
    models, weights = options.model, options.weights or [None]
    if len(models) > 1 < len(weights) and len(models) != len(weights):
        said = f"{len(models)} models and {len(weights)} files of weights"
        raise VitxError(f"{said}: give the same number of both, or only one of either")
    count = max(len(models), len(weights))
    if count < 2:
        raise VitxError("name at least two to compare: --weights A B, or --model A B")
    path = png_path(options.output)
    picture = find_picture(options.image)
    pairs = [(models[at % len(models)], weights[at % len(weights)]) for at in range(count)]
    names = names_apart([Path(file).with_suffix("") if file else Path(model) for model, file in pairs])
    subjects = {}
    for name, (model, file) in zip(names, pairs, strict=True):
        subjects[name] = load_subject(Namespace(**vars(options) | {"model": model, "weights": file}), asked)
    return write_and_say(path, _drawn(subjects, picture, asked, options.target))


def _drawn(subjects: dict[str, Subject], picture: Path, asked: Any, target: str) -> render.Picture:
    """Draw the input, the maps of each model, and their differences from the first."""
    columns, maps = dict[str, Tensor](), dict[str, Sequence[Tensor]]()
    for name, subject in subjects.items():
        found = subject.explain(subject.batch([picture]), asked, subject.find_class(target)).values()
        if not columns:
            columns["input"] = torch.cat([one.pixels() for one in found])
        logits, names = next(iter(found)).logits, subject.short_names
        said = f": {captions_of(logits, class_names=names)[0]}" if subject.classes else ""
        columns[f"{name}{said}"] = torch.cat([one.overlays() for one in found])
        maps[name] = [one.maps for one in found]
    first, *others = maps
    for name in others:
        title = "change" if len(others) == 1 else f"change to {name}"
        columns[title] = render.differences(columns["input"], maps[first], maps[name])
    rows = [Caption(title_of(name)) for name in asked]
    return render.grid(columns, rows, tile_width=224, note="change: red more, blue less")

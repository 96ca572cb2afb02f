"""Show one picture through several models, and where each looks more and less than the first.

vitx compare cat.jpg --model my_package:MyLightningModule --weights first.ckpt last.ckpt
vitx compare cat.jpg --model deit_tiny_patch16_224 --weights a.safetensors b.safetensors --method evidence
vitx compare cat.jpg --model my_model/ my_finetuned_model/
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from numpy.typing import NDArray

import vitx
from vitx.attribution import DEFAULT, title_of, with_options
from vitx.cli.asking import check_target
from vitx.cli.model import Subject, load_subject, picture_parser
from vitx.cli.options import add
from vitx.cli.output import write_and_say
from vitx.errors import VitxError
from vitx.files import png_path
from vitx.inputs.reading import find_picture
from vitx.pictures import render
from vitx.pictures.captions import Caption, captions_of
from vitx.runs.finding import names_apart


def parser() -> ArgumentParser:
    """Return the options of the command."""
    made, group = picture_parser(__doc__, "image", "an image file", "vitx-compare.png", several=True)
    add(group, "--method", "NAME", f"one row for each (default: {DEFAULT})", nargs="+")
    return made


def run(options: Any) -> int:
    """Run the command and return its exit status."""
    asked = with_options(options.method or DEFAULT)
    check_target([options.target], asked)
    models, weights = options.model, options.weights or [None]
    if len(models) > 1 < len(weights) and len(models) != len(weights):
        said = f"{len(models)} models and {len(weights)} files of weights"
        raise VitxError(f"{said}: give as many of both, or one")
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


def _drawn(subjects: dict[str, Subject], picture: Path, asked: Any, target: str) -> NDArray[np.uint8]:
    """Draw the input, the maps of each model, and their differences from the first."""
    found: dict[str, Sequence[vitx.Explanation]] = {}
    for name, subject in subjects.items():
        images, index = subject.batch([picture]), subject.find_class(target)
        found[name] = [*subject.explain(images, asked, index).values()]
    first, *others = found
    pixels = torch.cat([explanation.pixels() for explanation in found[first]])
    columns = {"input": pixels}
    for name, each in found.items():
        names = subjects[name].short_names
        said = f": {captions_of(each[0].logits, class_names=names)[0]}" if subjects[name].classes else ""
        columns[f"{name}{said}"] = torch.cat([one.overlays() for one in each])
    before = [one.maps for one in found[first]]
    for name in others:
        title = "change" if len(others) == 1 else f"change to {name}"
        columns[title] = render.differences(pixels, before, [one.maps for one in found[name]])
    rows = [Caption(title_of(one.method)) for one in found[first]]
    return render.grid(columns, rows, tile_width=224, note="change: red more, blue less")

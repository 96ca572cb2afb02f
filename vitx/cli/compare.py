"""`vitx compare`: one picture through several checkpoints."""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

import vitx
from vitx.attribution import DEFAULT, title_of, with_options
from vitx.cli.formatting import add
from vitx.cli.subject import Subject, check_target, load_subject, picture_parser, target_class
from vitx.errors import VitxError
from vitx.files import png_path, write_png
from vitx.inputs.prepared import to_tensor
from vitx.inputs.reading import find_pictures
from vitx.pictures import render
from vitx.pictures.captions import Caption, captions_of
from vitx.pictures.differences import differences
from vitx.runs.finding import names_apart

DESCRIPTION = """\
Show one picture through several checkpoints side by side, and where each looks more and less than the first.

  vitx compare cat.jpg --module train_demo.Classifier --checkpoint first.ckpt --checkpoint last.ckpt
  vitx compare cat.jpg --model deit_tiny_patch16_224 --weights a.safetensors --weights b.safetensors
"""


def parser() -> ArgumentParser:
    """Returns what reads the options of the command."""
    made, group = picture_parser(DESCRIPTION, "vitx-compare.png", several=True)
    add(made, "image", "IMAGE", "an image file")
    add(group, "--method", "NAME", "one row for each", nargs="+", default=[DEFAULT])
    return made


def run(options: Any) -> int:
    """Runs the command and returns its exit status."""
    asked = with_options(options.method)
    check_target([options.target], asked)
    kinds = [[(kind, path) for path in options[kind] or []] for kind in ("weights", "checkpoint", "hf")]
    named = [one for kind in kinds for one in kind]
    if len(named) < 2:
        raise VitxError(
            "name at least two to compare: --checkpoint A --checkpoint B, or --weights A --weights B, or "
            "--hf A --hf B"
        )
    path = png_path(options.output)
    (picture,) = find_pictures([options.image])
    subjects = [load_subject(options, **{kind: path}, methods=asked) for kind, path in named]
    names = names_apart([Path(path).with_suffix("") for _, path in named])
    write_png(path, compare(dict(zip(names, subjects, strict=True)), picture, options))
    print(f"see {options.output}")
    return 0


def compare(subjects: dict[str, Subject], picture: Any, options: Any) -> Any:
    """Draws the input, each checkpoint's maps, and their differences, (height, width, 3) uint8."""
    found = {name: _explain(subject, picture, options) for name, subject in subjects.items()}
    first, *others = found

    def maps(name: str) -> list[Tensor]:
        return [explanation.maps for explanation in found[name]]

    pixels = torch.cat([explanation.pixels() for explanation in found[first]])
    columns = {"input": pixels}
    for name, each in found.items():
        columns[_title(name, subjects[name], each[0])] = torch.cat([one.overlays() for one in each])
    for name in others:
        title = "change" if len(others) == 1 else f"change to {name}"
        columns[title] = differences(pixels, maps(first), maps(name))
    rows = [Caption(title_of(e.method)) for e in found[first]]
    return render.grid(columns, rows, tile_width=224, note="change: red more, blue less")


def _explain(subject: Subject, picture: Any, options: Any) -> list[vitx.Explanation]:
    images = to_tensor([picture], subject.prepare)
    index = target_class(subject, options.target)
    return list(subject.explain(images, with_options(options.method), index).values())


def _title(name: str, subject: Subject, found: vitx.Explanation) -> str:
    if not subject.classes:
        return name
    said = captions_of(found.logits, class_names=subject.short_names)[0]
    return f"{name}: {said}"

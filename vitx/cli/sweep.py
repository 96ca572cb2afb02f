"""`vitx sweep`: one picture under every head fusion and several discard ratios."""

from typing import Any

import torch
from jsonargparse import ArgumentParser
from tqdm import tqdm

import vitx
from vitx.attribution import Methods, title_of
from vitx.cli.formatting import add
from vitx.cli.subject import Subject, load_subject, picture_parser, target_class
from vitx.files import png_path, write_png
from vitx.functional.fusing import HEAD_FUSIONS, check_options
from vitx.inputs.prepared import to_tensor
from vitx.inputs.reading import find_pictures
from vitx.pictures import render
from vitx.pictures.captions import Caption

METHODS: Methods = {"rollout": {}, "grad_rollout": {}}
DESCRIPTION = """\
Show one picture under every head fusion and several discard ratios, attention rollout beside gradient
rollout: which options suit this model?

  vitx sweep cat.jpg --model deit_tiny_patch16_224
  vitx sweep cat.jpg --model deit_tiny_patch16_224 --discard-ratio 0 0.5 0.95 --target tabby
"""


def parser() -> ArgumentParser:
    """Returns what reads the options of the command."""
    made, group = picture_parser(DESCRIPTION, "vitx-sweep.png")
    add(made, "image", "IMAGE", "an image file")
    add(group, "--discard-ratio", "SHARE", "one column each", float, nargs="+", default=[0.0, 0.5, 0.9])
    return made


def run(options: Any) -> int:
    """Runs the command and returns its exit status."""
    for ratio in options.discard_ratio:
        check_options("mean", ratio)
    path = png_path(options.output)
    (picture,) = find_pictures([options.image])
    subject = load_subject(options, options.weights, options.checkpoint, options.hf, methods=METHODS)
    write_png(path, sweep(subject, picture, options.target, options.discard_ratio))
    print(f"see {options.output}")
    return 0


def sweep(subject: Subject, picture: Any, target: str, ratios: list[float]) -> Any:
    """Draws the grid of each method, side by side, (height, width, 3) uint8."""
    images = to_tensor([picture], subject.prepare)
    index = target_class(subject, target)
    grids = {}
    with tqdm(total=2 * len(HEAD_FUSIONS) * len(ratios), unit="map", disable=None) as progress:
        for method in METHODS:
            columns: dict[str, list[Any]] = {"input": [], **{f"discard {ratio:g}": [] for ratio in ratios}}
            for fusion in HEAD_FUSIONS:
                for ratio in ratios:
                    asked = {"head_fusion": fusion, "discard_ratio": ratio}
                    found = subject.explain(images, {method: asked}, index)[method]
                    columns[f"discard {ratio:g}"].append(found.overlays()[0])
                    progress.update()
                columns["input"].append(found.pixels()[0])
            rows = [Caption(f"{fusion} over the heads") for fusion in HEAD_FUSIONS]
            stacked = {title: torch.stack(pictures) for title, pictures in columns.items()}
            grids[_heading(subject, method, found)] = render.grid(stacked, rows)
    return render.beside(grids)


def _heading(subject: Subject, method: str, found: vitx.Explanation) -> str:
    title = title_of(method)
    if found.target is None:
        return title
    target = int(found.target[0])
    return f"{title}: {subject.name(target)} {found.logits[0].softmax(-1)[target]:.0%}"

"""Show one picture under every head fusion and several discard ratios: which suit this model?

Attention rollout and gradient rollout are shown side by side.

  vitx sweep cat.jpg --model deit_tiny_patch16_224
  vitx sweep cat.jpg --model deit_tiny_patch16_224 --discard-ratio 0 0.5 0.95 --target tabby
"""

from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import vitx
from vitx.attribution import title_of
from vitx.cli.folder import write_and_say
from vitx.cli.model import Subject, add_picture, load_subject
from vitx.cli.options import add
from vitx.files import png_path
from vitx.functional.fusing import HEAD_FUSIONS, check_options
from vitx.inputs.reading import find_picture
from vitx.pictures import render
from vitx.pictures.captions import Caption, shares_of

_RATIOS = (0.0, 0.5, 0.9)
_METHODS = ("rollout", "grad_rollout")


def add_options(command: Any) -> None:
    """Add the options of the command."""
    group = add_picture(command, "image", "an image file", "vitx-sweep.png")
    ratios = f"one column each (default: {' '.join(map(str, _RATIOS))})"
    add(group, "--discard-ratio", "SHARE", ratios, float, nargs="+")


def run(options: Any) -> int:
    """Run the command and return its exit status."""
    ratios = options.discard_ratio or [*_RATIOS]
    for ratio in ratios:
        check_options("mean", ratio)
    path = png_path(options.output)
    picture = find_picture(options.image)
    subject = load_subject(options, {name: {} for name in _METHODS})
    return write_and_say(path, _drawn(subject, picture, options.target, ratios))


def _drawn(subject: Subject, picture: Path, target: str, ratios: list[float]) -> render.Picture:
    """Draw a grid of both methods side by side: a row for each head fusion, a column for each ratio."""
    images, index = subject.batch([picture]), subject.find_class(target)
    found: dict[tuple[str, float], dict[str, vitx.Explanation]] = {}
    for fusion, ratio in tqdm([*product(HEAD_FUSIONS, ratios)], unit="map", disable=None):
        options = {"head_fusion": fusion, "discard_ratio": ratio}
        found[fusion, ratio] = subject.explain(images, dict.fromkeys(_METHODS, options), index)
    rows = [Caption(f"{fusion} over the heads") for fusion in HEAD_FUSIONS]
    grids = {}
    for name in _METHODS:
        one, title = found[HEAD_FUSIONS[0], ratios[0]][name], title_of(name)
        if one.target is not None:
            cls = int(one.target[0])
            title += f": {subject.name(cls)} {shares_of(one.logits[0].flatten())[cls]:.0%}"
        columns = {"input": one.pixels().expand(len(rows), -1, -1, -1)}
        for ratio in ratios:
            drawn = [found[fusion, ratio][name].overlays() for fusion in HEAD_FUSIONS]
            columns[f"discard {ratio:g}"] = torch.cat(drawn)
        grids[title] = render.grid(columns, rows)
    return render.beside(grids)

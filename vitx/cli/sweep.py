"""`vitx sweep`: one picture under every head fusion and several discard ratios."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

import vitx
from vitx.attribution import title_of
from vitx.cli.model import Subject, load_subject, picture_parser
from vitx.cli.options import add
from vitx.files import png_path, write_png
from vitx.functional.fusing import HEAD_FUSIONS, check_options
from vitx.inputs.prepared import to_tensor
from vitx.inputs.reading import find_pictures
from vitx.pictures import render
from vitx.pictures.captions import Caption

_RATIOS = (0.0, 0.5, 0.9)
_METHODS = ("rollout", "grad_rollout")
DESCRIPTION = """\
Show one picture under every head fusion and several discard ratios, attention rollout beside gradient
rollout: which options suit this model?

  vitx sweep cat.jpg --model deit_tiny_patch16_224
  vitx sweep cat.jpg --model deit_tiny_patch16_224 --discard-ratio 0 0.5 0.95 --target tabby
"""


def parser() -> ArgumentParser:
    """Return the options of the command."""
    made, group = picture_parser(DESCRIPTION, "an image file", "vitx-sweep.png")
    ratios = f"one column each (default: {' '.join(map(str, _RATIOS))})"
    add(group, "--discard-ratio", "SHARE", ratios, float, nargs="+")
    return made


def run(options: Any) -> int:
    """Run the command and return its exit status."""
    ratios = options.discard_ratio or [*_RATIOS]
    for ratio in ratios:
        check_options("mean", ratio)
    path = png_path(options.output)
    (picture,) = find_pictures([options.image])
    subject = load_subject(options, {name: {} for name in _METHODS})
    write_png(path, _drawn(subject, picture, options.target, ratios))
    print(f"see {options.output}")
    return 0


def _drawn(subject: Subject, picture: Path, target: str, ratios: list[float]) -> NDArray[np.uint8]:
    """Draw a grid of both methods side by side: a row for each head fusion, a column for each ratio."""
    images = to_tensor([picture], subject.prepare)
    index = subject.find_class(target)
    pixels: list[Tensor] = []
    maps: dict[tuple[str, float], list[Tensor]] = {(name, ratio): [] for name in _METHODS for ratio in ratios}
    heads: dict[str, str] = {}
    for fusion in tqdm(HEAD_FUSIONS, unit="row", disable=None):
        for ratio in ratios:
            options = {"head_fusion": fusion, "discard_ratio": ratio}
            found = subject.explain(images, dict.fromkeys(_METHODS, options), index)
            for name, one in found.items():
                maps[name, ratio].append(one.overlays()[0])
                heads[name] = _heading(subject, one)
        pixels.append(found["rollout"].pixels()[0])
    rows = [Caption(f"{fusion} over the heads") for fusion in HEAD_FUSIONS]
    grids = {}
    for name in _METHODS:
        columns = {f"discard {ratio:g}": torch.stack(maps[name, ratio]) for ratio in ratios}
        grids[heads[name]] = render.grid({"input": torch.stack(pixels)} | columns, rows)
    return render.beside(grids)


def _heading(subject: Subject, found: vitx.Explanation) -> str:
    title = title_of(found.method)
    if found.target is None:
        return title
    target = int(found.target[0])
    return f"{title}: {subject.name(target)} {found.logits[0].softmax(-1)[target]:.0%}"

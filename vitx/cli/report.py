"""Put a training on one HTML page, or compare several.

The page has settings, curves, and each image with a slider over the steps, wrong but confident ones first. Of
several, it has the settings that differ, the last numbers, the curves, and the same images under each
training, all moved by one slider. It needs no network and no other file.

  vitx report logs/demo/version_0 --output report.html
  vitx report logs/                                              compare all runs below it
  vitx report logs/demo logs/shortcut --steps 100                more steps on the slider
  vitx report logs/ --only 'vit_*'                               some of them
  vitx report logs/demo --model my_package:MyLightningModule     ... with a page to click for each image

A run is a training with vitx's callback or watch, whatever its logger. Its folder `vitx` holds all of it.
With --model, the newest checkpoint (.ckpt) in the folder of each run, or --weights, is asked which patch
looks where in its images; these pages lie in a folder beside the report, which links them. A run alone needs
no --model, if it trained one of timm as it is by its name, and its newest checkpoint is that of its end.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from vitx.attribution import telling
from vitx.cli.comparison import draw_comparison
from vitx.cli.curves import charts, number
from vitx.cli.model import add_model_details, add_model_options, load_subject
from vitx.cli.options import add, check_least, new_parser
from vitx.cli.page import fill, photo, png, show
from vitx.cli.runs import add_runs, one_thread, opened_runs
from vitx.errors import VitxError
from vitx.files import write_or_say
from vitx.runs.comparing import flat
from vitx.runs.film import evenly
from vitx.runs.run import Run, rank

_ALIKE = 0.05  # of probabilities: pixels were rounded


def parser() -> ArgumentParser:
    """Return the options of the command."""
    options = new_parser(__doc__)
    add_runs(options)
    add(options, "--output", "FILE", "where to write the page", default="report.html")
    add(options, "--steps", "N", "most steps on each slider, evenly spaced", int, default=20)
    add_model_options(options, required=False)
    add_model_details(options)
    return options


@one_thread()
def run(options: Any) -> int:
    """Write the page and say where."""
    check_least(options, steps=1)
    output = Path(options.output)
    if output.is_dir():
        raise VitxError(f"--output is the folder {output}: give the name of a file in it")
    runs, left_out = opened_runs(options)
    links = _pages(options, runs, output) if options.model else {}
    if options.model and not links:
        raise VitxError("no run holds a checkpoint (.ckpt): leave out --model, or give --weights FILE")
    if len(runs) == 1:
        ((name, only),) = runs.items()
        if not options.model and (told := _told(only)):
            try:
                links = _pages(Namespace(**vars(options) | told), runs, output, sure=False)
            except VitxError as error:
                print(f"no page to click beside the images: {error}", file=sys.stderr)
        page = _draw_run(name, only, options.steps, links)
    else:
        page = draw_comparison(runs, left_out, options.steps, links)
    written = page.encode()
    write_or_say(output, lambda file: file.write(written))
    print(f"{output}  {len(written) / 1e6:.1f} MB")
    return int(bool(left_out))


def _told(run: Run) -> dict[str, Any]:
    """Return the options of a model as a run tells them, if it is one of timm; else none."""
    from timm import is_model

    model, scale = run.facts.get("model"), run.facts.get("normalization")
    height, width = run.saved.pixels.shape[1:3]
    if not (scale and is_model(str(model)) and height == width and run.facts.get("kind") == "class"):
        return {}
    inputs = {"size": height, "mean": scale[0], "std": scale[1]}
    return {"model": model, "input_options": [json.dumps(inputs)]} if any(_checkpoints(run)) else {}


def _checkpoints(run: Run) -> list[Path]:
    return sorted(run.folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)


def _pages(
    options: Any, runs: Mapping[str, Run], output: Path, sure: bool = True
) -> dict[tuple[int, int], str]:
    """Write a page to click for each image of each run that holds a checkpoint.

    A model that is not sure to be that of the run must say of the images what the run said at its end.

    Returns:
        The run's number and the image -> the page, from the report.
    """
    links = {}
    for place, (name, one) in enumerate(runs.items()):
        weights = options.weights or next(map(str, reversed(_checkpoints(one))), None)
        if weights is None and not Path(options.model).is_dir():
            print(f"{name} holds no checkpoint (.ckpt): give --weights FILE", file=sys.stderr)
            continue
        method = telling(one.saved.maps)
        subject = load_subject(Namespace(**vars(options) | {"weights": weights}), {method: {}})
        size = one.saved.pixels.shape[1:3]
        prepare = replace(subject.prepare, size=size, crop_pct=1.0, crop_mode="squash")  # it was prepared
        subject = replace(subject, prepare=prepare)
        images = subject.batch([*map(one.input, range(one.count))])
        found = subject.explain(images, {method: {}})[method]
        logits = torch.from_numpy(one.saved.logits[-1])
        if not sure and (
            found.logits.shape != logits.shape
            or (found.logits.softmax(1) - logits.softmax(1)).abs().max() > _ALIKE
        ):
            raise VitxError(f"{weights} says other things about them than the run at its end: give --model")
        for image, explanation in enumerate(found):
            link = f"{output.stem}-pages/run-{place}-image-{image}.html"
            names = one.facts.get("class_names") or subject.short_names
            explanation.view(names).save(output.parent / link)
            links[place, image] = link
    return links


def _draw_run(name: str, run: Run, steps: int, links: Mapping[tuple[int, int], str]) -> str:
    """Draw the page of one run as HTML, with at most some steps on each slider."""
    firings = evenly(len(run.steps), steps)
    shown, overview, loggers = show(run, firings, [*run.maps]), run.overview(), run.facts.get("loggers") or ()
    moments = [run.heading(firing) for firing in firings]
    return fill(
        "run",
        name=name,
        run=run,
        logged=[", ".join(filter(None, map(one.get, ("name", "version")))) for one in loggers],
        addresses=[one["address"] for one in loggers if "://" in str(one.get("address"))],
        last={tag: number([*values.values()][-1]) for tag, values in run.numbers.items()},
        overview=None if overview is None else png(overview),
        charts=charts(run.numbers),
        grids={run.heading(at): png(run.grid(at, range(run.count))) for at in evenly(len(run.steps), 2)},
        colormaps=[run.colormap],
        frames=len(firings),
        moments=moments,
        headings=[moments],
        figures=[
            {
                "image": image,
                "reason": reason,
                "input": photo(run.input(image)),
                "shown": shown[image],
                "link": links.get((0, image)),
            }
            for image, reason in rank(run).items()
        ],
        settings=dict(flat(run.facts.get("settings"))),
    )

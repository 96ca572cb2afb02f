"""Put a training on one HTML page, or compare several.

The page has settings, curves, and each image with a slider over the steps, wrong but confident ones first.
For several trainings, it has the settings that differ, the last numbers, the curves, and the same images
under each training, all moved by one slider. It needs no network and no other file.

  vitx report logs/demo/version_0 --output report.html
  vitx report logs/                                              compare all runs below it
  vitx report logs/demo logs/shortcut --steps 100                more steps on the slider
  vitx report logs/vit_*                                         some of them
  vitx report logs/demo --model my_package:MyLightningModule     ... with a page to click for each image

A run is a training with vitx's callback or watch, whatever its logger. Its folder `vitx` holds all its data.
With --model, pages show which patch looks where in its images, by the newest checkpoint (.ckpt) in the folder
of each run, or by --weights; they are in a folder next to the report, which links to them. A run alone needs
no --model if it trained an unchanged timm model and its newest checkpoint is from its end.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitx.attribution import Methods, telling
from vitx.cli.model import add_model_details, add_model_options, load_subject
from vitx.cli.options import add, check_least
from vitx.cli.report_page import charts, charts_of_runs, columns, embed, fill, show
from vitx.cli.runs import add_runs, opened_runs
from vitx.errors import VitxError
from vitx.inputs.clips import evenly
from vitx.pictures.captions import Caption, shares_of
from vitx.runs.comparing import compare_settings, flat, meetings
from vitx.runs.run import Run, rank
from vitx.viewer.page import Page

_ALIKE = 0.05  # of probabilities, as saved pixels are rounded
_MOST_BYTES = 19_500_000  # of a page; with many runs, moments are left out to stay below it
_MOST_OVERVIEWS = 24  # runs


def add_options(command: Any) -> None:
    """Add the options of the command."""
    add_runs(command)
    add(command, "--output", "FILE", "where to write the page", default="report.html")
    add(command, "--steps", "N", "most steps on each slider, evenly spaced", int, default=20)
    add_model_options(command, required=False)
    add_model_details(command)


def run(options: Any) -> int:
    """Write the page, print its path, and return the exit status."""
    check_least(options, steps=2)
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
                print(f"no page to click for the images: {error}", file=sys.stderr)
        page = _draw_run(name, only, options.steps, links)
    else:
        page = _draw_comparison(runs, left_out, options.steps, links)
    Page(page).save(output)
    print(f"{output}  {output.stat().st_size / 1e6:.1f} MB")
    return int(bool(left_out))


def _told(run: Run) -> dict[str, Any]:
    """Return the model options that a run with checkpoints of a timm classifier has recorded, or {}."""
    from timm import is_model

    model, scale = run.facts.get("model"), run.facts.get("normalization")
    height, width = run.pixels.shape[1:3]
    if not (scale and is_model(str(model)) and height == width and run.facts.get("kind") == "class"):
        return {}
    inputs = {"size": height, "mean": scale[0], "std": scale[1]}
    return {"model": model, "input_options": [json.dumps(inputs)]} if any(_checkpoints(run)) else {}


def _checkpoints(run: Run) -> list[Path]:
    return sorted(run.folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)


def _pages(
    options: Any, runs: Mapping[str, Run], output: Path, sure: bool = True
) -> dict[tuple[int, int], str]:
    """Write an interactive page for each image of each run that holds a checkpoint.

    Return (number of the run, image) -> path of the page relative to the report. Unless `sure`, raise a
    VitxError if the model does not reproduce the last probabilities of the run.
    """
    links = {}
    for place, (name, one) in enumerate(runs.items()):
        weights = options.weights or next(map(str, reversed(_checkpoints(one))), None)
        if weights is None and not Path(options.model).is_dir():
            print(f"{name} holds no checkpoint (.ckpt): give --weights FILE", file=sys.stderr)
            continue
        methods: Methods = {telling(one.maps): {}}
        subject = load_subject(Namespace(**vars(options) | {"weights": weights}), methods)
        size = one.pixels.shape[1:3]
        prepare = replace(subject.prepare, size=size, crop_pct=1.0, crop_mode="squash")  # already prepared
        subject = replace(subject, prepare=prepare)
        (found,) = subject.explain(subject.batch([*one.pixels]), methods).values()
        shares, before = shares_of(found.logits), shares_of(torch.from_numpy(one.logits[-1]))
        if not (sure or (shares.shape == before.shape and (shares - before).abs().max() <= _ALIKE)):
            raise VitxError(f"{weights} does not predict what the run predicted at its end: give --model")
        for image, explanation in enumerate(found):
            link = f"{output.stem}-pages/run-{place}-image-{image}.html"
            names = one.facts.get("class_names") or subject.short_names
            explanation.view(names).save(output.parent / link)
            links[place, image] = link
    return links


def _draw_run(name: str, run: Run, steps: int, links: Mapping[tuple[int, int], str]) -> str:
    """Return the page of one run as HTML, with at most this many steps on each slider."""
    firings = evenly(len(run.steps), steps)
    overview, loggers = run.overview(), run.facts.get("loggers") or ()
    moments = [*map(run.heading, firings)]
    return fill(
        "run",
        name=name,
        run=run,
        logged=[", ".join(filter(None, map(one.get, ("name", "version")))) for one in loggers],
        addresses=[one["address"] for one in loggers if "://" in str(one.get("address"))],
        overview=None if overview is None else embed(overview),
        charts=charts(run.numbers),
        grids={run.heading(at): embed(run.grid(at, range(run.count))) for at in evenly(len(run.steps), 2)},
        colormaps=[run.facts["colormap"]],
        moments=moments,
        headings=[moments],
        reasons=rank(run),
        inputs=[embed(run.pixels[image], photo=True) for image in range(run.count)],
        all_shown=show(run, firings, [*run.titled]),
        links={image: link for (_, image), link in links.items()},
        settings=dict(flat(run.facts.get("settings"))),
    )


def _draw_comparison(
    runs: Mapping[str, Run], left_out: Mapping[str, str], steps: int, links: Mapping[tuple[int, int], str]
) -> str:
    """Return the page that compares runs as HTML, with `steps` moments, or fewer if it would be too large."""
    every = [*runs.values()]
    differing, shared = compare_settings(every)
    met, table = meetings(every), columns(every, differing)
    for meeting in met:
        meeting.images.sort(key=lambda images: -len({one.prediction for one in _last(every, images)}))
    overviews = [run.overview() for run in every] if len(every) <= _MOST_OVERVIEWS else []
    fixed: dict[str, Any] = {
        "groups": [(meeting, [_figure(every, images) for images in meeting.images]) for meeting in met],
        "runs": [
            {"place": place, "name": name, "run": run} for place, (name, run) in enumerate(runs.items())
        ],
        "columns_of_table": table,
        "groups_of_table": [(group, len([*of])) for group, of in groupby(table, lambda one: one.group)],
        "shared": {setting.key: next(iter(setting.values.values())) for setting in shared},
        "charts": charts_of_runs([run.numbers for run in every], [*runs]),
        "overviews": {at: embed(one, photo=True) for at, one in enumerate(overviews) if one is not None},
        "links": links,
        "left_out": left_out,
        "colormaps": sorted({run.facts["colormap"] for run in every}),
        "wanted": min(steps, max(len(run.steps) for run in every)),
    }
    moments = fixed["wanted"]
    while True:
        shares = np.linspace(0, 1, moments).tolist() if moments > 1 else [1.0]
        firings = [[run.nearest(share) for share in shares] for run in every]
        page = fill(
            "comparison",
            all_shown=[show(run, at, sorted(run.titled)) for run, at in zip(every, firings, strict=True)],
            moments=[{0.0: "the start", 1.0: "the end"}.get(x, f"{x:.0%} of the training") for x in shares],
            headings=[[*map(run.heading, at)] for run, at in zip(every, firings, strict=True)],
            **fixed,
        )
        size = len(page.encode())
        if size <= _MOST_BYTES or moments <= 2:
            return page
        moments = max(2, min(moments - 1, moments * _MOST_BYTES // size))


def _figure(runs: Sequence[Run], images: Mapping[int, int]) -> dict[str, Any]:
    first, image = next(iter(images.items()))
    captions = _last(runs, images)
    known = [caption.right for caption in captions if caption.right is not None]
    return {
        "image": image,
        "places": images,
        "label": next((caption.label for caption in captions if caption.label is not None), ""),
        "verdict": f"right at the end: {sum(known)} of {len(known)} runs" if known else "",
        "input": embed(runs[first].pixels[image], photo=True),
    }


def _last(runs: Sequence[Run], images: Mapping[int, int]) -> list[Caption]:
    return [runs[number].captions(-1)[image] for number, image in images.items()]

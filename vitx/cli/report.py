"""The command `vitx report`: a training on one page, or several compared."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from PIL import Image

from vitx.attribution import telling
from vitx.cli.comparison import draw_comparison
from vitx.cli.curves import charts, number
from vitx.cli.delivery import one_thread
from vitx.cli.model import add_model_details, add_model_options, load_subject
from vitx.cli.options import add, check_least, new_parser
from vitx.cli.page import fill, photo, png, show
from vitx.cli.runs import add_runs, opened_runs
from vitx.errors import VitxError
from vitx.files import write_or_say
from vitx.inputs.prepared import to_tensor
from vitx.runs.film import evenly
from vitx.runs.hyperparameters import flat
from vitx.runs.ranking import rank
from vitx.runs.run import Run

DESCRIPTION = """\
Put a training on one HTML page: settings, curves, and each image with a slider over the steps, wrong but
confident ones first. Or compare several: the settings that differ, the last numbers, the curves, and the same
images under each training, all moved by one slider. The page needs no network and no other file.

  vitx report logs/demo/version_0 --output report.html
  vitx report logs/                                              compare all runs below it
  vitx report logs/demo logs/shortcut --steps 100                more steps on the slider
  vitx report logs/ --only 'vit_*'                               some of them
  vitx report logs/demo --model my_package:MyLightningModule     ... with a page to click for each image

A run is a training with vitx's callback or watch, whatever its logger. Its folder `vitx` holds all of it.
With --model, the newest checkpoint (.ckpt) in the folder of each run, or --weights, is asked which patch
looks where in its images; these pages lie in a folder beside the report, which links them.
"""


def parser() -> ArgumentParser:
    """Return the options of the command."""
    options = new_parser(DESCRIPTION)
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
    if len(runs) == 1:
        ((name, only),) = runs.items()
        page = _draw_run(name, only, options.steps, {image: link for (_, image), link in links.items()})
    else:
        page = draw_comparison(runs, left_out, options.steps, links)
    written = page.encode()
    write_or_say(output, lambda file: file.write(written))
    print(f"{output}  {len(written) / 1e6:.1f} MB")
    return int(bool(left_out))


def _pages(options: Any, runs: Mapping[str, Run], output: Path) -> dict[tuple[int, int], str]:
    """Write a page to click for each image of each run that holds a checkpoint.

    Returns:
        The run's number and the image -> the page, from the report.

    Raises:
        VitxError: No run holds a checkpoint, or the model cannot be loaded or explained.
    """
    links = {}
    for place, (name, one) in enumerate(runs.items()):
        kept = sorted(one.folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
        weights = options.weights or (str(kept[-1]) if kept else None)
        if weights is None and not Path(options.model).is_dir():
            print(f"{name} holds no checkpoint (.ckpt): give --weights FILE", file=sys.stderr)
            continue
        method = telling(one.saved.maps)
        subject = load_subject(options, {method: {}}, weights=weights)
        size = one.saved.pixels.shape[1:3]
        prepare = replace(subject.prepare, size=size, crop_pct=1.0, crop_mode="squash")  # it was prepared
        for image in range(one.count):
            tensor = to_tensor([Image.fromarray(one.input(image))], prepare)
            tensor = tensor.to(next(subject.model.parameters(), tensor))
            found = replace(subject, prepare=prepare).explain(tensor, {method: {}})[method]
            link = f"{output.stem}-pages/run-{place}-image-{image}.html"
            found.view(one.facts.get("class_names") or subject.short_names).save(output.parent / link)
            links[place, image] = link
    if not links:
        raise VitxError("no run holds a checkpoint (.ckpt): leave out --model, or give --weights FILE")
    return links


def _draw_run(name: str, run: Run, steps: int, links: Mapping[int, str]) -> str:
    """Draw the page of one run as HTML, with at most some steps on each slider."""
    firings = evenly(len(run.steps), steps)
    shown = show(run, firings)
    overview = run.overview()
    moments = [run.heading(firing) for firing in firings]
    return fill(
        "run",
        name=name,
        facts={fact: value for fact, value in _facts(run) if value},
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
                "link": links.get(image),
            }
            for image, reason in rank(run).items()
        ],
        settings=dict(flat(run.facts.get("settings"))),
    )


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """Yield the head of the page."""
    yield "folder", str(run.path)
    yield "model", run.facts.get("model") or ""
    yield "watched", f"{run.count} images at {len(run.steps)} steps, from {run.steps[0]} to {run.steps[-1]}"
    yield "left out", run.earlier
    yield "methods", ", ".join(run.maps)
    yield "note", run.note
    loggers = run.facts.get("loggers") or ()
    said = [filter(None, map(one.get, ("name", "version"))) for one in loggers]
    yield "logged by", "; ".join(", ".join(map(str, one)) for one in said)
    yield "logged to", "; ".join(one["address"] for one in loggers if "://" in str(one.get("address")))
    for tag, values in run.numbers.items():
        if tag.startswith(("val", "eval")):
            yield tag, f"{number([*values.values()][-1])} at the end"

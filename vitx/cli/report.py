"""The command `vitx report`: a training on one page."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jsonargparse import ArgumentParser, Namespace

from vitx.captions import Caption
from vitx.cli.curves import charts, number
from vitx.cli.embedding import layers, png
from vitx.cli.formatting import HelpFormatter
from vitx.cli.threads import one_thread
from vitx.errors import VitxError
from vitx.files import write_or_say
from vitx.render import OVERLAY_STRENGTH
from vitx.runs.film import evenly
from vitx.runs.playback import FromMaps
from vitx.runs.ranking import Ranked, rank
from vitx.runs.run import Run, names_apart, open_run

DESCRIPTION = """\
Write one HTML page about a training: its settings and curves, the first and the last pictures, and each image
with a slider over the steps, wrong but confident ones first. The page needs no network and no other file.

  vitx report logs/demo/version_0 --output report.html
  vitx report logs/demo/version_0 --steps 100                    more steps on each slider

A run is the log folder of a training with vitx's callback. With `save_maps: true` all is drawn anew from
the maps; without it, the grids in TensorBoard's event files are taken apart, and the images keep their order.
"""


def parser() -> ArgumentParser:
    """Returns the options of the command."""
    options = ArgumentParser(description=DESCRIPTION, formatter_class=HelpFormatter)
    add = options.add_argument
    add("run", type=str, metavar="RUN", help="log folder of a run, or a folder that holds only that")
    add("--output", type=str, metavar="FILE", default="report.html", help="where to write the page")
    add("--steps", type=int, metavar="N", default=20, help="most steps on each slider, evenly spaced")
    return options


@one_thread()
def run(options: Namespace) -> int:
    """Writes the page and says where."""
    if options.steps < 1:
        raise VitxError(f"--steps must be at least 1, found {options.steps}")
    output = Path(options.output)
    if output.is_dir():
        raise VitxError(f"--output is the folder {output}: give the name of a file in it")
    page = draw_page(open_run(Path(options.run)), options.steps).encode()
    write_or_say(output, lambda file: file.write(page))
    print(f"{output}  {len(page) / 1e6:.1f} MB")
    return 0


def draw_page(run: Run, steps: int) -> str:
    """Fills the template.

    Args:
        run: what it is about.
        steps: most of them on each slider.

    Returns:
        HTML.
    """
    templates = Environment(
        loader=PackageLoader("vitx.cli", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    playback = run.playback
    ends = evenly(len(playback.steps), 2)
    return templates.get_template("report.html.jinja").render(
        name=names_apart([run.folder])[0],
        facts=_facts(run),
        charts=charts(run.scalars),
        grids=[
            {"heading": run.heading(firing), "picture": png(playback.grid(firing, range(playback.count)))}
            for firing in ends
        ],
        from_maps=isinstance(playback, FromMaps),
        figures=[_figure(run, ranked, steps) for ranked in _order(run)],
        config=run.config,
        strength=OVERLAY_STRENGTH,
    )


def _order(run: Run) -> list[Ranked]:
    playback = run.playback
    if isinstance(playback, FromMaps):
        return rank(playback.saved, playback.captions(-1))
    return [Ranked(image, "") for image in range(playback.count)]


def _facts(run: Run) -> dict[str, str]:
    """What stands at the top."""
    steps = run.playback.steps
    titles = list(run.playback.tiles(0, 0))[1:]
    model = re.search(r"^\s*model_name: *([^\s#]+)", "\n".join(run.config.values()), re.MULTILINE)
    facts = {
        "folder": str(run.folder),
        "model": model[1] if model else "",
        "watched": f"{run.playback.count} images at {len(steps)} steps, from {steps[0]} to {steps[-1]}",
        "methods": ", ".join(titles),
    }
    for tag, curve in run.scalars.items():
        if tag.startswith("val"):
            facts[tag] = f"{number(curve.values[-1])} at the end"
    return {name: value for name, value in facts.items() if value}


def _figure(run: Run, ranked: Ranked, most: int) -> dict[str, Any]:
    """One image at some steps."""
    firings = evenly(len(run.playback.steps), most)
    drawn = layers(run.playback, ranked.image, firings)
    looks = [
        {"heading": run.heading(firing), "pictures": pictures}
        | _said(run.playback.caption(firing, ranked.image))
        for firing, pictures in zip(firings, drawn.pictures, strict=True)
    ]
    return {
        "image": ranked.image,
        "reason": ranked.reason,
        "input": drawn.input,
        "layered": drawn.layered,
        "shape": drawn.shape,
        "titles": drawn.titles,
        "looks": looks,
    }


def _said(caption: Any) -> dict[str, Any]:
    """The caption as text, or as the picture that was logged."""
    if isinstance(caption, Caption):
        return {"caption": str(caption), "right": caption.right, "strip": None}
    return {"caption": "", "right": None, "strip": png(caption)}

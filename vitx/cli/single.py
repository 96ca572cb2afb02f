"""The page about one training."""

from collections.abc import Iterator
from typing import Any

from vitx.cli.curves import charts, number
from vitx.cli.embedding import Shown, columns_of, photo, png, show
from vitx.cli.page import fill
from vitx.cli.places import earlier
from vitx.runs.film import evenly
from vitx.runs.hyperparameters import flat
from vitx.runs.ranking import Ranked, rank
from vitx.runs.run import Run


def draw_run(name: str, run: Run, steps: int) -> str:
    """Draws the page.

    Args:
        name: of the run.
        run: is shown.
        steps: most of them on each slider.

    Returns:
        HTML.
    """
    firings = evenly(len(run.steps), steps)
    shown = show(run, firings)
    return fill(
        "run",
        name=name,
        facts={fact: value for fact, value in _facts(run) if value},
        charts=charts(run.numbers),
        grids=[
            {"heading": run.heading(firing), "picture": png(run.grid(firing, range(run.count)))}
            for firing in evenly(len(run.steps), 2)
        ],
        colormaps=[run.colormap],
        columns=columns_of(len(firings)),
        frames=len(firings),
        moments=[run.heading(firing) for firing in firings],
        headings=[[run.heading(firing) for firing in firings]],
        figures=[_figure(run, one, shown[one.image]) for one in rank(run.saved, run.captions(-1))],
        settings=dict(flat(run.facts.get("settings"))),
    )


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """Yields what stands at the top."""
    first, last = run.steps[0], run.steps[-1]
    yield "folder", str(run.path)
    yield "model", run.facts.get("model") or ""
    yield "watched", f"{run.count} images at {len(run.steps)} steps, from {first} to {last}"
    yield "left out", earlier(run)
    yield "methods", ", ".join(run.maps)
    yield "note", run.note
    loggers = run.facts.get("loggers") or ()
    said = [filter(None, map(one.get, ("name", "version", "address"))) for one in loggers]
    yield "logged by", "; ".join(", ".join(map(str, one)) for one in said)
    if run.facts.get("ended") is False:
        yield "state", "the training goes on, or was interrupted"
    for tag, curve in run.numbers.items():
        if tag.startswith(("val", "eval")):
            yield tag, f"{number([*curve.values()][-1])} at the end"


def _figure(run: Run, ranked: Ranked, shown: Shown) -> dict[str, Any]:
    """Describes one image at some steps."""
    pixels = run.input(ranked.image)
    return {
        "image": ranked.image,
        "reason": ranked.reason,
        "input": photo(pixels),
        "ratio": f"{pixels.shape[1]} / {pixels.shape[0]}",
        "shown": shown,
        "colormap": run.colormap,
        "said": [shown.beside],
    }

"""The page about one training."""

from collections.abc import Iterator

from vitx.cli.curves import charts, number
from vitx.cli.page import fill, photo, png, show
from vitx.runs.film import evenly
from vitx.runs.hyperparameters import flat
from vitx.runs.ranking import rank
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
            {"image": image, "reason": reason, "input": photo(run.input(image)), "shown": shown[image]}
            for image, reason in rank(run).items()
        ],
        settings=dict(flat(run.facts.get("settings"))),
    )


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """Yields what stands at the top."""
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

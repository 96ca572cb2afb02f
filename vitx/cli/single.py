"""The page about one training."""

import re
from typing import Any

from vitx.cli.curves import charts, number
from vitx.cli.embedding import Shown, columns_of, photo, png, show
from vitx.cli.page import beside, fill
from vitx.runs.film import evenly
from vitx.runs.playback import FromMaps
from vitx.runs.ranking import Ranked, rank
from vitx.runs.run import Run


def draw_run(name: str, run: Run, steps: int) -> str:
    """Draws the page.

    Args:
        name: of the run.
        run: what it is about; it has pictures.
        steps: most of them on each slider.

    Returns:
        HTML.
    """
    playback = run.playback
    firings = evenly(len(playback.steps), steps)
    shown = show(playback, firings)
    return fill(
        "run",
        name=name,
        facts=_facts(run),
        charts=charts(run.scalars),
        grids=[
            {"heading": run.heading(firing), "picture": png(playback.grid(firing, range(playback.count)))}
            for firing in evenly(len(playback.steps), 2)
        ],
        from_maps=isinstance(playback, FromMaps),
        colormaps=[playback.saved.colormap] if isinstance(playback, FromMaps) else [],
        columns=columns_of(len(firings)),
        frames=len(firings),
        moments=[run.heading(firing) for firing in firings],
        headings=[[run.heading(firing) for firing in firings]],
        figures=[_figure(run, ranked, shown[ranked.image]) for ranked in _order(run)],
        config=run.config,
    )


def _order(run: Run) -> list[Ranked]:
    playback = run.playback
    if isinstance(playback, FromMaps):
        return rank(playback.saved, playback.captions(-1))
    return [Ranked(image, "") for image in range(playback.count)]


def _facts(run: Run) -> dict[str, str]:
    """What stands at the top."""
    steps = run.playback.steps
    model = re.search(r"^\s*model_name: *([^\s#]+)", "\n".join(run.config.values()), re.MULTILINE)
    facts = {
        "logged in": str(run.path),
        "model": model[1] if model else "",
        "watched": f"{run.playback.count} images at {len(steps)} steps, from {steps[0]} to {steps[-1]}",
        "methods": ", ".join(run.playback.titles),
    }
    for tag, curve in run.scalars.items():
        if tag.startswith("val"):
            facts[tag] = f"{number(curve.values[-1])} at the end"
    return {name: value for name, value in facts.items() if value}


def _figure(run: Run, ranked: Ranked, shown: Shown) -> dict[str, Any]:
    """One image at some steps."""
    pixels = run.playback.input(ranked.image)
    return {
        "image": ranked.image,
        "reason": ranked.reason,
        "input": photo(pixels),
        "ratio": f"{pixels.shape[1]} / {pixels.shape[0]}",
        "shown": shown,
        "colormap": run.playback.saved.colormap if isinstance(run.playback, FromMaps) else "",
        "said": [beside(shown)],
    }

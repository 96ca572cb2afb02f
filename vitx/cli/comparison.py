"""The page that compares several trainings."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from vitx.cli.curves import EXPLAINED, charts_of_runs, in_order, look, number, parts
from vitx.cli.page import Shown, fill, photo, show
from vitx.runs.comparing import Setting, compare_settings, disagreement, meetings
from vitx.runs.run import Run

_MOST_BYTES = 19_500_000  # of a page, for which moments are left out where there are many runs
_MOST_OVERVIEWS = 24  # runs


class Cell(NamedTuple):
    """One value of a run: its text, its place in the order, and its share of the span of its column."""

    text: str = "\N{EN DASH}"
    value: float | str | None = None
    share: float | None = None


class Column(NamedTuple):
    """One setting or number, a cell for each run."""

    group: str
    name: str
    title: str
    cells: list[Cell]


def draw_comparison(
    runs: Mapping[str, Run], left_out: Mapping[str, str], steps: int, links: Mapping[tuple[int, int], str]
) -> str:
    """Draw the page as HTML, with as many moments of the trainings as it has room for.

    Args:
        runs: by their names.
        left_out: name -> why, of those that cannot be read.
        steps: most moments on the slider.
        links: the run's number and the image -> the page to click.
    """
    names, every = [*runs], [*runs.values()]
    differing, shared = compare_settings(every)
    met, table = meetings(every), columns(every, differing)
    for meeting in met:
        if len(meeting.runs) > 1:
            meeting.images.sort(key=lambda images: disagreement(every, images), reverse=True)
    overviews = [run.overview() for run in every] if len(every) <= _MOST_OVERVIEWS else []
    fixed: dict[str, Any] = {
        "runs": [
            {"place": place, "name": name, "path": run.path, "look": look(place), "earlier": run.earlier}
            for place, (name, run) in enumerate(runs.items())
        ],
        "columns_of_table": table,
        "groups_of_table": [(group, len([*of])) for group, of in groupby(table, lambda one: one.group)],
        "shared": {setting.key: next(iter(setting.values.values())) for setting in shared},
        "charts": charts_of_runs([run.numbers for run in every], names),
        "overviews": {at: photo(drawn) for at, drawn in enumerate(overviews) if drawn is not None},
        "links": links,
        "left_out": left_out,
        "colormaps": sorted({run.colormap for run in every}),
        "wanted": min(steps, max(len(run.steps) for run in every)),
    }
    moments = fixed["wanted"]
    while True:
        shares = np.linspace(0, 1, moments).tolist() if moments > 1 else [1.0]
        firings = [[run.nearest(share) for share in shares] for run in every]
        shown = [show(run, at, sorted(run.maps)) for run, at in zip(every, firings, strict=True)]
        page = fill(
            "comparison",
            groups=[
                {
                    "meeting": meeting,
                    "names": [names[number] for number in meeting.runs],
                    "figures": [_figure(every, images, shown) for images in meeting.images],
                }
                for meeting in met
            ],
            frames=moments,
            moments=[{0.0: "the start", 1.0: "the end"}.get(x, f"{x:.0%} of the training") for x in shares],
            headings=[[*map(run.heading, at)] for run, at in zip(every, firings, strict=True)],
            **fixed,
        )
        size = len(page.encode())
        if size <= _MOST_BYTES or moments <= 2:
            return page
        films = sum(len(film.uri) for of_run in shown for one in of_run for film in one.films.values())
        room = max(_MOST_BYTES - (size - films), 0)
        moments = max(2, min(moments - 1, int(moments * room / films)))


def _figure(
    runs: Sequence[Run], images: Mapping[int, int], shown: Sequence[Sequence[Shown]]
) -> dict[str, Any]:
    """Describe one image under each run."""
    first, image = next(iter(images.items()))
    cells = {number: shown[number][at] for number, at in images.items()}
    captions = [one.last for one in cells.values()]
    known = [caption.right for caption in captions if caption.right is not None]
    return {
        "image": image,
        "places": images,
        "label": next((caption.label for caption in captions if caption.label is not None), ""),
        "verdict": f"right at the end: {sum(known)} of {len(known)} runs" if known else "",
        "input": photo(runs[first].input(image)),
        "cells": cells,
    }


def columns(runs: Sequence[Run], differing: Sequence[Setting]) -> list[Column]:
    """Return the settings that differ, the length of each run, and the last value of each number."""
    found = []
    for one in differing:
        cells = [Cell()] * len(runs)
        for run, value in one.values.items():
            text = "none" if value is None else str(value)
            cells[run] = Cell(text, _finite(value) if type(value) in (int, float) else text)
        found.append(Column("settings that differ", one.name, one.key, cells))
    lengths = _numbers([run.steps[-1] for run in runs])
    found.append(Column("training", "steps", "the last step that was watched", lengths))
    tags = in_order(dict.fromkeys(tag for run in runs for tag in run.numbers))
    # Numbers of one group stand together, validation in front.
    groups = [*dict.fromkeys(parts(tag)[0] for tag in sorted(tags, key=lambda tag: "val" not in tag))]
    for tag in sorted(tags, key=lambda tag: groups.index(parts(tag)[0])):
        where, measure = parts(tag)
        title = f"{tag}, at the end. {EXPLAINED.get(measure, '')}".strip()
        last = [next(reversed([*run.numbers.get(tag, {}).values()]), None) for run in runs]
        found.append(Column(where or "last", measure, title, _numbers(last)))
    return found


def _numbers(values: Iterable[float | None]) -> list[Cell]:
    values = [*values]
    known = [value for value in map(_finite, values) if value is not None]
    low, span = min(known, default=0), max(known, default=0) - min(known, default=0)
    cells = []
    for value in values:
        finite = _finite(value)
        share = (finite - low) / span if finite is not None and span > 0 else None
        cells.append(Cell() if value is None else Cell(number(value), finite, share))
    return cells


def _finite(value: Any) -> float | None:
    """Leave out what has no place in an order."""
    return float(value) if value is not None and isfinite(value) else None

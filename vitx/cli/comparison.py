"""The page that compares several trainings."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from vitx.cli.curves import EXPLAINED, charts_of_runs, in_order, look, number, parts
from vitx.cli.page import Shown, fill, photo, show
from vitx.runs.hyperparameters import Setting, Value, compare_settings
from vitx.runs.meeting import Meeting, disagreement, meetings
from vitx.runs.run import Run

_MOST_BYTES = 19_500_000  # of a page, for which moments are left out where there are many runs
_SETTINGS, _LENGTH = "settings that differ", "training"  # groups of columns
_ABSENT = "\N{EN DASH}"
_MOST_OVERVIEWS = 24  # runs


class Cell(NamedTuple):
    """One value of a run: its text, its place in the order, and its share of the span of its column."""

    text: str
    value: float | str | None = None
    share: float | None = None


class Column(NamedTuple):
    """One setting or number, a cell for each run."""

    group: str
    name: str
    title: str
    cells: list[Cell]

    @property
    def label(self) -> str:
        """Its name where no group stands above it."""
        return self.name if self.group in (_SETTINGS, _LENGTH) else f"{self.group} {self.name}"


def draw_comparison(
    runs: Mapping[str, Run],
    left_out: Mapping[str, str],
    steps: int,
    links: Mapping[tuple[int, int], str] | None = None,
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
    overviews = [run.overview() for run in every] if len(every) <= _MOST_OVERVIEWS else []
    fixed: dict[str, Any] = {
        "runs": [
            {"place": place, "name": name, "path": run.path, "look": look(place)}
            for place, (name, run) in enumerate(runs.items())
        ],
        "columns_of_table": table,
        "groups_of_table": [(group, len([*of])) for group, of in groupby(table, lambda one: one.group)],
        "shared": {setting.key: next(iter(setting.values.values())) for setting in shared},
        "charts": charts_of_runs([run.numbers for run in every], names),
        "overviews": {at: photo(drawn) for at, drawn in enumerate(overviews) if drawn is not None},
        "links": links or {},
        "left_out": left_out,
        "earlier": {name: run.earlier for name, run in runs.items() if run.earlier},
        "colormaps": sorted({run.colormap for run in every}),
        "wanted": min(steps, max(len(run.steps) for run in every)),
    }
    moments = fixed["wanted"]
    while True:
        shares = np.linspace(0, 1, moments).tolist() if moments > 1 else [1.0]
        firings = [[run.nearest(share) for share in shares] for run in every]
        shown = [show(*both) for both in zip(every, firings, strict=True)]
        page = fill(
            "comparison",
            groups=[_group(every, names, meeting, met[0], shown) for meeting in met],
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


def _group(
    runs: Sequence[Run],
    names: Sequence[str],
    meeting: Meeting,
    first: Meeting,
    shown: Sequence[Sequence[Shown]],
) -> dict[str, Any]:
    """Describe images that the same runs watch, and why they do not stand with those of most runs."""
    apart, images = "", meeting.images
    if meeting.titles != first.titles:
        apart = "by other methods"
    elif meeting is not first:
        apart = "other images" if meeting.note == first.note else f"other maps ({meeting.note or 'no note'})"
    if len(meeting.runs) > 1:
        images = sorted(images, key=lambda one: disagreement(runs, one), reverse=True)
    return {
        "names": [names[number] for number in meeting.runs],
        "titles": meeting.titles,
        "note": meeting.note,
        "apart": apart,
        "figures": [_figure(runs, one, shown, meeting.titles) for one in images],
    }


def _figure(
    runs: Sequence[Run], images: Mapping[int, int], shown: Sequence[Sequence[Shown]], titles: Sequence[str]
) -> dict[str, Any]:
    """Describe one image under each run."""
    first, image = next(iter(images.items()))
    captions = [shown[number][at].captions[-1] for number, at in images.items()]
    known = [caption.right for caption in captions if caption.right is not None]
    return {
        "image": image,
        "places": images,
        "label": next((caption.label for caption in captions if caption.label is not None), ""),
        "verdict": f"right at the end: {sum(known)} of {len(known)} runs" if known else "",
        "input": photo(runs[first].input(image)),
        "cells": {number: shown[number][at].in_order(titles) for number, at in images.items()},
    }


def columns(runs: Sequence[Run], differing: Sequence[Setting]) -> list[Column]:
    """Return the settings that differ, the length of each run, and the last value of each number."""
    found = [Column(_SETTINGS, one.name, one.key, _settings(one.values, len(runs))) for one in differing]
    lengths = _numbers([run.steps[-1] for run in runs])
    found.append(Column(_LENGTH, "steps", "the last step that was watched", lengths))
    tags = in_order(dict.fromkeys(tag for run in runs for tag in run.numbers))
    # Numbers of one group stand together, validation in front.
    groups = dict.fromkeys(parts(tag)[0] for tag in sorted(tags, key=lambda tag: "val" not in tag))
    for tag in sorted(tags, key=lambda tag: [*groups].index(parts(tag)[0])):
        where, measure = parts(tag)
        title = f"{tag}, at the end. {EXPLAINED.get(measure, '')}".strip()
        last = [next(reversed([*run.numbers.get(tag, {}).values()]), None) for run in runs]
        found.append(Column(where or "last", measure, title, _numbers(last)))
    return found


def _settings(values: Mapping[int, Value], count: int) -> list[Cell]:
    cells = [Cell(_ABSENT)] * count
    for run, value in values.items():
        text = "none" if value is None else str(value)
        cells[run] = Cell(text, _finite(value) if type(value) in (int, float) else text)
    return cells


def _numbers(values: Iterable[float | None]) -> list[Cell]:
    values = [*values]
    known = [value for value in map(_finite, values) if value is not None]
    low, span = min(known, default=0), max(known, default=0) - min(known, default=0)
    cells = []
    for value, finite in zip(values, map(_finite, values), strict=True):
        share = (finite - low) / span if finite is not None and span > 0 else None
        cells.append(Cell(_ABSENT if value is None else number(value), finite, share))
    return cells


def _finite(value: Any) -> float | None:
    """Leave out what has no place in an order."""
    return float(value) if value is not None and isfinite(value) else None

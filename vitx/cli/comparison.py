"""The page that compares several trainings."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from vitx.cli.curves import charts_of_runs, look
from vitx.cli.embedding import Shown, columns_of, photo, show
from vitx.cli.page import fill
from vitx.cli.places import earlier
from vitx.cli.table import columns
from vitx.pictures.captions import Caption
from vitx.runs.hyperparameters import compare_settings
from vitx.runs.meeting import Meeting, disagreement, meetings
from vitx.runs.run import Run

_MOST_BYTES = 19_500_000  # of a page, for which moments are left out where there are many runs


def draw_comparison(runs: Mapping[str, Run], left_out: Mapping[str, str], steps: int) -> str:
    """Draws the page, with as many moments of the trainings as it has room for.

    Args:
        runs: by their names.
        left_out: name -> why, of those that cannot be read.
        steps: most moments on the slider.

    Returns:
        HTML.
    """
    names, all_runs = list(runs), list(runs.values())
    differing, shared = compare_settings([_settings(run) for run in all_runs])
    met = meetings(all_runs)
    wanted = min(steps, max(len(run.steps) for run in all_runs))
    table = columns(all_runs, differing)
    fixed: dict[str, Any] = {
        "runs": [_run(place, name, run) for place, (name, run) in enumerate(runs.items())],
        "columns_of_table": table,
        "groups_of_table": [(group, len([*of])) for group, of in groupby(table, lambda one: one.group)],
        "shared": {setting.key: next(iter(setting.values.values())) for setting in shared},
        "charts": charts_of_runs([run.numbers for run in all_runs], names),
        "left_out": left_out,
        "earlier": {name: earlier(run) for name, run in runs.items() if run.saved.before},
        "colormaps": sorted({run.colormap for run in all_runs}),
        "wanted": wanted,
    }
    moments = wanted
    while True:
        shown = [show(run, _firings(run, moments)) for run in all_runs]
        groups = [
            _group(all_runs, names, meeting, shown) | {"apart": _apart(meeting, met[0])} for meeting in met
        ]
        page = _fill(fixed, all_runs, groups, moments)
        size, films = len(page.encode()), sum(group["size"] for group in groups)
        if size <= _MOST_BYTES or moments <= 2:
            return page
        room = max(_MOST_BYTES - (size - films), 0)
        moments = max(2, min(moments - 1, int(moments * room / films)))


def _fill(fixed: Mapping[str, Any], runs: Sequence[Run], groups: list[dict[str, Any]], moments: int) -> str:
    return fill(
        "comparison",
        groups=groups,
        frames=moments,
        columns=columns_of(moments),
        moments=[_moment(share) for share in _shares(moments)],
        headings=[[run.heading(firing) for firing in _firings(run, moments)] for run in runs],
        **fixed,
    )


def _shares(moments: int) -> list[float]:
    """Where in the trainings the slider stops; the end, where there is but one place."""
    return np.linspace(0, 1, moments).tolist() if moments > 1 else [1.0]


def _moment(share: float) -> str:
    if share in (0, 1):
        return "the end" if share else "the start"
    return f"{share:.0%} of the training"


def _run(place: int, name: str, run: Run) -> dict[str, Any]:
    colour, dash = look(place)
    return {"place": place, "name": name, "path": str(run.path), "colour": colour, "dash": dash}


def _firings(run: Run, moments: int) -> list[int]:
    """Returns those that are nearest to some moments."""
    return [run.nearest(share) for share in _shares(moments)]


def _settings(run: Run) -> dict[str, Any]:
    """Returns what was set in the training and in its watch."""
    known = {key: run.facts[key] for key in ("model", "target") if key in run.facts}
    methods = {name: options or "default" for name, options in (run.facts.get("methods") or {}).items()}
    own = {"vitx": {**known, "methods": methods, "version": run.facts.get("vitx")}}
    return {**(run.facts.get("settings") or {}), **own}


def _group(
    runs: Sequence[Run], names: Sequence[str], meeting: Meeting, shown: Sequence[Sequence[Shown]]
) -> dict[str, Any]:
    """Images that the same runs watch."""
    images = meeting.images
    ranked = len(meeting.runs) > 1
    if ranked:
        images = sorted(images, key=lambda one: disagreement(runs, one), reverse=True)
    figures = [_figure(runs, one, shown, meeting.titles) for one in images]
    return {
        "names": [names[number] for number in meeting.runs],
        "everyone": len(meeting.runs) == len(runs),
        "titles": meeting.titles,
        "note": meeting.note,
        "ranked": ranked,
        "figures": figures,
        "size": sum(figure["size"] for figure in figures),
    }


def _apart(meeting: Meeting, first: Meeting) -> str:
    """Says why images do not stand with those of most runs."""
    if meeting is first:
        return ""
    if meeting.titles != first.titles:
        return "by other methods"
    return "other images" if meeting.note == first.note else f"other maps ({meeting.note or 'no note'})"


def _figure(
    runs: Sequence[Run],
    images: Mapping[int, int],
    shown: Sequence[Sequence[Shown]],
    titles: Sequence[str],
) -> dict[str, Any]:
    """One image under each run."""
    first, image = next(iter(images.items()))
    pixels = runs[first].input(image)
    cells = [_cell(runs[n], n, shown[n][at].in_order(titles)) for n, at in images.items()]
    captions = [caption for number, at in images.items() for caption in shown[number][at].captions[-1:]]
    return {
        "image": image,
        "label": next((caption.label for caption in captions if caption.label is not None), ""),
        "verdict": _verdict(captions),
        "input": photo(pixels),
        "ratio": f"{pixels.shape[1]} / {pixels.shape[0]}",
        "cells": cells,
        "said": [cell["said"] for cell in cells],
        "size": sum(cell["size"] for cell in cells),
    }


def _cell(run: Run, number: int, shown: Shown) -> dict[str, Any]:
    return {
        "run": number,
        "shown": shown,
        "colormap": run.colormap,
        "said": shown.beside,
        "size": sum(len(film.uri) for film in shown.films.values()),
    }


def _verdict(captions: Sequence[Caption]) -> str:
    """Says how many runs are right at their ends, where that is known."""
    known = [caption.right for caption in captions if caption.right is not None]
    return f"right at the end: {sum(known)} of {len(known)} runs" if known else ""

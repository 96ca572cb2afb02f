"""The page that compares several trainings."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from vitx.cli.curves import charts_of_runs, look
from vitx.cli.page import Shown, fill, photo, show
from vitx.cli.table import columns
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
    names, every = [*runs], [*runs.values()]
    differing, shared = compare_settings(every)
    met, table = meetings(every), columns(every, differing)
    fixed: dict[str, Any] = {
        "runs": [
            {"place": place, "name": name, "path": run.path, "look": look(place)}
            for place, (name, run) in enumerate(runs.items())
        ],
        "columns_of_table": table,
        "groups_of_table": [(group, len([*of])) for group, of in groupby(table, lambda one: one.group)],
        "shared": {setting.key: next(iter(setting.values.values())) for setting in shared},
        "charts": charts_of_runs([run.numbers for run in every], names),
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
            moments=[_moment(share) for share in shares],
            headings=[[*map(run.heading, at)] for run, at in zip(every, firings, strict=True)],
            **fixed,
        )
        size = len(page.encode())
        if size <= _MOST_BYTES or moments <= 2:
            return page
        films = sum(len(film.uri) for of_run in shown for one in of_run for film in one.films.values())
        room = max(_MOST_BYTES - (size - films), 0)
        moments = max(2, min(moments - 1, int(moments * room / films)))


def _moment(share: float) -> str:
    return {0.0: "the start", 1.0: "the end"}.get(share, f"{share:.0%} of the training")


def _group(
    runs: Sequence[Run],
    names: Sequence[str],
    meeting: Meeting,
    first: Meeting,
    shown: Sequence[Sequence[Shown]],
) -> dict[str, Any]:
    """Describes images that the same runs watch, and why they do not stand with those of most runs."""
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
    """Describes one image under each run."""
    first, image = next(iter(images.items()))
    captions = [shown[number][at].captions[-1] for number, at in images.items()]
    known = [caption.right for caption in captions if caption.right is not None]
    return {
        "image": image,
        "label": next((caption.label for caption in captions if caption.label is not None), ""),
        "verdict": f"right at the end: {sum(known)} of {len(known)} runs" if known else "",
        "input": photo(runs[first].input(image)),
        "cells": {number: shown[number][at].in_order(titles) for number, at in images.items()},
    }

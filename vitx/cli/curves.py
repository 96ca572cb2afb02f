"""Scalars as small charts, in SVG that stands in a page."""

import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from vitx.methods import title_of
from vitx.runs.events import Curve
from vitx.runs.film import evenly

EXPLAINED = {
    "entropy": "How spread out the maps are: 0 for one patch, 1 for all alike.",
    "information": "How much the maps of different images differ, in nats: 0 if all are alike.",
    "drift": "How far they moved since the firing before: 0 for not at all, 1 for to other patches.",
    "pointing": "How often the brightest point lies on the object.",
    "energy": "Their share on the object.",
}
_FIRST = ("accuracy", "acc", "loss", *EXPLAINED)
_LEFT_OUT = ("epoch", "hp_metric")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by all eyes
_CURRENT = "#012345"  # stands for the page's own colour of text, light or dark
_MOST_POINTS = 500


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Attributes:
        name: in the legend.
        colour: as CSS takes it.
        first: the value at its start, in words.
        last: at its end.
    """

    name: str
    colour: str
    first: str
    last: str


@dataclass(frozen=True)
class Chart:
    """Curves of one measure.

    Attributes:
        name: of the measure.
        about: what it says, or nothing.
        lines: what the legend says.
        svg: the picture.
    """

    name: str
    about: str
    lines: tuple[Line, ...]
    svg: str


def charts(scalars: Mapping[str, Curve]) -> list[Chart]:
    """Draws a chart of each measure: `train/loss` and `val/loss` are two lines of `loss`.

    Args:
        scalars: tag -> curve.

    Returns:
        Accuracy, loss and vitx's own first, the others as they were logged.
    """
    groups: dict[str, dict[str, Curve]] = {}
    for tag, curve in scalars.items():
        where, _, measure = tag.removeprefix("vitx/").rpartition("/")
        if measure not in _LEFT_OUT:
            groups.setdefault(measure, {})[title_of(where) or measure] = curve
    order = sorted(groups, key=lambda measure: _FIRST.index(measure) if measure in _FIRST else len(_FIRST))
    return [_chart(measure, groups[measure]) for measure in order]


def number(value: float) -> str:
    """Writes a value in three digits.

    Example:
        >>> number(0.91234), number(12345.6), number(2e-5)
        ('0.912', '12346', '2e-05')
    """
    return f"{value:.0f}" if isfinite(value) and abs(value) >= 1000 else f"{value:.3g}"


def _chart(measure: str, curves: Mapping[str, Curve]) -> Chart:
    colours = [_COLOURS[place % len(_COLOURS)] for place in range(len(curves))]
    lines = tuple(
        Line(name, colour, number(curve.values[0]), number(curve.values[-1]))
        for (name, curve), colour in zip(curves.items(), colours, strict=True)
    )
    about = EXPLAINED.get(measure, "")
    return Chart(measure, about, lines, _svg(zip(curves.values(), colours, strict=True)))


def _svg(curves: Iterable[tuple[Curve, str]]) -> str:
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "vitx"}  # text as text, the same in every run
    settings |= {"font.family": "sans-serif", "font.size": 9}
    settings |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _CURRENT)
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.2, 2.3), layout="constrained")
        axes = figure.subplots()
        for curve, colour in curves:
            places = evenly(len(curve.steps), _MOST_POINTS)
            steps, values = (
                [sequence[place] for place in places] for sequence in (curve.steps, curve.values)
            )
            axes.plot(steps, values, color=colour, marker="o" if len(places) < 30 else None, markersize=3)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        written = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    svg = written.getvalue()
    svg = re.sub(
        r"<metadata>.*?</metadata>| xmlns(:\w+)?=\"[^\"]*\"", "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    return svg.replace(_CURRENT, "currentColor")

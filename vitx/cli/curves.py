"""Scalars as small charts, in SVG that stands in a page."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from vitx.methods import title_of
from vitx.runs.film import evenly

Curve = Mapping[int, float]  # step -> value, in order

EXPLAINED = {
    "entropy": "How spread out the maps are: 0 for one patch, 1 for a constant map.",
    "information": "How much the maps of different images differ, in nats: 0 if all are alike.",
    "drift": "How far they moved since the last firing: 0 for not at all, 1 for no patch in common.",
    "pointing": "How often the brightest point lies on the object.",
    "energy": "Their share on the object.",
}
_FIRST = ("accuracy", "acc", "loss", *EXPLAINED)
_LEFT_OUT = ("epoch", "hp_metric")
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
)  # told apart by all eyes
_CURRENT = "#012345"  # stands for the page's own colour of text, light or dark
_FEW = 12  # lines that may be thick
_DASHES = ("solid", "dashed", "dotted")  # once the colours are used up
_MOST_POINTS, _FEWEST_POINTS, _ALL_POINTS = 500, 20, 150_000  # of a curve, and of a page


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Attributes:
        name: in the legend.
        colour: as CSS takes it.
        dash: as CSS calls it.
        mark: the class of what belongs to it in the page.
        curve: what is drawn.
    """

    name: str
    colour: str
    dash: str
    mark: str
    curve: Curve

    @property
    def first(self) -> str:
        """The value at its start."""
        return number(next(iter(self.curve.values())))

    @property
    def last(self) -> str:
        """The value at its end."""
        return number([*self.curve.values()][-1])


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
    for tag in in_order(scalars):
        where, measure = parts(tag)
        groups.setdefault(measure, {})[where or measure] = scalars[tag]
    return [
        _chart(measure, [_line(name, place, curve) for place, (name, curve) in enumerate(curves.items())])
        for measure, curves in groups.items()
    ]


def charts_of_runs(scalars: Sequence[Mapping[str, Curve]], names: Sequence[str]) -> list[Chart]:
    """Draws a chart of each number that was logged, a line for each run.

    Args:
        scalars: each run's, tag -> curve.
        names: of the runs.
    """
    tags = in_order(
        sorted({tag: None for of_run in scalars for tag in of_run}, key=lambda tag: "val" not in tag)
    )
    points = _ALL_POINTS // max(sum(map(len, scalars)), 1)
    found = []
    for tag in tags:
        lines = [
            _line(name, place, of_run[tag])
            for place, (name, of_run) in enumerate(zip(names, scalars, strict=True))
            if tag in of_run
        ]
        where, measure = parts(tag)
        title = f"{where}: {measure}" if where else measure
        found.append(_chart(measure, lines, title, min(max(points, _FEWEST_POINTS), _MOST_POINTS)))
    return found


def in_order(tags: Iterable[str]) -> list[str]:
    """Sorts what was logged: accuracy, loss and vitx's own first; counters are left out.

    Example:
        >>> in_order(["epoch", "vitx/gae/drift", "train/loss", "lr", "val/accuracy"])
        ['val/accuracy', 'train/loss', 'vitx/gae/drift', 'lr']
    """
    measures = {tag: parts(tag)[1] for tag in tags}
    kept = [tag for tag, measure in measures.items() if measure not in _LEFT_OUT]
    known = {measure: place for place, measure in enumerate(_FIRST)}
    return sorted(kept, key=lambda tag: known.get(measures[tag], len(known)))


def parts(tag: str) -> tuple[str, str]:
    """Tells of what a number is, and which.

    Example:
        >>> parts("vitx/rollout/drift"), parts("val/loss"), parts("lr")
        (('attention rollout', 'drift'), ('val', 'loss'), ('', 'lr'))
    """
    where, _, measure = tag.removeprefix("vitx/").rpartition("/")
    return title_of(where), measure


def look(place: int) -> tuple[str, str]:
    """Returns colour and dash of one of several lines, as CSS takes them."""
    return _COLOURS[place % len(_COLOURS)], _DASHES[place // len(_COLOURS) % len(_DASHES)]


def number(value: float) -> str:
    """Writes a value in three digits.

    Example:
        >>> number(0.91234), number(12345.6), number(2e-5)
        ('0.912', '12346', '2e-05')
    """
    return f"{value:.0f}" if isfinite(value) and abs(value) >= 1000 else f"{value:.3g}"


def _line(name: str, place: int, curve: Curve) -> Line:
    colour, dash = look(place)
    return Line(name, colour, dash, f"run-{place}", curve)


def _chart(measure: str, lines: Sequence[Line], title: str = "", points: int = _MOST_POINTS) -> Chart:
    return Chart(title or measure, EXPLAINED.get(measure, ""), tuple(lines), _svg(lines, points))


def _svg(lines: Sequence[Line], points: int) -> str:
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "vitx"}  # text as text, the same in every run
    settings |= {"font.family": "sans-serif", "font.size": 9}
    settings |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _CURRENT)
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.2, 2.3), layout="constrained")
        axes = figure.subplots()
        width = 1.5 if len(lines) <= _FEW else 0.7
        for line in lines:
            known = [*line.curve.items()]
            places = evenly(len(known), points)
            steps, values = zip(*(known[place] for place in places), strict=True)
            (drawn,) = axes.plot(steps, values, color=line.colour, linestyle=line.dash, linewidth=width)
            drawn.set_gid(line.mark)
            if len(places) * len(lines) < 60:  # each mark takes as much room as ten points of a line
                drawn.set(marker="o", markersize=3)
            elif len(places) == 1:
                drawn.set(marker="o")
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        written = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    return _embedded(written.getvalue(), lines)


def _embedded(svg: str, lines: Sequence[Line]) -> str:
    """Makes a file a part of a page: a line tells its name where it is pointed at, and numbers are short."""
    outside = r"<metadata>.*?</metadata>| xmlns(:\w+)?=\"[^\"]*\""
    svg = re.sub(outside, "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"(?<=\d\.\d)\d+(?= |\n|\")", "", svg)
    for line in lines:
        named = f'<g class="curve {line.mark}"><title>{escape(line.name)}</title>'
        svg = svg.replace(f'<g id="{line.mark}">', named)
    return svg.replace(_CURRENT, "currentColor")

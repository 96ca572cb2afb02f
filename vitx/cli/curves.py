"""Scalars as small charts, in SVG that stands in a page."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import isfinite
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from vitx.attribution import title_of
from vitx.runs.film import evenly

Curve = Mapping[int, float]  # step -> value, in order

EXPLAINED = {
    "entropy": "How spread out the maps are: 0 for one patch, 1 for a constant map.",
    "information": "How much the maps of different images differ, in nats: 0 if all are alike.",
    "drift": "How far they moved since the last firing: 0 for not at all, 1 for no patch in common.",
    "pointing": "How often the brightest point lies on the object.",
    "energy": "Their share on the object.",
    "sinks": "Their share on patches that most others attend to, whatever they look for.",
    "deletion": "How much more the model needs their brightest patches than random ones: 0 is chance.",
    "insertion": "How much longer it keeps the class by their patches than by random ones: 0 is chance.",
    "reliance": "How many more predictions change by the brightest 5 % of patches than by random ones.",
}
_FIRST = ("accuracy", "acc", "loss", *EXPLAINED)
_LEFT_OUT = ("epoch", "hp_metric")
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")  # for all eyes
_CURRENT = "#012345"  # stands for the page's own color of text, light or dark
_FEW = 12  # lines that may be thick
_DASHES = ("solid", "dashed", "dotted")  # once the colors are used up
_MOST_POINTS, _FEWEST_POINTS, _ALL_POINTS = 500, 20, 150_000  # of a curve, and of a page


class Line(NamedTuple):
    """One curve of a chart: its name in the legend, and its place among the lines of all charts."""

    name: str
    place: int
    curve: Curve

    @property
    def look(self) -> tuple[str, str]:
        """The color and the dash."""
        return look(self.place)

    @property
    def ends(self) -> tuple[str, str]:
        """The first and the last value."""
        first, *_, last = [*self.curve.values()] * 2
        return number(first), number(last)


class Chart(NamedTuple):
    """Curves of one measure: its name, its meaning, the lines of the legend, and the picture."""

    name: str
    about: str
    lines: Sequence[Line]
    svg: str


def charts(scalars: Mapping[str, Curve]) -> list[Chart]:
    """Draw a chart of each measure of a run: `train/loss` and `val/loss` are two lines of `loss`."""
    groups: dict[str, list[Line]] = {}
    for tag in in_order(scalars):
        where, measure = parts(tag)
        lines = groups.setdefault(measure, [])
        lines.append(Line(where or measure, len(lines), scalars[tag]))
    return [_chart(measure, measure, lines, _MOST_POINTS) for measure, lines in groups.items()]


def charts_of_runs(scalars: Sequence[Mapping[str, Curve]], names: Sequence[str]) -> list[Chart]:
    """Draw a chart of each number that was logged, a line for each of some runs."""
    tags = dict.fromkeys(tag for of_run in scalars for tag in of_run)
    points = min(max(_ALL_POINTS // max(sum(map(len, scalars)), 1), _FEWEST_POINTS), _MOST_POINTS)
    found = []
    for tag in in_order(sorted(tags, key=lambda tag: "val" not in tag)):
        of_runs = enumerate(zip(names, scalars, strict=True))
        lines = [Line(name, place, known[tag]) for place, (name, known) in of_runs if tag in known]
        where, measure = parts(tag)
        found.append(_chart(measure, f"{where}: {measure}" if where else measure, lines, points))
    return found


def in_order(tags: Iterable[str]) -> list[str]:
    """Sort logged numbers: accuracy, loss and vitx's own first; counters are left out."""
    kept = [tag for tag in tags if parts(tag)[1] not in _LEFT_OUT]
    known = {measure: place for place, measure in enumerate(_FIRST)}
    return sorted(kept, key=lambda tag: known.get(parts(tag)[1], len(known)))


def parts(tag: str) -> tuple[str, str]:
    """Split a tag into the place, a method by its title, and the measure."""
    where, _, measure = tag.removeprefix("vitx/").rpartition("/")
    return title_of(where), measure


def look(place: int) -> tuple[str, str]:
    """Return color and dash of one of several lines, as CSS takes them."""
    return _COLORS[place % len(_COLORS)], _DASHES[place // len(_COLORS) % len(_DASHES)]


def number(value: float) -> str:
    """Write a value in three digits.

    Example:
        >>> number(0.91234), number(12345.6), number(2e-5)
        ('0.912', '12346', '2e-05')
    """
    return f"{value:.0f}" if isfinite(value) and abs(value) >= 1000 else f"{value:.3g}"


def _chart(measure: str, title: str, lines: Sequence[Line], points: int) -> Chart:
    """Draw some curves; a line shows its name where it is pointed at, and numbers are short."""
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
            # Each mark takes as much room as ten points of a line.
            mark = "o" if len(places) == 1 or len(places) * len(lines) < 60 else None
            (drawn,) = axes.plot(steps, values, marker=mark, markersize=3, linewidth=width)
            drawn.set(gid=f"run-{line.place}", color=line.look[0], linestyle=line.look[1])
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        written = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    svg = written.getvalue()
    of_a_file = r"<metadata>.*?</metadata>| xmlns(:\w+)?=\"[^\"]*\""
    svg = re.sub(of_a_file, "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"(?<=\d\.\d)\d+(?= |\n|\")", "", svg).replace(_CURRENT, "currentColor")
    for line in lines:
        named = f'<g class="curve run-{line.place}"><title>{escape(line.name)}</title>'
        svg = svg.replace(f'<g id="run-{line.place}">', named)
    return Chart(title, EXPLAINED.get(measure, ""), lines, svg)

"""Parts of both pages of `vitx report`: templates, small pictures, charts, and a table."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import chain
from math import ceil, isfinite, sqrt
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional as F

from vitx.attribution import title_of
from vitx.evaluation.metrics import entropy
from vitx.inputs.clips import evenly
from vitx.pictures.render import OVERLAY_STRENGTH, Picture, heatmaps, palette
from vitx.pictures.views import UNIFORM
from vitx.runs.comparing import Setting
from vitx.runs.run import Run
from vitx.viewer.page import data_uri, filled

_EDGE = 1  # pixels by which frames are padded with copies of their edges, as browsers blend neighbors
_STOPS = 65  # of a color map; the browser interpolates between them

Curve = Mapping[int, float]  # step -> value, in order

EXPLAINED = {
    "entropy": "How spread out the maps are: 0 for one patch, 1 for a constant map.",
    "information": "How much the maps of different images differ, in nats: 0 if all are alike.",
    "drift": "How far they moved since the last firing: 0 for not at all, 1 for no patch in common.",
    "pointing": "How often the brightest point lies on the object.",
    "energy": "Their share on the object.",
    "sinks": "Their share on patches that most others attend to.",
    "deletion": "How much more the model needs their brightest patches than random ones: 0 is chance.",
    "insertion": "How much longer it keeps the class by their patches than by random ones: 0 is chance.",
    "reliance": "How many more predictions change by the brightest 5 % of patches than by random ones.",
}
_FIRST = ("accuracy", "acc", "loss", *EXPLAINED)
_LEFT_OUT = ("epoch", "hp_metric")
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")  # colorblind-safe
_CURRENT = "#012345"  # placeholder for the text color of the page, light or dark
_FEW = 12  # lines; more are drawn thin
_DASHES = ("solid", "dashed", "dotted")  # once the colors are used up
_MOST_POINTS, _FEWEST_POINTS, _ALL_POINTS = 500, 20, 150_000  # of a curve, and of a page


class Embedded(NamedTuple):
    """A picture in a page: its data URI, and its size in pixels or, for a film, that of one frame."""

    uri: str
    width: int
    height: int


def fill(template: str, *, moments: Sequence[str], colormaps: Sequence[str], **values: Any) -> str:
    """Fill a template from the folder `pages`, and return HTML."""
    tables = {}  # color map -> its red, green and blue at some grays, for an SVG filter
    for name in colormaps:
        channels = palette(name)[np.linspace(0, 255, _STOPS).round().astype(int)].T / 255
        tables[name] = [" ".join(f"{one:.3g}" for one in channel) for channel in channels]
    values |= {"moments": moments, "frames": len(moments), "columns": columns_of(len(moments))}
    values |= {"tables": tables, "strength": OVERLAY_STRENGTH, "look": look, "number": number}
    return filled("vitx.cli", "pages", f"{template}.html.jinja", **values)


def columns_of(count: int) -> int:
    """Return the number of frames of a film that are side by side."""
    return ceil(sqrt(count))


def show(run: Run, firings: Sequence[int], titles: Sequence[str]) -> list[dict[str, Any]]:
    """Describe each image at some firings: films of its maps by title, and what is said about each frame.

    These are the caption, whether it is right, and the indices of maps that are nearly uniform. The browser
    lays each small map over the input, which takes a hundredth of the bytes of an overlay.
    """
    found = []
    for image, captions in enumerate(zip(*map(run.captions, firings), strict=True)):
        maps = {title: torch.from_numpy(run.titled[title][list(firings), image]) for title in titles}
        said: list[list[Any]] = [[str(caption), caption.right] for caption in captions]
        for place, of_method in enumerate(maps.values()):
            for at in (entropy(of_method) > UNIFORM).nonzero()[:, 0]:
                said[at].append(place)
        films = {title: _film(one) for title, one in maps.items()}
        found.append({"films": films, "said": said, "colormap": run.facts["colormap"]})
    return found


def _film(maps: torch.Tensor) -> Embedded:
    """Arrange maps, (n, h, w), each scaled to [0, 255], row by row in one picture."""
    count, height, width = maps.shape
    columns = columns_of(count)
    edged = F.pad(heatmaps(maps, (height, width))[:, None], [_EDGE] * 4, mode="replicate")[:, 0]
    full = F.pad(edged, [0, 0, 0, 0, 0, -count % columns])
    sheet = full.unflatten(0, (-1, columns)).transpose(1, 2).flatten(0, 1).flatten(1)
    return embed((sheet * 255).round().byte().numpy())._replace(width=width, height=height)


def embed(picture: Picture, photo: bool = False) -> Embedded:
    """Encode a picture, (height, width[, 3]) uint8: a drawing as PNG, a photo as JPEG of high quality."""
    kind, options = ("JPEG", {"quality": 90, "subsampling": 0}) if photo else ("PNG", {"optimize": True})
    uri = data_uri(Image.fromarray(picture), kind, **options)
    return Embedded(uri, picture.shape[1], picture.shape[0])


class Cell(NamedTuple):
    """One value of a run."""

    text: str = "\N{EN DASH}"
    value: float | str | None = None  # to sort by
    share: float | None = None  # its position in the range of its column


class Column(NamedTuple):
    """One setting or number, with a cell for each run."""

    group: str
    name: str
    title: str
    cells: list[Cell]


class Line(NamedTuple):
    """One curve of a chart: its name in the legend, and the number that decides its color and dash."""

    name: str
    place: int
    curve: Curve


class Chart(NamedTuple):
    """Curves of one measure."""

    name: str
    about: str  # the meaning of the measure
    lines: Sequence[Line]
    svg: str


def charts(numbers: Mapping[str, Curve]) -> list[Chart]:
    """Draw a chart of each measure of a run: `train/loss` and `val/loss` are two lines of `loss`."""
    lines: dict[str, list[Line]] = {}
    for tag in _in_order(numbers):
        where, measure = _parts(tag)
        of_measure = lines.setdefault(measure, [])
        of_measure.append(Line(where or measure, len(of_measure), numbers[tag]))
    return _drawn(lines)


def charts_of_runs(numbers: Sequence[Mapping[str, Curve]], names: Sequence[str]) -> list[Chart]:
    """Draw a chart of each logged number, with a line for each run that has it."""
    lines = {}
    tags = sorted(dict.fromkeys(chain(*numbers)), key=lambda tag: "val" not in tag)
    for tag in _in_order(tags):
        of_runs = enumerate(zip(names, numbers, strict=True))
        title = ": ".join(filter(None, _parts(tag)))
        lines[title] = [Line(name, place, of_run[tag]) for place, (name, of_run) in of_runs if tag in of_run]
    return _drawn(lines)


def _in_order(tags: Iterable[str]) -> list[str]:
    """Sort tags of numbers: accuracy, loss and vitx's own come first; counters are left out."""
    places = {measure: place for place, measure in enumerate(_FIRST)}
    kept = (tag for tag in tags if _parts(tag)[1] not in _LEFT_OUT)
    return sorted(kept, key=lambda tag: places.get(_parts(tag)[1], len(places)))


def _parts(tag: str) -> tuple[str, str]:
    """Split a tag into its prefix, with a method replaced by its title, and the measure."""
    where, _, measure = tag.removeprefix("vitx/").rpartition("/")
    return title_of(where), measure


def look(place: int) -> tuple[str, str]:
    """Return the CSS color and dash of the line with this number."""
    return _COLORS[place % len(_COLORS)], _DASHES[place // len(_COLORS) % len(_DASHES)]


def number(value: float) -> str:
    """Format a value with three significant digits.

    Example:
        >>> number(0.91234), number(12345.6), number(2e-5)
        ('0.912', '12346', '2e-05')
    """
    return f"{value:.0f}" if isfinite(value) and abs(value) >= 1000 else f"{value:.3g}"


def _drawn(lines: Mapping[str, Sequence[Line]]) -> list[Chart]:
    """Draw the charts of a page; the more curves it has, the fewer points each gets."""
    points = min(max(_ALL_POINTS // max(sum(map(len, lines.values())), 1), _FEWEST_POINTS), _MOST_POINTS)
    about = {title: EXPLAINED.get(title.rpartition(": ")[2], "") for title in lines}
    return [Chart(title, about[title], some, _svg(some, points)) for title, some in lines.items()]


def _svg(lines: Sequence[Line], points: int) -> str:
    """Draw curves as SVG; lines show their names as tooltips, and coordinates are cut to one decimal."""
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "vitx"}  # real text, the same ids in every run
    settings |= {"font.family": "sans-serif", "font.size": 9}
    settings |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _CURRENT)
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.2, 2.3), layout="constrained")
        axes = figure.subplots()
        width = 1.5 if len(lines) <= _FEW else 0.7
        for line in lines:
            known, (color, dash) = [*line.curve.items()], look(line.place)
            places = evenly(len(known), points)
            steps, values = zip(*(known[place] for place in places), strict=True)
            # Each marker takes as many bytes as ten points of a line.
            mark = "o" if len(places) == 1 or len(places) * len(lines) < 60 else None
            (drawn,) = axes.plot(steps, values, marker=mark, markersize=3, linewidth=width)
            drawn.set(gid=f"run-{line.place}", color=color, linestyle=dash)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True)
    svg = written.getvalue()
    of_a_file = r"<metadata>.*?</metadata>| xmlns(:\w+)?=\"[^\"]*\""
    svg = re.sub(of_a_file, "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"(?<=\d\.\d)\d+(?= |\n|\")", "", svg).replace(_CURRENT, "currentColor")
    names = {str(line.place): escape(line.name) for line in lines}

    def named(group: re.Match[str]) -> str:
        return f'<g class="curve run-{group[1]}"><title>{names[group[1]]}</title>'

    return re.sub(r'<g id="run-(\d+)">', named, svg)


def columns(runs: Sequence[Run], differing: Sequence[Setting]) -> list[Column]:
    """Return columns for the settings that differ, the length of runs, and the last value of each number."""
    found = []
    for one in differing:
        cells = [Cell()] * len(runs)
        for run, value in one.values.items():
            text = "none" if value is None else str(value)
            cells[run] = Cell(text, _finite(value) if type(value) in (int, float) else text)
        found.append(Column("settings that differ", one.name, one.key, cells))
    lengths = _numbers([run.steps[-1] for run in runs])
    found.append(Column("training", "steps", "the last step that was watched", lengths))
    tags = _in_order(dict.fromkeys(chain(*(run.numbers for run in runs))))
    # Numbers of one group stay together, validation first.
    groups = [*dict.fromkeys(_parts(tag)[0] for tag in sorted(tags, key=lambda tag: "val" not in tag))]
    for tag in sorted(tags, key=lambda tag: groups.index(_parts(tag)[0])):
        where, measure = _parts(tag)
        title = f"{tag}, at the end. {EXPLAINED.get(measure, '')}".strip()
        last = [next(reversed([*run.numbers.get(tag, {}).values()]), None) for run in runs]
        found.append(Column(where or "last", measure, title, _numbers(last)))
    return found


def _numbers(values: Sequence[float | None]) -> list[Cell]:
    known = [value for value in map(_finite, values) if value is not None]
    low, high = min(known, default=0), max(known, default=0)
    cells = []
    for value in values:
        key = _finite(value)
        share = None if key is None or low == high else (key - low) / (high - low)
        cells.append(Cell() if value is None else Cell(number(value), key, share))
    return cells


def _finite(value: Any) -> float | None:
    """Return a finite number; None for values that cannot be sorted."""
    return float(value) if value is not None and isfinite(value) else None

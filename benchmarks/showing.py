"""The tables and the plot of the measurements."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from measuring import Timing

MB = 1e6
COLORS = {"vitx": "#d1495b", "reference": "#66788a", "peer": "#c3ccd6"}
LEGEND = {"vitx": "vitx", "reference": "reference", "peer": "other ways"}


@dataclass
class Row:
    """The measurements of one contender in one case.

    Attributes:
        timing: relative to the forward pass.
        over_forward: bytes of peak memory beyond the forward pass, or an error; None if not measured.
        over_backward: the same beyond forward and backward.
    """

    timing: Timing
    over_forward: int | str | None = None
    over_backward: int | str | None = None


Rows = Mapping[str, Row]


@dataclass(frozen=True)
class Panel:
    """One part of the plot.

    Attributes:
        title: the text above it.
        unit: the format of each value with its unit, such as "{:.2f}×".
        origin: the value at which bars begin.
        values: by contender; None if it failed.
        factors: whether the axis shows factors, not amounts.
    """

    title: str
    unit: str
    origin: float
    values: Mapping[str, float | None]
    factors: bool


def set_apart(name: str) -> str:
    """Return a name, in bold if it is vitx's own."""
    return f"**{name}**" if name.startswith("vitx") else name


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with its first column left-aligned, and without empty columns."""
    lines = list(lines)
    full = [index for index in range(len(head)) if any(line[index] for line in lines)]
    rule = ["---" if index == 0 else "---:" for index in range(len(head))]
    rows = [[line[index].replace("|", "\\|") for index in full] for line in (head, rule, *lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def megabytes(value: int | str | None) -> str:
    """Return a table cell: an amount, an error, or nothing."""
    if isinstance(value, str):
        return f"fails: {value}"
    return "" if value is None else f"{value / MB:,.0f} MB"


def case_table(rows: Rows) -> str:
    """Return the table of one case."""
    lines = []
    for name, row in rows.items():
        if row.timing.error:
            lines.append([name, f"fails: {row.timing.error}", "", "", ""])
            continue
        low, high = row.timing.quartiles
        spread = f"{low:.2f} to {high:.2f}" if len(row.timing.ratios) > 1 else ""
        lines.append(
            [
                set_apart(name),
                f"{row.timing.ratio:.2f}",
                spread,
                megabytes(row.over_forward),
                megabytes(row.over_backward),
            ]
        )
    head = ["", "time over forward", "quartiles", "memory over forward", "memory over forward + backward"]
    return table(head, lines)


def time_panel(title: str, rows: Rows) -> Panel:
    """Return the panel of the times of a case."""
    values = {name: None if row.timing.error else row.timing.ratio for name, row in rows.items()}
    return Panel(f"Time over the forward pass\n{title}", "{:.2f}×", 1.0, values, factors=True)


def memory_panel(title: str, rows: Rows) -> Panel:
    """Return the panel of the peak memory of a case."""
    values = {
        name: row.over_forward / MB if isinstance(row.over_forward, int) else None
        for name, row in rows.items()
    }
    return Panel(f"Peak memory over the forward pass\n{title}", "{:,.0f} MB", 10.0, values, factors=False)


def draw(panels: Sequence[Panel], groups: Mapping[str, Mapping[str, str]], path: Path, below: str) -> None:
    """Draw horizontal bars, one row for each contender, with the panels side by side.

    Args:
        panels: from left to right.
        groups: the kind of each contender, by heading and name, from top to bottom.
        path: the PNG file to write.
        below: a line about the machine, to show below the panels.
    """
    rows = [row for heading, kinds in groups.items() for row in ((heading, ""), *kinds.items())]
    figure = Figure(figsize=(2.9 + 3.5 * len(panels), 1.9 + 0.3 * len(rows)), dpi=150)
    figure.set_layout_engine("constrained", wspace=0.06)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        draw_panel(axis, panel, rows)
    axes[0].set_yticks(range(len(rows)), [name for name, _ in rows])
    axes[0].invert_yaxis()
    for label, (_, kind) in zip(axes[0].get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if kind == "vitx" else "normal")
        label.set_fontstyle("normal" if kind else "italic")
        label.set_color("black" if kind else "#66788a")
    handles = [axes[0].barh(0, 0, color=COLORS[kind], label=LEGEND[kind]) for kind in COLORS]
    axes[0].legend(handles=handles, loc="lower right", frameon=False, fontsize=9)
    figure.suptitle("What explaining a prediction costs (log scales, shorter is better)", fontweight="bold")
    below = fill(below, round(17 * figure.get_figwidth()))
    figure.supxlabel(below, fontsize=8, color="#555555", x=0.01, ha="left")
    figure.savefig(path)


def draw_panel(axis: Axes, panel: Panel, rows: Sequence[tuple[str, str]]) -> None:
    """Draw one panel. A contender that failed gets a text instead of a bar, and a heading gets nothing."""
    known = [value for value in panel.values.values() if value is not None]
    axis.set_xscale("log")
    longest = max([*known, 4 * panel.origin]) / panel.origin
    axis.set_xlim(panel.origin, panel.origin * longest**1.4)  # room for the text
    for place, (name, kind) in enumerate(rows):
        if not kind:
            continue
        value = panel.values.get(name)
        end = panel.origin if value is None else max(value, panel.origin)
        axis.barh(place, end - panel.origin, left=panel.origin, color=COLORS[kind], height=0.7)
        words = " fails" if value is None else " " + panel.unit.format(value)
        color, weight = "#999999" if value is None else "black", "bold" if kind == "vitx" else "normal"
        axis.text(end, place, words, va="center", fontsize=9, color=color, weight=weight)
    axis.set_title(panel.title, fontsize=10, loc="left")
    if panel.factors:
        axis.set_xticks([tick for tick in (1, 2, 4, 8, 16, 32, 64) if tick <= axis.get_xlim()[1]])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.0f}{'×' * panel.factors}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", color="#e6e9ed", linewidth=0.8)
    axis.set_axisbelow(True)

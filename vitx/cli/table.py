"""The table of a comparison: what differs between the runs, and what came out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from vitx.cli.curves import EXPLAINED, in_order, number, parts
from vitx.runs.hyperparameters import Setting, Value
from vitx.runs.run import Run

_SETTINGS, _LENGTH = "settings that differ", "training"  # groups
_ABSENT = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """What a column says of a run.

    Attributes:
        text: as it is shown.
        value: what it is sorted by; None where there is nothing, or no number.
        share: where a number lies between the least and the largest of its column; None of words.
    """

    text: str
    value: float | str | None
    share: float | None


@dataclass(frozen=True)
class Column:
    """One setting or number.

    Attributes:
        group: what it belongs to.
        name: what stands above it.
        title: what it is in full.
        cells: one for each run.
    """

    group: str
    name: str
    title: str
    cells: list[Cell]

    @property
    def label(self) -> str:
        """What it is called where no group stands above it."""
        return self.name if self.group in (_SETTINGS, _LENGTH) else f"{self.group} {self.name}"


def columns(runs: Sequence[Run], differing: Sequence[Setting]) -> list[Column]:
    """Returns the settings that differ, how long each run is, and the last value of each number."""
    found = [Column(_SETTINGS, one.name, one.key, _settings(one.values, len(runs))) for one in differing]
    lengths = _numbers([run.steps[-1] for run in runs])
    found.append(Column(_LENGTH, "steps", "the last step that was watched", lengths))
    tags = in_order(dict.fromkeys(tag for run in runs for tag in run.numbers))
    for tag in sorted(tags, key=lambda tag: _group_order(tag, tags)):
        where, measure = parts(tag)
        title = f"{tag}, at the end. {EXPLAINED.get(measure, '')}".strip()
        last = [next(reversed([*run.numbers.get(tag, {}).values()]), None) for run in runs]
        found.append(Column(where or "last", measure, title, _numbers(last)))
    return found


def _group_order(tag: str, tags: Sequence[str]) -> int:
    """Numbers of one group stand together, validation in front."""
    groups = list(dict.fromkeys(parts(tag)[0] for tag in sorted(tags, key=lambda tag: "val" not in tag)))
    return groups.index(parts(tag)[0])


def _settings(values: Mapping[int, Value], count: int) -> list[Cell]:
    cells = [Cell(_ABSENT, None, None)] * count
    for run, value in values.items():
        text = "none" if value is None else str(value)
        order = _finite(value) if type(value) is int or type(value) is float else text
        cells[run] = Cell(text, order, None)
    return cells


def _numbers(values: Sequence[float | None]) -> list[Cell]:
    finite = [None if value is None else _finite(value) for value in values]
    known = [value for value in finite if value is not None]
    low, span = min(known, default=0), max(known, default=0) - min(known, default=0)
    texts = [_ABSENT if value is None else number(value) for value in values]
    shares = [(value - low) / span if value is not None and span > 0 else None for value in finite]
    return [Cell(*cell) for cell in zip(texts, finite, shares, strict=True)]


def _finite(value: float) -> float | None:
    """Leaves out what has no place in an order."""
    return float(value) if isfinite(value) else None

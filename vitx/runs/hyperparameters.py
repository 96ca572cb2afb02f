"""What differs between the settings of runs."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from vitx.runs.run import Run

Value = str | int | float | bool | None

# Where a run lies and logs is no setting: its name says so.
_PLACES = re.compile(
    r"(^|\.)(logger(\..*)?|default_root_dir|dirpath|log_dir|logging_dir|output_dir|run_name|save_dir)$"
)


@dataclass(frozen=True)
class Setting:
    """A setting of all runs.

    Attributes:
        key: its names from the outermost to its own, joined by dots.
        name: as many of its last names as tell it apart.
        values: run's number -> value, of the runs that have it.
    """

    key: str
    name: str
    values: Mapping[int, Value]


def compare_settings(runs: Sequence[Run]) -> tuple[list[Setting], list[Setting]]:
    """Returns the settings that differ, and those that all runs share.

    What is said twice, as by a command line and by the model, counts once.
    """
    read = [dict(flat(_settings(run.facts))) for run in runs]
    keys = [key for key in dict.fromkeys(chain(*read)) if not _PLACES.search(key)]
    found = {key: {n: settings[key] for n, settings in enumerate(read) if key in settings} for key in keys}
    again = {
        key for key in keys for other in keys if other.endswith(f".{key}") and found[other] == found[key]
    }
    kept = [key for key in keys if key not in again]
    differing: list[Setting] = []
    shared: list[Setting] = []
    for key in kept:
        values = found[key]
        alike = len(values) == len(runs) and len({_meant(runs[n], value) for n, value in values.items()}) == 1
        (shared if alike else differing).append(Setting(key, _short(key, kept), values))
    return differing, shared


def _settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what was set in the training, and in its watch."""
    own = {key: facts[key] for key in ("model", "target") if key in facts}
    own["methods"] = {name: options or "default" for name, options in (facts.get("methods") or {}).items()}
    return {**(facts.get("settings") or {}), "vitx": {**own, "version": facts.get("vitx")}}


def flat(settings: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Value]]:
    """Names each value by the path to it.

    Example:
        >>> dict(flat({"lr": 0.1, "model": {"depth": 2, "sizes": [1, 2]}}))
        {'lr': 0.1, 'model.depth': 2, 'model.sizes': '[1, 2]'}
    """
    if isinstance(settings, Mapping) and settings:
        for key, value in settings.items():
            yield from flat(value, (*path, str(key)))
    elif isinstance(settings, list) and any(isinstance(item, Mapping | list) for item in settings):
        for place, value in enumerate(settings):
            yield from flat(value, (*path, str(place)))
    elif path:
        plain = settings is None or isinstance(settings, str | int | float)
        yield ".".join(path), settings if plain else str(settings)


def _meant(run: Run, value: Value) -> str:
    """Returns what is compared: of a path out of the run, the place that it leads to."""
    outside = isinstance(value, str) and value.startswith("../")
    return os.path.normpath(run.path / value) if outside else repr(value)  # type: ignore[operator]


def _short(key: str, keys: Sequence[str]) -> str:
    parts = key.split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if not parts[-length].isdecimal() and sum(f".{other}".endswith(f".{end}") for other in keys) == 1:
            return end
    return key

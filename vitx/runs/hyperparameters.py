"""The settings that differ between runs."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from vitx.runs.run import Run

Value = str | int | float | bool | None

# The places where a run lies and logs are no settings: its name tells them.
_PLACES = re.compile(
    r"(^|\.)(logger(\..*)?|default_root_dir|dirpath|log_dir|logging_dir|output_dir|run_name|save_dir)$"
)


@dataclass(frozen=True)
class Setting:
    """A setting of all runs."""

    key: str  # its names from the outermost to its own, joined by dots
    name: str  # as many of its last names as tell it apart
    values: Mapping[int, Value]  # run's number -> value, of the runs that have it


def compare_settings(runs: Sequence[Run]) -> tuple[list[Setting], list[Setting]]:
    """Return the settings that differ, and those that all runs share.

    A setting that is told twice, as by a command line and by the model, counts once.
    """
    read = [dict(flat(_settings(run.facts))) for run in runs]
    keys = [key for key in dict.fromkeys(chain(*read)) if not _PLACES.search(key)]
    found = {key: {n: settings[key] for n, settings in enumerate(read) if key in settings} for key in keys}
    kept = [key for key in keys if not any(o.endswith(f".{key}") and found[o] == found[key] for o in keys)]
    differing: list[Setting] = []
    shared: list[Setting] = []
    for key in kept:
        values = found[key]
        alike = len(values) == len(runs) and len({_meant(runs[n], value) for n, value in values.items()}) == 1
        (shared if alike else differing).append(Setting(key, _short(key, kept), values))
    return differing, shared


def _settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the training, and of its watch."""
    own = {key: facts[key] for key in ("model", "target") if key in facts}
    own["methods"] = {name: options or "default" for name, options in (facts.get("methods") or {}).items()}
    return {**(facts.get("settings") or {}), "vitx": {**own, "version": facts.get("vitx")}}


def flat(settings: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Value]]:
    """Names each value by the path to it: of `{"model": {"depth": 2}}`, `model.depth` is 2."""
    inner: Any = ()
    if isinstance(settings, Mapping):
        inner = settings.items()
    elif isinstance(settings, list) and any(isinstance(item, Mapping | list) for item in settings):
        inner = enumerate(settings)
    if inner:
        for key, value in inner:
            yield from flat(value, (*path, str(key)))
    elif path:
        plain = settings is None or isinstance(settings, str | int | float)
        yield ".".join(path), settings if plain else str(settings)


def _meant(run: Run, value: Value) -> str:
    """Return what is compared: of a path out of the run, the place that it leads to."""
    if isinstance(value, str) and value.startswith("../"):
        return os.path.normpath(run.path / value)
    return repr(value)


def _short(key: str, keys: Sequence[str]) -> str:
    parts = key.split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if not parts[-length].isdecimal() and sum(f".{other}".endswith(f".{end}") for other in keys) == 1:
            return end
    return key

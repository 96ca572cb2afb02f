"""What differs between the settings of runs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Value = str | int | float | bool | None

_PLACES = {"default_root_dir", "log_dir", "logging_dir", "output_dir", "run_name", "save_dir"}


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


def compare_settings(runs: Sequence[Mapping[str, Any]]) -> tuple[list[Setting], list[Setting]]:
    """Returns the settings that differ, and those that all runs share.

    Where a run lies is no setting: its name says so.

    Args:
        runs: the settings of each, nested.
    """
    read = [dict(flat(settings)) for settings in runs]
    keys = list(dict.fromkeys(key for settings in read for key in settings))
    kept = [key for key in keys if key.rpartition(".")[2] not in _PLACES]
    settings = [
        Setting(key, _short(key, kept), {n: of_run[key] for n, of_run in enumerate(read) if key in of_run})
        for key in kept
    ]
    differing = [setting for setting in settings if _differs(setting.values, len(runs))]
    return differing, [setting for setting in settings if setting not in differing]


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


def _differs(values: Mapping[int, Value], count: int) -> bool:
    return len(values) < count or len({repr(value) for value in values.values()}) > 1


def _short(key: str, keys: Sequence[str]) -> str:
    parts = key.split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if not parts[-length].isdecimal() and sum(f".{other}".endswith(f".{end}") for other in keys) == 1:
            return end
    return key

"""What differs between the settings of runs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from vitx.runs.run import Run

Value = str | int | float | bool | None


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

    What a logger says twice counts once, and where a run lies is no setting: its name says so.
    """
    read = [dict(pair for parsed in _parsed(run.config) for pair in _flat(parsed)) for run in runs]
    keys = list(dict.fromkeys(key for settings in read for key in settings))
    found = {key: {n: settings[key] for n, settings in enumerate(read) if key in settings} for key in keys}
    found = {key: values for key, values in found.items() if not _is_place(key, values, runs)}
    kept = [key for key in found if not any(_repeats(key, other, found) for other in found)]
    settings = [Setting(key, _short(key, kept), found[key]) for key in kept]
    differing = [setting for setting in settings if _differs(setting.values, len(runs))]
    return differing, [setting for setting in settings if setting not in differing]


def _parsed(config: Mapping[str, str]) -> Iterator[Any]:
    for text in config.values():
        try:
            yield yaml.load(text, _Lenient)
        except yaml.YAMLError:
            continue


class _Lenient(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Reads what Python's objects became as what they were made of."""


def _plain(loader: Any, _: str, node: Any) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)


_Lenient.add_multi_constructor("", _plain)


def _flat(parsed: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Value]]:
    """Names each value by the path to it."""
    if isinstance(parsed, Mapping) and parsed:
        for key, value in parsed.items():
            yield from _flat(value, (*path, str(key)))
    elif isinstance(parsed, list) and any(isinstance(item, Mapping | list) for item in parsed):
        for place, value in enumerate(parsed):
            yield from _flat(value, (*path, str(place)))
    elif path:
        plain = parsed is None or isinstance(parsed, str | int | float)
        yield ".".join(path), parsed if plain else str(parsed)


def _differs(values: Mapping[int, Value], count: int) -> bool:
    return len(values) < count or len({repr(value) for value in values.values()}) > 1


def _is_place(key: str, values: Mapping[int, Value], runs: Sequence[Run]) -> bool:
    """Whether a setting of the trainer says where each run lies: it is a part of the path, as of a logger."""
    texts = [(str(runs[n].path), value) for n, value in values.items() if isinstance(value, str) and value]
    inside = all(value.strip("./") in path for path, value in texts)
    return key.startswith("trainer.") and len(texts) == len(values) and inside and _differs(values, len(runs))


def _repeats(key: str, other: str, found: Mapping[str, Mapping[int, Value]]) -> bool:
    """Whether a setting is said again under a longer name, as hparams.yaml says what config.yaml does."""
    return other.endswith(f".{key}") and found[other] == found[key]


def _short(key: str, keys: Sequence[str]) -> str:
    parts = key.split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if not parts[-length].isdecimal() and sum(f".{other}".endswith(f".{end}") for other in keys) == 1:
            return end
    return key

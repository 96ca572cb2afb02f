"""Comparison of runs: the settings that differ, and the images that several watch by the same methods."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitx.runs.run import Run

Value = str | int | float | bool | None

_THUMBNAIL = 16, 16  # pixels
_TOLERANCE = 12  # of 255: a picture that was resized or encoded again differs slightly
# The paths of a run and its logs are not compared as settings: its name identifies them.
_PLACES = re.compile(
    r"(^|\.)(logger(\..*)?|default_root_dir|dirpath|log_dir|logging_dir|output_dir|run_name|save_dir)$"
)


@dataclass(frozen=True)
class Setting:
    """A setting of the compared runs."""

    key: str  # its full name: the path to it in the nested settings, joined by dots
    name: str  # the shortest end of the key that is unique
    values: Mapping[int, Value]  # run's number -> value, for the runs that have it


def compare_settings(runs: Sequence[Run]) -> tuple[list[Setting], list[Setting]]:
    """Return the settings that differ, and those that all runs share; of copies, the longest key is kept."""
    read = [dict(flat(_settings(run.facts))) for run in runs]
    keys = [key for key in dict.fromkeys(chain(*read)) if not _PLACES.search(key)]
    found = {key: {n: settings[key] for n, settings in enumerate(read) if key in settings} for key in keys}
    kept = [key for key in keys if not any(o.endswith(f".{key}") and found[o] == found[key] for o in keys)]
    differing, shared = list[Setting](), list[Setting]()
    for key in kept:
        values = found[key]
        alike = len(values) == len(runs) and len({_meant(runs[n], value) for n, value in values.items()}) == 1
        (shared if alike else differing).append(Setting(key, _short(key, kept), values))
    return differing, shared


def _settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: facts[key] for key in ("model", "target") if key in facts}
    own["methods"] = {name: options or "default" for name, options in (facts.get("methods") or {}).items()}
    return {**(facts.get("settings") or {}), "vitx": {**own, "version": facts.get("vitx")}}


def flat(settings: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Value]]:
    """Yield (key, value) pairs of nested settings: for `{"model": {"depth": 2}}`, `model.depth` and 2."""
    nested = isinstance(settings, list) and any(isinstance(item, Mapping | list) for item in settings)
    inner: Any = settings.items() if isinstance(settings, Mapping) else enumerate(settings) if nested else ()
    for key, value in inner:
        yield from flat(value, (*path, str(key)))
    if path and not inner:
        plain = settings is None or isinstance(settings, str | int | float)
        yield ".".join(path), settings if plain else str(settings)


def _meant(run: Run, value: Value) -> str:
    """Return a value in the form to compare; a path that leaves the run's folder is resolved."""
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


@dataclass(frozen=True)
class Meeting:
    """Images that the same runs watch by the same methods."""

    titles: tuple[str, ...]  # of their methods, sorted
    note: str  # the words below their maps
    images: list[dict[int, int]]  # for each image, run's number -> the image's number in that run

    @property
    def runs(self) -> list[int]:
        """The numbers of the runs."""
        return list(self.images[0])


def meetings(runs: Sequence[Run]) -> list[Meeting]:
    """Group images by the runs and methods that watch them; those that most runs watch come first."""
    known: dict[Any, list[tuple[NDArray[np.int16], dict[int, int]]]] = {}
    for number, run in enumerate(runs):
        for image in range(run.count):
            picture = run.pixels[image]
            small = Image.fromarray(picture).resize(_THUMBNAIL, Image.Resampling.BOX)
            thumbnail = np.asarray(small, np.int16)
            aspect = round(16 * picture.shape[0] / picture.shape[1])
            # Only maps by the same methods are compared.
            alike = known.setdefault((tuple(sorted(run.titled)), run.facts["note"], aspect), [])
            for seen, watched in alike:
                if number not in watched and np.abs(seen - thumbnail).max() <= _TOLERANCE:
                    watched[number] = image
                    break
            else:
                alike.append((thumbnail, {number: image}))
    found: dict[tuple[int, ...], Meeting] = {}
    for (titles, note, _), alike in known.items():
        for _, images in alike:
            found.setdefault(tuple(images), Meeting(titles, note, [])).images.append(images)
    return sorted(found.values(), key=lambda meeting: (-len(meeting.runs), meeting.runs))

"""What a run of training left behind in its folder."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vitx.errors import VitxError
from vitx.runs import FOLDER, GRIDS
from vitx.runs.events import EVENT_FILES, Curve, Events, read_events
from vitx.runs.playback import FromGrids, FromMaps, Picture, Playback
from vitx.runs.saved import damaged, load_maps

_CONFIGS = ("config.yaml", "hparams.yaml")
_ACCURACY = re.compile(r"acc(uracy)?(/dataloader_idx_0)?$", re.IGNORECASE)
_GRID_FILES = f"{GRIDS.replace('/', '-')}-*.png"  # where no logger takes pictures
_TRACES = (EVENT_FILES, f"{FOLDER}/maps-*.npz", f"{FOLDER}/{_GRID_FILES}")


@dataclass(frozen=True)
class Run:
    """A run of training.

    Attributes:
        folder: where it logged.
        playback: its images at each firing.
        scalars: tag -> curve.
        config: file name -> text, of those that Lightning writes.
    """

    folder: Path
    playback: Playback
    scalars: Mapping[str, Curve]
    config: Mapping[str, str]

    def accuracy(self, step: int) -> float | None:
        """Returns the accuracy in validation at a step, or the last before it; None where there is none."""
        curve = self.scalars.get(accuracy_tag(self.scalars) or "")
        return None if curve is None else curve.at(step)

    def heading(self, firing: int) -> str:
        """Says where in the training a firing is, as `step 437, accuracy 91%`."""
        step = self.playback.steps[firing]
        accuracy = self.accuracy(step)
        return f"step {step}" if accuracy is None else f"step {step}, accuracy {_percent(accuracy)}"


def open_run(folder: Path) -> Run:
    """Reads a run from its folder, or from one that holds no other.

    Raises:
        VitxError: There is no run, or more than one, or none with pictures, or a file is damaged.
    """
    folder = _find(Path(folder))
    saved = load_maps(folder / FOLDER)
    logged = any(folder.glob(EVENT_FILES))
    events = read_events(folder, grids=saved is None) if logged else Events({}, {})
    if saved is not None:
        playback: Playback = FromMaps(saved)
    elif grids := events.grids or _grid_files(folder / FOLDER):
        playback = FromGrids(grids, _methods(events.scalars))
    else:
        raise VitxError(
            f"{folder} holds no pictures to play back: RolloutCallback was not there, or wrote to another "
            "logger; its save_maps=True keeps them in the folder"
        )
    configs = [folder / name for name in _CONFIGS if (folder / name).is_file()]
    config = {path.name: path.read_text("utf-8", "replace") for path in configs}
    return Run(folder, playback, events.scalars, config)


def accuracy_tag(tags: Iterable[str]) -> str | None:
    """Chooses the tag that is most likely the accuracy in validation.

    Example:
        >>> accuracy_tag(["train/accuracy", "val_clean/accuracy", "val/accuracy", "val/loss"])
        'val/accuracy'
        >>> accuracy_tag(["valid_top1_acc", "train_acc"]), accuracy_tag(["train_acc"])
        ('valid_top1_acc', None)
    """
    found = [tag for tag in tags if "val" in tag.lower() and _ACCURACY.search(tag)]
    return min(found, key=len, default=None)


def names_apart(folders: Sequence[Path]) -> list[str]:
    """Names runs by the part of their folders' paths that tells them apart.

    Example:
        >>> names_apart([Path("logs/demo/version_0"), Path("logs/shortcut/version_0")])
        ['demo', 'shortcut']
        >>> names_apart([Path("logs/demo/version_0"), Path("logs/demo/version_1")])
        ['version_0', 'version_1']
        >>> names_apart([Path("logs/demo/version_0")])
        ['demo/version_0']
    """
    whole = [list(folder.resolve().parts) for folder in folders]
    apart = [list(parts) for parts in whole]
    for end in (0, -1):
        while all(apart) and len({parts[end] for parts in apart}) == 1:
            for parts in apart:
                parts.pop(end)
    return ["/".join(part or full[-2:]) for part, full in zip(apart, whole, strict=True)]


def _find(folder: Path) -> Path:
    """Returns the one run in a folder: itself, or one below."""
    if not folder.is_dir():
        raise VitxError(f"there is no folder {folder}: give that of a run, such as logs/demo/version_0")
    if any(any(folder.glob(trace)) for trace in _TRACES):
        return folder
    events, maps, pictures = (folder.rglob(trace) for trace in _TRACES)
    found = {path.parent for path in events} | {path.parents[1] for path in (*maps, *pictures)}
    if not found:
        raise VitxError(f"{folder} holds neither event files nor saved maps: it is no folder of a run")
    if len(found) > 1:
        some = ", ".join(map(str, sorted(found)[:8]))
        raise VitxError(f"{folder} holds {len(found)} runs: give one of {some}{', ...' * (len(found) > 8)}")
    return found.pop()


def _methods(tags: Iterable[str]) -> list[str]:
    """Returns the methods that scalars were logged of, in the order of the grid's columns."""
    return [tag.split("/")[1] for tag in tags if re.fullmatch("vitx/[^/]+/entropy", tag)]


def _grid_files(folder: Path) -> dict[int, Picture]:
    """Reads the grids that the callback wrote where no logger takes pictures."""
    found = {}
    for path in folder.glob(_GRID_FILES):
        try:
            found[int(path.stem.rsplit("-", 1)[1])] = np.asarray(Image.open(path).convert("RGB"))
        except (OSError, ValueError) as error:
            raise damaged(path, error) from error
    return found


def _percent(accuracy: float) -> str:
    """Some log shares, some log percent."""
    return f"{accuracy:.0%}" if accuracy <= 1 else f"{accuracy:.0f}%"

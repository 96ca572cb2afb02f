"""Finds the saved maps of a run whose logger has no folder for each run, as those of W&B and MLflow.

Nothing but the pictures says whose they are: the grid that the maps draw must be the one that was logged.
"""

import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vitx.errors import VitxError
from vitx.runs import FOLDER
from vitx.runs.playback import FromGrids, FromMaps
from vitx.runs.saved import SavedMaps, load_maps

_ALIKE = 1  # of 255, on average: fonts differ a little from version to version


class Claims:
    """Folders and zip files of maps, and which of them are some run's own.

    Attributes:
        taken: those that are, as whole paths.
    """

    def __init__(self) -> None:
        self.taken: set[Path] = set()
        self._loaded: dict[Path, SavedMaps | None] = {}

    def claim(self, grids: Mapping[int, bytes], beside: Sequence[Path], place: Path) -> SavedMaps | None:
        """Returns the maps that the logged grids were drawn from, if they are there, and takes them.

        Args:
            grids: step -> the grid that was logged there.
            beside: folders of maps that may be the run's own; those put aside in zip files beside them, too.
            place: of the run.
        """
        for path in _candidates(beside):
            if path not in self._loaded:
                self._loaded[path] = _load(path)
            saved = self._loaded[path]
            if path not in self.taken and saved is not None and _drew(saved, grids, place):
                self.taken.add(path)
                return saved
        return None


def _candidates(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        yield folder
        yield from sorted(folder.parent.glob(f"{FOLDER}-*.zip"))


def _load(path: Path) -> SavedMaps | None:
    """Loads maps from a folder or a zip file; what is damaged is nobody's."""
    try:
        if path.suffix != ".zip":
            return load_maps(path)
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)
            return load_maps(Path(folder))
    except (VitxError, OSError, zipfile.BadZipFile):
        return None


def _drew(saved: SavedMaps, grids: Mapping[int, bytes], place: Path) -> bool:
    """Whether these maps give the picture that was logged at the last step that both have."""
    step = max(set(saved.steps) & set(grids), default=None)
    if step is None:
        return False
    drawn, logged = FromMaps(saved), FromGrids({step: grids[step]}, (), place)
    firing = saved.steps.index(step)
    if drawn.count != logged.count:
        return False
    for images in ([0], range(drawn.count)):  # one settles most cases
        one, other = drawn.grid(firing, images), logged.grid(0, images)
        if one.shape != other.shape or np.abs(one.astype(int) - other).mean() > _ALIKE:
            return False
    return True

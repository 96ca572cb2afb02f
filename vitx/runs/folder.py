"""The folder of a run, claimed by a single training and written while it runs.

In the folder `vitx` of a run, `run.json` has facts about the training and its watch, `images-STEP.npz` the
images watched from a step on, `firing-STEP.npz` the maps by name of the method, logits and sinks, and
`numbers.csv` a line for each firing. Each file is complete or missing, even if the training is killed.
"""

import csv
import io
import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO, Any
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from vitx.files import savez, write_atomically
from vitx.runs import FACTS, FIRING, FOLDER, IMAGES, NUMBERS
from vitx.runs.masking import masked
from vitx.version import __version__

if sys.platform != "win32":
    import fcntl

Row = Mapping[str, Any]
Arrays = Mapping[str, NDArray[Any]]

_TOLERANCE = 4  # of 255, on average


class RunFolder:
    """The folder `vitx` of one run, to which no other run writes."""

    def __init__(self, path: Path, facts: Mapping[str, Any], lock: IO[str]) -> None:
        self.path, self.id, self._facts, self._lock = path, str(facts["id"]), dict(facts), lock

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy, without the lock, which belongs to this process."""
        return {**vars(self), "_lock": io.StringIO()}

    @classmethod
    def claim(cls, wanted: Path | None, root: Path) -> "RunFolder":
        """Claim the folder `vitx` of the wanted run, by default `version_0`, or of the next free number."""
        (wanted or root).mkdir(parents=True, exist_ok=True)
        for run in _candidates(wanted or root / "version_0"):
            with suppress(FileExistsError):  # it exists, or another process has just made it
                if wanted is None or run != wanted.absolute():
                    run.mkdir()
                path = run / FOLDER
                path.mkdir()
                break
        try:
            folder = cls(path, {"id": uuid4().hex, "vitx": __version__}, _locked(path))
            folder.write_facts({})
        except OSError:  # such as a full disk
            shutil.rmtree(path)
            with suppress(OSError):  # it is not empty
                path.parent.rmdir()
            raise
        return folder

    @classmethod
    def reopen(cls, path: Path, run_id: str) -> "RunFolder | None":
        """Return the folder of an interrupted run; None if it is gone, or another process has locked it."""
        facts = read_facts(path)
        with suppress(BlockingIOError, PermissionError):
            if facts is not None and facts["id"] == run_id:
                return cls(path, facts, _locked(path))
        return None

    def go_on(self, step: int) -> "RunFolder":
        """Delete what the interrupted run wrote at a step and later, and return this folder.

        An ended run with such firings stays as it is: return a new folder with a copy of what came before.
        """
        images, firings = (files_of(self.path, kind) for kind in (IMAGES, FIRING))
        stays = self._facts.get("ended") and any(at >= step for at in firings)
        folder = RunFolder.claim(self.path.parent, self.path.parent) if stays else self
        for at, path in (*images.items(), *firings.items()):
            if stays and at < step:
                shutil.copy2(path, folder.path)
            elif not stays and at >= step:
                path.unlink()
        folder._write_rows(row for row in read_rows(self.path) if int(row["step"]) < step)
        if not stays:
            self.write_facts({"ended": False})
        return folder

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Add facts to `run.json`, masked except for class names, which may look like paths."""
        names = {key: facts[key] for key in ("class_names",) if key in facts}
        self._facts |= masked(facts, self.path.parent) | names
        said = json.dumps(self._facts, indent=1, ensure_ascii=False)
        write_atomically(self.path / FACTS, lambda file: file.write(said.encode()))

    def write_images(self, step: int, arrays: Arrays) -> None:
        """Write the images that are watched from a step on; the same images as before replace their file.

        The arrays are `pixels`, (n, H, W, 3) uint8, or (n, T, H, W, 3) for clips; `shown`, (n,), the index
        of each among the maps of a firing; and `labels`, one for each of these maps, if known.
        """
        for since, path in [*files_of(self.path, IMAGES).items()][-1:]:
            step = since if _same(path, arrays) else step  # more may be known about them now
        self._write(IMAGES, step, arrays)

    def write_firing(self, step: int, arrays: Arrays) -> None:
        """Write the maps of each method, (n, h, w), or (n, t, h, w) for clips, and `logits`, (n, ...)."""
        self._write(FIRING, step, arrays)

    def write_numbers(self, row: Row) -> None:
        """Add a line to the numbers, `step` first; a line for the same step as the last is merged into it."""
        rows = read_rows(self.path)
        if rows and int(rows[-1]["step"]) == row["step"]:
            row = {**rows.pop(), **row}
        self._write_rows([*rows, row])

    def end(self) -> None:
        """Record that the training has ended, and release the folder."""
        self.write_facts({"ended": True})
        self.close()

    def close(self) -> None:
        """Release the folder, so that others can continue in it."""
        self._lock.close()

    def _write(self, kind: str, step: int, arrays: Arrays) -> None:
        write_atomically(self.path / f"{kind}-{step:06d}.npz", lambda file: savez(file, arrays))

    def _write_rows(self, rows: Iterable[Row]) -> None:
        """Rewrite the whole table, as there may be new columns and no line may be incomplete."""
        rows, text = list(rows), io.StringIO(newline="")
        table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        table.writeheader()
        table.writerows(rows)
        write_atomically(self.path / NUMBERS, lambda file: file.write(text.getvalue().encode()))


def files_of(folder: Path, kind: str) -> dict[int, Path]:
    """Return step -> file for the firings or the images, in order."""
    files = {path.stem.partition("-")[2]: path for path in folder.glob(f"{kind}-*.npz")}
    return dict(sorted((int(step), path) for step, path in files.items() if step.isdecimal()))


def _candidates(first: Path) -> Iterator[Path]:
    """Yield a folder, then numbered ones next to it, or in it if it contains the working directory."""
    first = first.absolute()
    yield first
    numbered = re.fullmatch(r"version_(\d+)", first.name)
    inside = not numbered and Path.cwd().is_relative_to(first)
    for number in count(int(numbered[1]) + 1 if numbered else 1):
        name = f"version_{number}" if numbered or inside else f"{first.name}-{number}"
        yield (first if inside else first.parent) / name


def _locked(folder: Path) -> IO[str]:
    """Lock the folder until this process ends, or raise an OSError if another process has locked it.

    Forked processes, such as the workers of a loader, do not keep such a lock. Windows has none.
    """
    file = (folder / ".lock").open("a")
    if sys.platform != "win32":
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise
        except OSError:  # a file system without locks
            pass
    return file


def read_facts(folder: Path) -> dict[str, Any] | None:
    """Read `run.json`; return None if it is missing, unreadable, or from another program."""
    try:
        facts = json.loads((folder / FACTS).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and "id" in facts else None


def read_rows(folder: Path) -> list[Row]:
    """Read the numbers as text, so that they are written back unchanged."""
    with suppress(FileNotFoundError), (folder / NUMBERS).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
    return []


def _same(path: Path, arrays: Arrays) -> bool:
    """Return whether a file holds these images, up to differences between versions of a decoder."""
    with suppress(OSError, ValueError, KeyError, BadZipFile), np.load(path, allow_pickle=False) as before:
        one, other = (held["pixels"].astype(np.int16) for held in (before, arrays))
        alike = one.shape == other.shape and np.abs(one - other).mean() < _TOLERANCE
        return bool(alike) and np.array_equal(before["shown"], arrays["shown"])
    return False

"""The folder of a run: taken by one training alone, and written while it runs.

In the folder `vitx` of a run, `run.json` has the facts of the training and of its watch, `images-STEP.npz`
the images watched from a step on, `firing-STEP.npz` the maps of each method, by its name, logits and sinks,
and `numbers.csv` a line for each firing. Each file is whole, or not there, also if the training is killed.
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
    """The folder `vitx` of one run, which no other run writes to."""

    def __init__(self, path: Path, facts: Mapping[str, Any], lock: IO[str]) -> None:
        self.path, self._facts, self._lock = path, dict(facts), lock

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: without the lock, which belongs to this process."""
        return {**vars(self), "_lock": io.StringIO()}

    @property
    def id(self) -> str:
        """The name of the run, unlike that of any other."""
        return str(self._facts["id"])

    @classmethod
    def claim(cls, wanted: Path | None, root: Path) -> "RunFolder":
        """Take the folder `vitx` of the wanted run, by default `version_0`, or of the next free number."""
        (wanted or root).mkdir(parents=True, exist_ok=True)
        for run in _candidates(wanted or root / "version_0"):
            with suppress(FileExistsError):  # of several processes that start at once, one makes it
                if wanted is None or run != wanted.absolute():
                    run.mkdir()
                path = run / FOLDER
                path.mkdir()
                break
        try:
            folder = cls(path, {"id": uuid4().hex, "vitx": __version__}, _locked(path))
            folder.write_facts({})
        except OSError:  # as where the disk is full
            shutil.rmtree(path)
            with suppress(OSError):  # it holds something else
                path.parent.rmdir()
            raise
        return folder

    @classmethod
    def reopen(cls, path: Path, run_id: str) -> "RunFolder | None":
        """Take up the folder of an interrupted run; None where it is gone, or another process has it."""
        facts = read_facts(path)
        if facts is None or facts.get("id") != run_id:
            return None
        try:
            return cls(path, facts, _locked(path))
        except (BlockingIOError, PermissionError):
            return None

    def go_on(self, step: int) -> "RunFolder":
        """Forget what the interrupted run wrote at a step and later, and return this folder.

        What an ended run wrote stays: then it is a new one beside it, with what was before.
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
        """Add to `run.json`, without secrets; the name of a class may look like a path."""
        names = {key: facts[key] for key in ("class_names",) if key in facts}
        self._facts |= masked(facts, self.path.parent) | names
        said = json.dumps(self._facts, indent=1, ensure_ascii=False)
        write_atomically(self.path / FACTS, lambda file: file.write(said.encode()))

    def write_images(self, step: int, arrays: Arrays) -> None:
        """Write the images that are watched from a step on; the same ones as before take their place.

        They are `pixels`, (n, H, W, 3) uint8, or of clips (n, T, H, W, 3); `shown`, (n,), the place of each
        among the maps of a firing; and `labels` of all of these, if they are known.
        """
        for since, path in [*files_of(self.path, IMAGES).items()][-1:]:
            step = since if _same(path, arrays) else step  # more may be known of the same ones now
        self._write(IMAGES, step, arrays)

    def write_firing(self, step: int, arrays: Arrays) -> None:
        """Write the maps of each method, (n, h, w) or of clips (n, t, h, w), and `logits` (n, ...)."""
        self._write(FIRING, step, arrays)

    def write_numbers(self, row: Row) -> None:
        """Add a line to the numbers, `step` first; one of the last step again takes its place."""
        rows = read_rows(self.path)
        if rows and int(rows[-1]["step"]) == row["step"]:
            row = {**rows.pop(), **row}
        self._write_rows([*rows, row])

    def end(self) -> None:
        """Write that the training has come to its end."""
        self.write_facts({"ended": True})
        self.close()

    def close(self) -> None:
        """Let others go on in the folder."""
        self._lock.close()

    def _write(self, kind: str, step: int, arrays: Arrays) -> None:
        write_atomically(self.path / f"{kind}-{step:06d}.npz", lambda file: savez(file, arrays))

    def _write_rows(self, rows: Iterable[Row]) -> None:
        """Write the table anew, as other numbers may come in and no line may be half there."""
        rows, text = list(rows), io.StringIO(newline="")
        table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        table.writeheader()
        table.writerows(rows)
        write_atomically(self.path / NUMBERS, lambda file: file.write(text.getvalue().encode()))


def files_of(folder: Path, kind: str) -> dict[int, Path]:
    """Return step -> file of the firings or of the images, in order."""
    files = {path.stem.partition("-")[2]: path for path in folder.glob(f"{kind}-*.npz")}
    return dict(sorted((int(step), path) for step, path in files.items() if step.isdecimal()))


def _candidates(first: Path) -> Iterator[Path]:
    """Yield a folder, then numbered ones beside it; in it, where beside it is outside of the project."""
    first = first.absolute()
    yield first
    numbered = re.fullmatch(r"version_(\d+)", first.name)
    for number in count(int(numbered[1]) + 1 if numbered else 1):
        if numbered:
            yield first.with_name(f"version_{number}")
        elif Path.cwd().is_relative_to(first):
            yield first / f"version_{number}"
        else:
            yield first.with_name(f"{first.name}-{number}")


def _locked(folder: Path) -> IO[str]:
    """Lock the folder for this process, until it ends or is killed, or raise an OSError: another has it.

    A forked process, as of a loader, does not hold on to a lock of this kind. Windows has none.
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
    """Read `run.json`; None where there is none, or another program's."""
    try:
        facts = json.loads((folder / FACTS).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and "id" in facts else None


def read_rows(folder: Path) -> list[Row]:
    """Read the numbers as text, which is written as it was."""
    path = folder / NUMBERS
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _same(path: Path, arrays: Arrays) -> bool:
    """Return whether a file holds these images, but for changes by another version of a decoder."""
    with suppress(OSError, ValueError, KeyError, BadZipFile), np.load(path, allow_pickle=False) as before:
        one, other = (held["pixels"].astype(np.int16) for held in (before, arrays))
        alike = one.shape == other.shape and np.abs(one - other).mean() < _TOLERANCE
        return bool(alike) and np.array_equal(before["shown"], arrays["shown"])
    return False

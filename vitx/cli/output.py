"""The output folder of `vitx explain`: the files of each picture, and which pictures are finished."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from vitx.cli.findings import Product
from vitx.errors import VitxError
from vitx.files import PICTURES, write_or_say
from vitx.inputs.reading import whole_path

_SETTINGS = "vitx.json"
_ALL = "explanations.jsonl"


class Output:
    """A folder with the files of each picture, named as the picture is.

    Args:
        folder: made if need be.
        files: the pictures; their places below the folder that holds them all are kept.
        product: the files of each.
        settings: of the run, as text.
        sharded: keep the maps of many pictures in one file.
    """

    def __init__(
        self, folder: Path, files: Sequence[Path], product: Product, settings: str, sharded: bool = False
    ) -> None:
        self.folder, self.files, self.product, self.settings = folder, files, product, settings
        self.sharded, self.shards = sharded, folder / "shards"
        self._note = folder / _SETTINGS
        self._in_shards: set[str] = set()
        self._earlier: bytes | None = None
        self._above: Path | None = None
        with suppress(ValueError):  # there are no pictures, or they are on several drives
            self._above = Path(os.path.commonpath({str(whole_path(file).parent) for file in files}))

    def check(self, resume: bool) -> None:
        """Raise a VitxError if the folder holds files that do not go with those to come."""
        if self.sharded and not resume and any(self.shards.glob("*.npz")):
            raise VitxError(
                f"{self.shards} holds maps of an earlier run: continue it with --resume, or use another "
                "--output"
            )
        self._earlier = self._note.read_bytes() if self._note.is_file() else None
        if resume and self._earlier not in (None, self.settings.encode()):
            raise VitxError(
                f"the maps in {self.folder} were made with other options or another model, see {self._note}: "
                "use another --output, or leave out --resume"
            )

    def begin(self, files: Sequence[Path], speaks: bool = True) -> None:
        """Write the settings, and remove what an earlier run with others made of these pictures.

        A run that is stopped and continued would take that for its own.

        Args:
            files: those that this process explains.
            speaks: for all processes.

        Raises:
            VitxError: The folder cannot be written to.
        """
        if self._earlier not in (None, self.settings.encode()):
            for file in files:
                for suffix in (".npz", ".json", *PICTURES):
                    (self.folder / f"{self.name(file)}{suffix}").unlink(missing_ok=True)
        if speaks:
            write_or_say(self._note, lambda opened: opened.write(self.settings.encode()))

    def take_back(self) -> None:
        """Leave the folder as it was before `begin`: nothing was found."""
        if self._earlier is not None:
            self._note.write_bytes(self._earlier)
            return
        self._note.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def name(self, file: Path) -> str:
        """Return the name of a picture in the folder: its place below the folder that holds all."""
        place = whole_path(file)
        within = place.relative_to(self._above) if self._above else Path(*place.parts[1:])
        return within.as_posix()

    def paths(self, file: Path) -> list[Path]:
        """Return the files of a picture, one for each kind of the product."""
        name = self.name(file)
        return [self.folder / f"{name}{kind}" for kind in self.product.kinds]

    def left(self) -> list[Path]:
        """Return the pictures that are not finished: each file is whole, as it was written at once.

        Raises:
            VitxError: A shard cannot be read.
        """
        self._in_shards = self._read_shards() if self.sharded else set()
        return [
            file
            for file in self.files
            if self.wants_shard(file) or not all(path.is_file() for path in self.paths(file))
        ]

    def wants_shard(self, file: Path) -> bool:
        """Return whether the maps of a picture are still to go into a shard."""
        return self.sharded and self.name(file) not in self._in_shards

    def _read_shards(self) -> set[str]:
        names: set[str] = set()
        for path in self.shards.glob("*.npz"):
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    names.update(arrays["files"].tolist())
            except (OSError, ValueError, KeyError, BadZipFile) as error:
                raise VitxError(f"{path} cannot be read: remove it, or use another --output") from error
        return names

    def join_json(self) -> None:
        """Join the JSON of all pictures in one file, a line for each."""
        names = [path for file in self.files for path in self.paths(file) if path.suffix == ".json"]
        lines = [path.read_bytes() + b"\n" for path in names if path.is_file()]
        if lines:
            write_or_say(self.folder / _ALL, lambda opened: opened.writelines(lines))

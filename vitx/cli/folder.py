"""The output folder of `vitx explain`: the files of each picture, and which pictures are finished."""

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitx.cli.findings import Finding, Product
from vitx.errors import VitxError, failure
from vitx.files import PICTURES, write_or_say, write_png
from vitx.inputs.reading import whole_path
from vitx.pictures.render import Picture


def linked(path: Path) -> str:
    """Return a path as a hyperlink for a terminal, or unchanged elsewhere."""
    if not sys.stdout.isatty() or os.environ.get("TERM") in (None, "dumb"):
        return str(path)
    return f"\033]8;;{path.resolve().as_uri()}\033\\{path}\033]8;;\033\\"


def write_and_say(path: Path, picture: Picture) -> int:
    """Write the picture of a command as PNG, print its path, and return the exit status."""
    write_png(path, picture)
    print(f"see {linked(path)}")
    return 0


class Output:
    """A folder with files of each picture, the settings of the run and, if sharded, files of many maps."""

    def __init__(
        self, folder: Path, files: Sequence[Path], product: Product, settings: str, sharded: bool = False
    ) -> None:
        self.folder, self.files, self.product, self.sharded = folder, files, product, sharded
        self._shards, self._in_shards = folder / "shards", set[str]()
        self._note, self._settings = folder / "vitx.json", settings.encode()
        self._others = self._note.is_file() and self._note.read_bytes() != self._settings
        self._above = os.path.commonpath({whole_path(file).parent for file in files})

    def begin(self, files: Sequence[Path], speaks: bool) -> None:
        """Delete files of these pictures from a run with other settings, which a resumed one would keep.

        Only the process that `speaks` writes the settings.
        """
        for file in files if self._others else ():
            for suffix in (".npz", ".json", *PICTURES):
                (self.folder / f"{self.name(file)}{suffix}").unlink(missing_ok=True)
        if speaks:
            write_or_say(self._note, lambda opened: opened.write(self._settings))

    def name(self, file: Path) -> str:
        """Return the name of a picture in the output: its path below the common folder of all pictures."""
        return whole_path(file).relative_to(self._above).as_posix()

    def paths(self, file: Path) -> list[Path]:
        """Return the files of a picture, one for each kind of the product."""
        return [self.folder / f"{self.name(file)}{kind}" for kind in self.product.kinds]

    def write(self, finding: Finding) -> str:
        """Write the files of one picture, and return a line about it."""
        paths = self.paths(finding.file)
        said = f"{finding.file}: {self.product.write(finding, paths)}"
        return f"{said}, see {linked(paths[-1])}" if paths else said

    def write_shard(self, found: Sequence[Finding]) -> None:
        """Write the maps of several pictures to one file, whose name no other process or run uses."""
        names = [self.name(finding.file) for finding in found]
        first = f"{found[0].place:08d}-{hashlib.sha256(names[0].encode()).hexdigest()[:8]}"
        self.product.write_shard(self._shards / f"{first}.npz", names, found)

    def left(self, resume: bool) -> list[Path]:
        """Return the pictures to explain: if resumed, those that lack a file or a shard, which are atomic.

        Raise a VitxError if the folder holds files that conflict with those of this run.
        """
        shards = [*self._shards.glob("*.npz")] if self.sharded else []
        if not resume and shards:
            said = f"{self._shards} holds maps of an earlier run"
            raise VitxError(f"{said}: continue it with --resume, or use another --output")
        if not resume:
            return [*self.files]
        if self._others:
            said = f"the maps in {self.folder} were made with other options or another model"
            raise VitxError(f"{said}, see {self._note}: use another --output, or leave out --resume")
        for path in shards:
            said = f"{path} cannot be read, so remove it, or use another --output"
            with failure(said), np.load(path, allow_pickle=False) as arrays:
                self._in_shards.update(arrays["files"].tolist())
        missing = {file for file in self.files if not all(map(Path.is_file, self.paths(file)))}
        return [file for file in self.files if file in missing or self.wants_shard(file)]

    def wants_shard(self, file: Path) -> bool:
        """Return whether the maps of a picture must still be written into a shard."""
        return self.sharded and self.name(file) not in self._in_shards

    def join_json(self) -> None:
        """Join the JSON of all pictures into one file, with a line for each."""
        paths = [path for file in self.files for path in self.paths(file) if path.suffix == ".json"]
        if lines := [path.read_bytes() + b"\n" for path in paths if path.is_file()]:
            write_or_say(self.folder / "explanations.jsonl", lambda opened: opened.writelines(lines))

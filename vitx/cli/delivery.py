"""From what was found to files: given to the writers, and for large runs kept in shards."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from vitx.cli.found import Finding
from vitx.cli.output import Output
from vitx.cli.product import Product
from vitx.cli.writers import Writers

SHARD = 256  # pictures in a file


class Delivery:
    """Has the files of each picture written, and the maps of many in one file where that is asked for.

    Args:
        output: where they go.
        writers: how many processes write them, if not this one.
        most: how many pictures may wait for them.
        tell: is given each picture, what is said of it and its files, as soon as they are there.
    """

    def __init__(
        self,
        output: Output,
        writers: int,
        most: int,
        tell: Callable[[Path, str, list[Path]], None] | None = None,
    ) -> None:
        self._output, self._tell = output, tell
        self._writers = Writers(output.product, writers, most)
        self._kept: list[Finding] = []

    def begin(self) -> None:
        """Prepares the folder."""
        self._output.begin()

    def add(self, finding: Finding) -> None:
        """Takes what was found in one picture."""
        paths = self._output.paths(finding.file)

        def then(said: str) -> None:
            if self._tell:
                self._tell(finding.file, said, paths)

        shown = finding if self._output.product.picture else finding.without_pixels()
        if paths or self._tell:
            self._writers.do(then, Product.write, shown, paths)
        if self._output.wants_shard(finding.file):
            self._kept.append(finding.without_pixels())
            if len(self._kept) == SHARD:
                self._write_shard()

    def finish(self) -> None:
        """Waits until all is written."""
        if self._kept:
            self._write_shard()
        self._writers.finish()

    def close(self) -> None:
        """Ends the writers, once what they are writing is whole."""
        self._writers.close()

    def _write_shard(self) -> None:
        found, self._kept = self._kept, []
        names = [self._output.name(finding.file) for finding in found]
        # Named by its first picture, which is in no other: no two processes or runs write the same file, and
        # a run that goes on writes again what a killed one left half written.
        first = f"{found[0].place:08d}-{hashlib.sha256(names[0].encode()).hexdigest()[:8]}"
        path = self._output.shards / f"{first}.npz"
        self._writers.do(lambda _: None, Product.write_shard, path, names, found)

"""From what was found to files: drawn and written in threads, and for large runs kept in shards."""

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vitx.cli.found import Finding
from vitx.cli.output import Output
from vitx.cli.threads import give_way

SHARD = 256  # pictures in a file


class Delivery:
    """Has the files of each picture written, and the maps of many in one file where that is asked for.

    What a thread raised is raised here, as the next picture comes. As a context, it ends once what is being
    written is whole; what has not begun is given up.

    Args:
        output: where they go.
        threads: how many draw and write.
        most: how many pictures may wait for them.
        tell: is given each picture, what is said of it and its files, as soon as they are there; in order.
    """

    def __init__(
        self,
        output: Output,
        threads: int,
        most: int,
        tell: Callable[[Path, str, list[Path]], None] | None = None,
    ) -> None:
        self._output, self._most, self._tell = output, most, tell
        self._pool = ThreadPoolExecutor(threads, initializer=give_way)
        self._waiting: deque[tuple[Future[Any], Path | None, list[Path]]] = deque()
        self._kept: list[Finding] = []

    def __enter__(self) -> "Delivery":
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, finding: Finding) -> None:
        """Takes what was found in one picture."""
        paths, product = self._output.paths(finding.file), self._output.product
        if paths or self._tell:
            shown = finding if product.picture else finding.without_pixels()
            self._do(finding.file, paths, product.write, shown, paths)
        if self._output.wants_shard(finding.file):
            self._kept.append(finding.without_pixels())
            if len(self._kept) == SHARD:
                self._write_shard()

    def finish(self) -> None:
        """Waits until all is written."""
        if self._kept:
            self._write_shard()
        while self._waiting:
            self._finish_first()

    def _do(self, file: Path | None, paths: list[Path], task: Callable[..., Any], *arguments: Any) -> None:
        self._waiting.append((self._pool.submit(task, *arguments), file, paths))
        while self._waiting and (len(self._waiting) > self._most or self._waiting[0][0].done()):
            self._finish_first()

    def _finish_first(self) -> None:
        future, file, paths = self._waiting.popleft()
        said = future.result()
        if self._tell and file:
            self._tell(file, said, paths)

    def _write_shard(self) -> None:
        found, self._kept = self._kept, []
        names = [self._output.name(finding.file) for finding in found]
        # Named by its first picture, which is in no other: no two processes or runs write the same file, and
        # a run that goes on writes again what a killed one left half written.
        first = f"{found[0].place:08d}-{hashlib.sha256(names[0].encode()).hexdigest()[:8]}"
        path = self._output.shards / f"{first}.npz"
        self._do(None, [path], self._output.product.write_shard, path, names, found)

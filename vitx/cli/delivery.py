"""From findings to files: drawn and written in threads, and for large runs kept in shards."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitx.cli.findings import Finding
from vitx.cli.output import Output
from vitx.files import PICTURES

SHARD = 256  # pictures in a file
Tell = Callable[[Path, str, list[Path]], None]  # a picture, a line about it, and its files


def give_way() -> None:
    """Let torch compute in this thread alone, as the model's threads wait for each other."""
    torch.set_num_threads(1)  # of those that this thread would start


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread: on small arrays, waiting for others takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Delivery:
    """Has the files of each picture written in threads, and the maps of many in one file.

    An error of a thread is raised here, as the next picture comes. As a context, it ends once all files that
    were begun are whole; the others are given up. At most so many pictures wait for the threads.
    """

    def __init__(self, output: Output, threads: int, most: int, tell: Tell | None = None) -> None:
        self._output, self._most, self._tell = output, most, tell
        self._pool = ThreadPoolExecutor(threads, initializer=give_way)
        self._waiting: deque[tuple[Future[Any], Callable[[str], None] | None]] = deque()
        self._kept: list[Finding] = []

    def __enter__(self) -> "Delivery":
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, finding: Finding) -> None:
        """Take the finding in one picture."""
        file, product = finding.file, self._output.product
        paths = self._output.paths(file)
        if paths or self._tell:
            told = self._tell and partial(self._tell_of, file, paths)
            shown = finding if {*product.kinds} & PICTURES.keys() else finding.without_pixels()
            self._do(told, product.write, shown, paths)
        if self._output.wants_shard(file):
            self._kept.append(finding.without_pixels())
            if len(self._kept) == SHARD:
                self._write_shard()

    def finish(self) -> None:
        """Wait until all is written."""
        if self._kept:
            self._write_shard()
        while self._waiting:
            self._finish_first()

    def _tell_of(self, file: Path, paths: list[Path], said: str) -> None:
        assert self._tell is not None
        self._tell(file, said, paths)

    def _do(self, told: Callable[[str], None] | None, task: Callable[..., Any], *arguments: Any) -> None:
        self._waiting.append((self._pool.submit(task, *arguments), told))
        while self._waiting and (len(self._waiting) > self._most or self._waiting[0][0].done()):
            self._finish_first()

    def _finish_first(self) -> None:
        future, told = self._waiting.popleft()
        said = future.result()
        if told:
            told(said)

    def _write_shard(self) -> None:
        found, self._kept = self._kept, []
        names = [self._output.name(finding.file) for finding in found]
        # Named by its first picture, which is in no other: no two processes or runs write the same file, and
        # a run that goes on writes again what a killed one left half written.
        first = f"{found[0].place:08d}-{hashlib.sha256(names[0].encode()).hexdigest()[:8]}"
        path = self._output.shards / f"{first}.npz"
        self._do(None, self._output.product.write_shard, path, names, found)

"""Processes beside the model that draw and write: in order, few waiting, and gone with it."""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from threading import Thread
from typing import Any, Concatenate, ParamSpec, TypeVar

from vitx.cli.threads import give_way, one_thread
from vitx.errors import VitxError
from vitx.pictures.render import font, palette

Held = TypeVar("Held")
Given = ParamSpec("Given")
Done = TypeVar("Done")

_held: Any = None  # in each process: what its tasks are done with


class Writers:
    """Does tasks in other processes, or at once where there are none.

    What a task returned is told in the order in which tasks were given; what it raised stops the run.

    Args:
        held: the first argument of all tasks, which goes to each process once.
        processes: how many; 0: tasks are done in this one.
        most: how many tasks may wait before giving another one does.
    """

    def __init__(self, held: Any, processes: int, most: int) -> None:
        self._held, self._most = held, most
        self._waiting: deque[tuple[Future[Any], Callable[[Any], None]]] = deque()
        self._pool = _pool(held, processes) if processes else None

    def do(
        self,
        then: Callable[[Done], None],
        task: Callable[Concatenate[Held, Given], Done],
        *arguments: Given.args,
        **named: Given.kwargs,
    ) -> None:
        """Gives a task, which runs as `task(held, ...)`.

        Args:
            then: is given what it returned, in this process.
            task: a function that pickle finds by its name.
            *arguments: of the task.
            **named: of the task.

        Raises:
            VitxError: What an earlier task raised, or that a process was ended.
        """
        if self._pool is None:
            with one_thread():
                then(task(self._held, *arguments, **named))
            return
        try:
            submit: Callable[..., Future[Done]] = self._pool.submit
            self._waiting.append((submit(_do, task, *arguments, **named), then))
        except BrokenProcessPool as error:
            raise VitxError(_ENDED) from error
        while self._waiting and (len(self._waiting) > self._most or self._waiting[0][0].done()):
            self._finish_first()

    def finish(self) -> None:
        """Waits until all is done."""
        while self._waiting:
            self._finish_first()

    def _finish_first(self) -> None:
        future, then = self._waiting.popleft()
        try:
            done = future.result()
        except BrokenProcessPool as error:
            raise VitxError(_ENDED) from error
        then(done)

    def close(self) -> None:
        """Waits for what is being written; what has not begun is given up."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


_ENDED = (
    "a process that draws and writes was killed, perhaps because memory ran out: continue with "
    "--resume, and fewer of them by --writers"
)


def _pool(held: Any, processes: int) -> ProcessPoolExecutor:
    """Starts the processes, before the model has threads, devices and memory of its own."""
    font(13), font(13, bold=True), palette("inferno")  # read once, for all
    # As a DataLoader does: a fork has all modules at once, where a new process reads them for seconds.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(processes, context, _begin, (held,))
    pool.submit(os.getpid).result()
    return pool


def _begin(held: Any) -> None:
    global _held
    _held = held
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process of the model says when to stop
    give_way()
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot tell its children to go: they would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(task: Callable[..., Done], *arguments: Any, **named: Any) -> Done:
    return task(_held, *arguments, **named)

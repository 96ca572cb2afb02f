"""Threads: small pictures need none, and those beside the model come after it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def give_way() -> None:
    """Lets this thread take what the model's leave of the cores, and torch compute in it alone.

    A model's threads wait for each other after each operation: one that is held up holds up all.
    """
    torch.set_num_threads(1)  # of those that this thread would start


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch compute in one thread: on small arrays, waiting for others takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

"""Small pictures need no threads, and the model comes first."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_NICE = 10  # of 19


def give_way() -> None:
    """Lets this process take what the model's leaves of the cores.

    A model's threads wait for each other after each operation: one that is held up holds up all.
    """
    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(_NICE)


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch compute in one thread: on small arrays, waiting for others takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

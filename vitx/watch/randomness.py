"""Random numbers: a firing draws the same ones each time, and the training as if there were no firing."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from vitx.watch.held import held_by


@contextmanager
def seeded(*holders: Any) -> Iterator[None]:
    """Run its block with generators that start from the same seed each time, and put their states back.

    These are torch's (CPU and CUDA), numpy's and Python's own, as starting to iterate a DataLoader draws from
    torch's, and those that the holders hold. So random transforms give the same images in every run, and a
    model that hides patches at random hides the same ones.
    """
    devices = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    known = (random, np.random, torch.default_generator, *devices, *held_by(*holders))
    found = list(filter(None, map(_seed_and_restore, known)))
    try:
        for seed, _ in found:
            seed()
        yield
    finally:
        for _, restore in found:
            restore()


def _seed_and_restore(one: Any) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    """Return a function that seeds a generator, and one that restores it; None for all else."""
    if isinstance(one, torch.Generator):
        return partial(one.manual_seed, 0), partial(one.set_state, one.get_state())
    if one is random or (isinstance(one, random.Random) and not isinstance(one, random.SystemRandom)):
        return partial(one.seed, 0), partial(one.setstate, one.getstate())
    if one is np.random or isinstance(one, np.random.RandomState):
        return partial(one.seed, 0), partial(one.set_state, one.get_state())
    if isinstance(one, np.random.Generator):
        bits = one.bit_generator
        first, now = type(bits)(0).state, bits.state
        return partial(setattr, bits, "state", first), partial(setattr, bits, "state", now)
    return None

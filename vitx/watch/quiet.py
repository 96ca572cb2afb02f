"""Leaves no trace on the training: random numbers that a firing draws are put back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Runs its block with generators that start from the same seed each time, and puts theirs back.

    These are torch's (CPU and CUDA), numpy's and Python's: a data set may draw from any of them, and starting
    to iterate a DataLoader draws from torch's. So random transforms give the same images each time, and a
    model that hides patches at random hides the same ones.
    """
    own, numpy_own = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            random.seed(0)
            np.random.seed(0)
            torch.default_generator.manual_seed(0)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(0)
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpy_own)

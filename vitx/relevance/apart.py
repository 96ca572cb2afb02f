"""Where the graph of a pass lies in memory.

The nodes of the graph are small, and stay to the end; what a layer computes is large, and goes at once. One
among the other, the small ones break up what the next layer could have used again: of 1024 pixels square, a
pass through 12 layers took twice the memory. The allocator of glibc gives each thread a heap of its own, so
the graph of a large pass is made in a thread of its own.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_LARGE = 2**19  # pixels of all images: with fewer, the way to another thread would take longer than it saves
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class Apart:
    """Makes what stays of a pass, with gradients; elsewhere, where that saves memory."""

    def __init__(self, image: Tensor, *, gradients: bool) -> None:
        """Chooses the place.

        Args:
            image: what the pass begins with, (B, C, H, W).
            gradients: whether the pass keeps what its layers compute, so that nothing large goes at once.
        """
        large = image.device.type == "cpu" and image.numel() >= _LARGE * image.shape[1]
        self._thread = ThreadPoolExecutor(1) if large and not gradients else None

    def __call__(
        self, make: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        """Calls a function and waits for what it returns or raises."""
        if self._thread is not None:
            return self._thread.submit(make, *args, **kwargs).result()
        with torch.enable_grad():
            return make(*args, **kwargs)

    def close(self) -> None:
        """Ends the thread, if there is one."""
        if self._thread is not None:
            self._thread.shutdown()

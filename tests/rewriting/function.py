"""The function that all networks compute, however they are written."""

from dataclasses import dataclass

import torch

WIDTH, HIDDEN, CLASSES, BATCH = 24, 20, 5, 2


IMAGE, PATCH = 16, 4


SIDE = IMAGE // PATCH


PATCHES, COUNT = SIDE**2, SIDE**2 + 1


EPS = 1e-6


TARGET = [1, 3]


REAL = torch.float64


@dataclass(frozen=True)
class Function:
    """The function to compute, regardless of how it is spelled.

    Attributes:
        forms: for each block "serial" (an attention, then an MLP), "beside" (an attention beside an MLP),
            "twins" (two attentions beside each other, then an MLP) or "all" (all three beside each other).
        activation: of the MLP: "erf", "tanh", "quick", "silu", "relu" or "swiglu".
        read: "token" (the class token) or "patches" (their mean).
        heads: of each attention.
    """

    forms: tuple[str, ...] = ("serial", "serial")
    activation: str = "erf"
    read: str = "token"
    heads: int = 3

"""Lightning has two packages, `lightning` and `pytorch_lightning`, with classes of their own."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import lightning.pytorch as pl

if TYPE_CHECKING or find_spec("pytorch_lightning") is None:
    Callback = pl.Callback
else:
    from pytorch_lightning import Callback as _Callback

    class Callback(pl.Callback, _Callback):
        """A callback in both of them: command lines and Hydra ask for an instance of their own."""

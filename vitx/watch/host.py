"""Answers of a training to what a watch asks of it."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from vitx.watch.calling import averaged, unwrapped
from vitx.watch.copies import BATCH
from vitx.watch.group import Group
from vitx.watch.loggers import settings_of
from vitx.watch.messages import inform, warn


class Host:
    """Answer what a watch asks of a training. These are the answers of a plain loop.

    An adapter for a framework is a subclass that answers otherwise where the framework knows better. Files go
    to `run/vitx`, beside checkpoints; without a `run`, it is the next free `version_N` of the root.
    """

    name = "Watch"  # begins each sentence that the watch says
    leaves_files = True  # whether the run may leave any
    by_name = False  # whether the training gives the model what is in a batch by its names

    def __init__(
        self,
        model: nn.Module,
        data: Any = None,
        run: Path | None = None,
        root: str | Path = ".",
        loggers: Sequence[Any] = (),
    ) -> None:
        self.model, self.data, self.loggers = model, data, loggers
        self.run, self.root = run, Path(root)
        self.group = Group.of(model)  # the processes that train together
        self.hyperparameters: Mapping[str, Any] = {}  # as far as the user says them
        self.numbers: Mapping[str, float] = {}  # of the training at this moment

    def validation(self) -> Any:
        """Return the validation loader, several of them (a list or a mapping), or None."""
        return self.data

    def loader(self, data: Any) -> Any:
        """Return a loader of a data set that was given."""
        return DataLoader(data, BATCH)

    def explained(self, weights: str) -> nn.Module:
        """Return the module that is explained now; averaged weights ("ema") are looked for in the model."""
        return averaged([self.model]) if weights == "ema" else unwrapped(self.model)

    def prepared(self, batch: Any, place: int) -> Any:
        """Return a batch of the validation loader at a place as the model gets it."""
        return batch

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        return nullcontext()

    def paused(self) -> AbstractContextManager[Any]:
        """Return a context that keeps a firing out of what the framework counts and logs."""
        return nullcontext()

    def normalizers(self) -> Iterable[Any]:
        """Return what may hold the normalization of the images, beside the data set and the model."""
        return ()

    def class_names(self) -> Sequence[str] | None:
        """Return the names of the classes, where neither the user nor the data set says them."""
        return None

    def settings(self) -> Mapping[str, Any]:
        """Return the hyperparameters of the training, which may be nested."""
        of_loggers = [settings_of(logger) for logger in self.loggers]
        return {name: value for one in (*of_loggers, self.hyperparameters) for name, value in one.items()}

    def metrics(self) -> Mapping[str, float]:
        """Return the numbers that the training has at this moment."""
        return self.numbers

    def epoch(self) -> float | None:
        """Return the epoch as the framework counts it; None where there is none."""
        return None

    def publish(self, numbers: Mapping[str, float]) -> None:
        """Tell other parts of the training the numbers of a firing, on every rank."""

    def warn(self, sentence: str) -> None:
        """Warn of what went wrong, on rank 0."""
        warn(sentence)

    def inform(self, sentence: str) -> None:
        """Tell what went well, on rank 0."""
        inform(sentence)

"""The watch of a training loop of one's own."""

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vitx.errors import VitxError
from vitx.watch.calling import unwrapped
from vitx.watch.copies import BATCH
from vitx.watch.host import Host
from vitx.watch.images import Samples
from vitx.watch.loggers import drop_from, loggers_of
from vitx.watch.loop import FirstCall, differs, not_normalized
from vitx.watch.observer import Observer

_SUFFIX = ".vitx"  # of the files of TensorBoard that a watch writes
_WHEN = ("every_n_epochs", "at_start", "on_validate")  # a loop of one's own says that itself


class Watch(Observer):
    """Show what a Vision Transformer looks at, while a loop of your own trains it.

    Each call logs one grid (rows: images; columns: the input and each method's overlay) under `vitx/maps`,
    and for each method, as means over the images, `vitx/METHOD/...`: `entropy`, `information`, `drift`, and,
    where masks or boxes are known, `pointing` and `energy`. `close`, or the end of a `with` block around the
    loop, tells that the training has ended.

    The training is the same, bit for bit, with and without the watch. Several processes that train together
    all call it; they share the images, and rank 0 writes.

    Args:
        model: the one that is trained; also compiled, wrapped for several processes, or averaged.
        data: what images are taken from: the validation loader, a data set, a batch, a tensor (n, C, H, W),
            or a list of image files. Of several loaders, in a list or a mapping, `dataloader_idx` chooses.
        log_dir: the folder of the run. Pictures and numbers go to TensorBoard files there, unless a logger
            is given; maps, and pictures that no logger takes, to its folder `vitx`. A folder that holds
            another run is not touched: the next free number beside it is taken.
        logger: where pictures and numbers go: a SummaryWriter, a run of Weights & Biases, the module mlflow,
            an Accelerator with trackers, an object with methods `log_image(key, images, step)` and
            `log_metrics(metrics, step)`, or several of these. False: pictures become PNG files.
        hyperparameters: of the training, for the report; they may be nested.
        **options: those of `vitx.watch.Settings`, as of all callbacks. With `every_n_steps`, calls between
            are passed over.

    Raises:
        VitxError: An argument is wrong.

    Example:
        >>> import tempfile, timm, torch
        >>> model, data = timm.create_model("test_vit", num_classes=10), torch.rand(2, 3, 160, 160)
        >>> with Watch(model, data, log_dir=tempfile.mkdtemp()) as watch:
        ...     sorted(watch(step=0))[:2]
        ['vitx/grad_rollout/entropy', 'vitx/grad_rollout/information']
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        log_dir: str | os.PathLike[str] | None = None,
        *,
        logger: Any = None,
        hyperparameters: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if log_dir is None and logger is None:
            raise VitxError('a watch needs a place to write to: give log_dir="runs/first", or a logger')
        if wrong := [name for name in _WHEN if name in options]:
            raise VitxError(f"{wrong[0]} is for callbacks: a watch fires when it is called")
        if not isinstance(model, nn.Module):
            raise VitxError(f"the model must be a torch.nn.Module, found {type(model).__name__}")
        loaders = _as_loaders(data)
        if loaders is None and data is not None:
            if "images" in options:
                raise VitxError(
                    "images are indices into a data set or a loader: give only the images that you want"
                )
            options["images"] = data
        super().__init__(**options)
        self._logger, self._log_dir, self._hyperparameters = logger, log_dir, hyperparameters
        self._host = Host(model, loaders)
        self._first_call = FirstCall(unwrapped(model))
        self._resumed = self._begun = self._closed = False

    def __call__(self, step: int, metrics: Mapping[str, float] | None = None) -> Mapping[str, float]:
        """Explain the images, and log what was found, once for each step.

        Args:
            step: of the training, on the axis of what else is logged.
            metrics: numbers of your own at this step, for the report: `{"val/accuracy": 0.91}`.

        Returns:
            The numbers, tag -> value; none where the step is passed over, or where it failed, as is said.

        Raises:
            VitxError: The watch is closed.
        """
        if self._closed:
            raise VitxError("this watch is closed, as its training has ended: make another one")
        if self.every_n_steps and step % self.every_n_steps:
            return {}
        if not self._begun:
            self._begin()
        self._host.numbers = metrics or {}
        self._first_call.paused = True
        try:
            return self.observe(self._host, step)
        finally:
            self._first_call.paused = False

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(ended=error is None)

    def close(self) -> None:
        """Show all maps of the last call at once, and mark in the folder that the training has ended."""
        self._close(ended=True)

    def _close(self, ended: bool) -> None:
        if ended and self._begun and not self._closed:
            self.end(self._host)
        if self._logger is None and not self._closed:
            for writer in self._host.loggers:
                writer.close()
        self._closed = True
        super().close()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the last call of an interrupted run; to be called before the first one of this."""
        super().load_state_dict(state_dict)
        self._resumed = True

    def difference(self, samples: Samples) -> str | None:
        """Say once how the images differ from those that the loop gives the model."""
        given, self._first_call.images = self._first_call.images, None
        return None if given is None or self._as_given(samples) else differs(given, samples.images)

    def hint(self, samples: Samples) -> str | None:
        """Say where the images may differ from those that the loop gives the model."""
        return None if self._as_given(samples) else not_normalized(self._host.model, samples.images)

    def _as_given(self, samples: Samples) -> bool:
        """Return whether the images are as the user gave them, or made so by a function of the user's."""
        return self.selection.batch_transform is not None or not samples.source

    def _begin(self) -> None:
        """Find where to write, as processes and trackers may be started after the watch is made."""
        self._begun = True
        host = self._host = Host(self._host.model, self._host.data)
        host.loggers = list(loggers_of(self._logger)) if self._logger else []
        of_loggers = (getattr(logger, "log_dir", None) for logger in host.loggers)
        run = self._log_dir or next(filter(None, of_loggers), None)
        host.hyperparameters = self._hyperparameters or {}
        host.run, host.root = run and Path(run), Path("runs")
        self._attempts.on_first(host, partial(self._take_folder, host))

    def _take_folder(self, host: Host) -> None:
        """Take a folder for the run, or that of the interrupted one, and write to TensorBoard there."""
        own_writer, next_step = self._logger is None, self._memory.step + 1
        if self._resumed:
            self._writer.reopen(host, next_step)
        taken = self._writer.claim(host) if own_writer or self.save_maps else None
        if not own_writer or taken is None:
            return
        folder = taken.path.parent
        with self._attempts.forgiving(host, f"cannot write to {folder}"):
            logs = list(folder.glob("events.out.tfevents.*"))
            host.loggers = [_summary_writer(folder)]
            if all(path.name.endswith(_SUFFIX) for path in logs):  # else others would lose what they wrote
                drop_from(host.loggers[0], next_step)


def _summary_writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), filename_suffix=_SUFFIX)


class Batch:
    """A loader of one batch."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __iter__(self) -> Iterator[Any]:
        yield self.content


def _as_loaders(data: Any) -> Any:
    """Return what yields batches: one loader, or several of them; None for images alone."""
    parts = list(data.values()) if isinstance(data, Mapping) else data
    if isinstance(data, Tensor) or data is None:
        return None
    if isinstance(parts, (list, tuple)):
        if any(isinstance(part, Tensor) and part.ndim == 4 for part in parts):
            return Batch(data)
        if all(isinstance(part, (str, Path)) for part in parts):
            return None
        if all(isinstance(part, DataLoader) or _only_iterates(part) for part in parts):
            return data
    if isinstance(data, Dataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return DataLoader(data, BATCH)
    return data if isinstance(data, Iterable) else None


def _only_iterates(data: Any) -> bool:
    return isinstance(data, Iterable) and not hasattr(data, "__getitem__")

"""The watch for custom training loops."""

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vitx.errors import VitxError
from vitx.models.prediction import check_model
from vitx.watch.calling import is_compiled, unwrapped
from vitx.watch.host import Host
from vitx.watch.loggers import loggers_of
from vitx.watch.nested import tensors_of
from vitx.watch.observer import Observer
from vitx.watch.readers import BATCH

_SUFFIX = ".vitx"  # of the TensorBoard files that a watch writes
_FACTOR = 2.0  # a larger ratio of standard deviations means another scale
_WHEN = ("every_n_epochs", "at_start", "on_validate")  # a custom loop decides this itself
_SELECT = ("images", "dataloader_idx")


class Watch(Observer):
    """Show what a Vision Transformer looks at while your own loop trains it.

    Each call logs one grid under `vitx/maps` (rows: images; columns: the input and each method's overlay),
    and numbers under `vitx/METHOD/...`, which are means over the images. Call `close` when the training has
    ended, or put the loop into a `with` block. The training is bit for bit the same with and without the
    watch. In a distributed training, every process calls the watch, and they share the images.

    Args:
        model: the model that is trained; it may be compiled, wrapped for several processes, or averaged.
        data: the source of the images: the validation loader, a data set, a batch, a tensor (n, C, H, W), or
            a list of image files. For several loaders in a list or a mapping, `dataloader_idx` chooses one.
        log_dir: the folder of the run. Pictures and numbers go to TensorBoard files in it unless a logger is
            given; maps, and pictures that no logger takes, go to its subfolder `vitx`. If it already holds
            another run, a folder with the next free number is used instead.
        logger: the destination of pictures and numbers: a SummaryWriter, a Weights & Biases run, the module
            mlflow, an Accelerator with trackers, an object with the methods `log_image(key, images, step)`
            and `log_metrics(metrics, step)`, or several of these. With False, pictures become PNG files.
        hyperparameters: hyperparameters of the training to show in the report; they may be nested.
        **options: options of `vitx.watch.Settings`; with `every_n_steps`, calls at other steps are skipped.

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
        check_model(model)
        if data is None:
            raise VitxError("a watch needs images: give a validation loader, a data set, a tensor or files")
        loaders = _as_loaders(data)
        if loaders is None:
            if wrong := [name for name in _SELECT if name in options]:
                only = "give only the images that you want as data"
                raise VitxError(f"{wrong[0]} selects from data sets or loaders, and data is neither: {only}")
            options["images"] = data
        super().__init__(**options)
        self._logger, self._log_dir, self._host = logger, log_dir, Host(model, loaders, root="runs")
        self._host.hyperparameters = hyperparameters or {}
        self._first_call = FirstCall(unwrapped(model))
        self._begun = self._closed = False

    def __call__(self, step: int, metrics: Mapping[str, float] | None = None) -> Mapping[str, float]:
        """Explain the images and log the results, once per step.

        Args:
            step: the training step, on the same axis as everything else that is logged.
            metrics: your own metrics at this step, for the report: `{"val/accuracy": 0.91}`.

        Returns:
            The numbers, tag -> value; empty if the step is skipped, or if it fails, which is reported.
        """
        if self._closed:
            raise VitxError("this watch is closed, as its training has ended: make another one")
        if not hasattr(step, "__index__"):
            raise VitxError(f"step must be a whole number, found {step!r}")
        if self.every_n_steps and step % self.every_n_steps:
            return {}
        if not self._begun:
            self._begin()
        self._host.numbers, first = metrics or {}, self._first_call
        first.paused = True
        try:
            numbers = self.observe(self._host, step)
        finally:
            first.paused = False
        samples, given, first.images = self._samples, first.images, None
        if given is None or samples is None or not samples.source or self.batch_transform:
            return numbers
        if said := differs(given, samples.images):
            self._host.warn(f"{self._host.name}: {said}")
        return numbers

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        else:  # a training that failed is not marked as ended
            self._release()

    def close(self) -> None:
        """Show an overview of all maps of the last call, and mark the run as ended in its folder."""
        if self._begun and not self._closed:
            self.end(self._host)
        self._release()

    def _release(self) -> None:
        for writer in self._host.loggers if self._logger is None and not self._closed else ():
            writer.close()
        self._closed = True
        super().close()

    def _begin(self) -> None:
        """Set up the outputs at the first call, as processes and trackers may start after the watch."""
        host, self._begun = self._host, True
        host.loggers = list(loggers_of(self._logger)) if self._logger else []
        runs = (self._log_dir, *(getattr(logger, "log_dir", None) for logger in host.loggers))
        host.run = next((Path(run) for run in runs if run), None)
        self._attempts.on_first(host, partial(self._take_folder, host))

    def _take_folder(self, host: Host) -> None:
        """Claim a folder for the run, or reopen an interrupted run's, and write TensorBoard files there."""
        next_step = self._memory.step + 1
        if next_step:
            self._writer.reopen(host, next_step)
        taken = self._writer.claim(host) if self._logger is None or self.save_maps else None
        if self._logger is not None or taken is None:
            return
        folder = taken.path.parent
        with self._attempts.forgiving(host, f"cannot write to {folder}"):
            from torch.utils.tensorboard import SummaryWriter

            others = any(not path.name.endswith(_SUFFIX) for path in folder.glob("events.out.tfevents.*"))
            step = None if others else next_step  # purging would drop what others wrote
            host.loggers = [SummaryWriter(str(folder), purge_step=step, filename_suffix=_SUFFIX)]


class FirstCall:
    """A hook that keeps the images of the loop's first call to a model, and then removes itself."""

    def __init__(self, model: nn.Module) -> None:
        self.images: Tensor | None = None  # (B, ...), on the CPU, once the model has been called
        self.paused = False  # while vitx itself calls the model
        if not is_compiled(model):
            self._hook = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def __getstate__(self) -> dict[str, Any]:
        """Return an inactive state: copies of the model made before its first call record nothing."""
        return {"images": None, "paused": True}

    def _keep(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.paused:
            return
        self._hook.remove()
        given = [tensor for _, tensor in tensors_of((args, kwargs)) if tensor.ndim >= 4]
        self.images = given[0].detach().to("cpu", torch.float32, copy=True) if given else None


def differs(given: Tensor, held: Tensor) -> str | None:
    """Return how the loop's images, (B, ...), differ from the loader's, as a hint; None if they do not."""
    if given.shape[1:] != held.shape[1:]:
        one, other = (" x ".join(map(str, images.shape[1:])) for images in (given, held))
    else:
        held = held.float()
        spread = given.std() / held.std().clamp_min(1e-12)
        moved = (given.mean() - held.mean()).abs() / torch.maximum(given.std(), held.std()).clamp_min(1e-12)
        if 1 / _FACTOR <= spread <= _FACTOR and moved <= 1:
            return None
        one, other = (f"from {images.amin():.3g} to {images.amax():.3g}" for images in (given, held))
    give = "batch_transform=lambda batch: ..., with what your loop does to a batch before it calls the model"
    return f"your loop gave the model images {one}, but the loader has images {other}: give {give}"


def _as_loaders(data: Any) -> Any:
    """Return the data as one or several loaders of batches; None if they are images alone."""
    parts = list(data.values()) if isinstance(data, Mapping) else data
    if isinstance(data, (Tensor, str, Path)):
        return None
    if isinstance(parts, (list, tuple)):
        if any(isinstance(part, Tensor) and part.ndim == 4 for part in parts):
            return DataLoader([data], None)  # type: ignore[arg-type]  # one batch
        if all(isinstance(part, (str, Path)) for part in parts):
            return None
        if all(isinstance(part, Iterable) and not hasattr(part, "__getitem__") for part in parts):
            return data
    if isinstance(data, Dataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return DataLoader(data, BATCH)
    return data if isinstance(data, Iterable) else None

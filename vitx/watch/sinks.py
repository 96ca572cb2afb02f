"""Where pictures and numbers go: loggers of frameworks, writers and runs of their libraries, trackers.

What a place can hold is found by what it can do, as classes of one name are made in many packages, and so may
you. To add a sink for pictures, write a function like those below and decorate it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitx.errors import VitxError
from vitx.files import write_atomically

Picture = NDArray[np.uint8]  # (height, width, 3)
Write = Callable[[str, Picture, int], Any]  # tag, picture, step

_SINKS: list[Callable[[Any], Write | None]] = []


def _sink(find: Callable[[Any], Write | None]) -> Callable[[Any], Write | None]:
    _SINKS.append(find)
    return find


@_sink
def _tensorboard(logger: Any) -> Write | None:
    writer = _experiment(logger)
    if not callable(getattr(writer, "add_image", None)):
        return None

    def write(tag: str, picture: Picture, step: int) -> None:
        writer.add_image(tag, picture, step, dataformats="HWC")
        writer.flush()

    return write


@dataclass(frozen=True)
class WandbRun:
    """A run of Weights & Biases, whose own steps count calls: the step of the training is an axis beside.

    Attributes:
        run: what `wandb.init` returns.
        axis: what the step is called.
    """

    run: Any
    axis: str = "vitx/step"

    def write(self, values: Mapping[str, Any], step: int) -> None:
        """Logs numbers and pictures at a step."""
        self.run.define_metric("vitx/*", step_metric=self.axis)
        self.run.log({**values, self.axis: step})


@dataclass(frozen=True)
class MlflowRun:
    """A run of MLflow, which may have ended.

    Attributes:
        experiment: an `MlflowClient`.
        run_id: of the run.
    """

    experiment: Any
    run_id: str

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs numbers at a step."""
        for name, value in metrics.items():
            self.experiment.log_metric(self.run_id, name, value, step=step)


def _wandb_run(place: Any) -> WandbRun | None:
    if isinstance(place, WandbRun):
        return place
    run = _experiment(place)
    return WandbRun(run) if _is_wandb(run) and not hasattr(place, "log_metrics") else None


def _is_wandb(run: Any) -> bool:
    return callable(getattr(run, "define_metric", None))


@_sink
def _wandb(place: Any) -> Write | None:
    found = _wandb_run(place)
    if found is None:
        return None
    from wandb import Image as WandbImage

    return lambda tag, picture, step: found.write({tag: WandbImage(picture)}, step)


@_sink
def _mlflow_module(place: Any) -> Write | None:
    if not (callable(getattr(place, "log_image", None)) and hasattr(place, "active_run")):
        return None
    return lambda tag, picture, step: place.log_image(picture, key=tag, step=step)


@_sink
def _own_method(logger: Any) -> Write | None:
    """Weights & Biases, and any logger with a method `log_image(key, images, step)` as its has."""
    if not callable(getattr(logger, "log_image", None)):
        return None
    return lambda tag, picture, step: logger.log_image(key=tag, images=[picture], step=step)


@_sink
def _mlflow(logger: Any) -> Write | None:
    client = _experiment(logger)
    if not (callable(getattr(client, "log_image", None)) and hasattr(client, "list_artifacts")):
        return None

    def write(tag: str, picture: Picture, step: int) -> None:
        # MLflow adds a second file where a resumed run shows a step again.
        shown = f"images/{tag.replace('/', '~')}+step+{step}+"
        if not any(file.path.startswith(shown) for file in client.list_artifacts(logger.run_id, "images")):
            client.log_image(logger.run_id, picture, key=tag, step=step)

    return write


@_sink
def _comet(logger: Any) -> Write | None:
    experiment = _experiment(logger)
    if not (callable(getattr(experiment, "log_image", None)) and hasattr(experiment, "log_asset")):
        return None
    return lambda tag, picture, step: experiment.log_image(picture, name=tag, step=step)


def write_scalars(place: Any, scalars: Mapping[str, float], step: int) -> None:
    """Logs numbers, tag -> value."""
    writer, run = _experiment(place), _wandb_run(place)
    if run is not None:
        run.write(scalars, step)
    elif callable(getattr(place, "log_metrics", None)):
        place.log_metrics(dict(scalars), step=step)
    elif callable(getattr(writer, "add_scalar", None)):
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)
        writer.flush()
    elif callable(getattr(place, "log", None)):  # a tracker of Accelerate
        place.log(dict(scalars), step=step)
    else:
        raise VitxError(
            f"numbers cannot go to a {type(place).__name__}: give a SummaryWriter, a run of Weights & "
            "Biases, mlflow, an Accelerator, or an object with a method log_metrics(metrics, step)"
        )


def places_of(given: Any) -> Iterator[Any]:
    """Yields one or several places, and those that an Accelerator writes to."""
    for place in given if isinstance(given, (list, tuple)) else [given]:
        yield from getattr(place, "trackers", [place])


def name_of(place: Any) -> str:
    """Returns what to call it."""
    return str(getattr(place, "__name__", type(place).__name__))


def show_picture(place: Any, tag: str, picture: Picture, step: int) -> bool:
    """Shows a picture.

    Args:
        place: a logger of a framework, or the writer or run of a library.
        tag: name of the picture; the part before the first slash is its group.
        picture: (height, width, 3) uint8.
        step: the training step that it belongs to.

    Returns:
        Whether this place can hold pictures.
    """
    write = next(filter(None, (find(place) for find in _SINKS)), None)
    if write is not None:
        write(tag, picture, step)
    return write is not None


def save_picture(path: Path, picture: Picture) -> None:
    """Writes a picture to a PNG file."""
    write_atomically(path, lambda file: Image.fromarray(picture).save(file, "PNG"))


def facts_of(place: Any) -> dict[str, str | None]:
    """Says which run of which logger it is: `name`, `version`, `title`, `address`, as far as it has them."""
    run = place.run if isinstance(place, WandbRun) else _experiment(place)
    stored = _stored(place)

    def first(*names: str) -> str | None:
        found = (getattr(one, name, None) for one in (place, run) for name in names)
        return next((str(one) for one in found if isinstance(one, (str, int, Path)) and str(one)), None)

    titled = stored.info.run_name if stored else _is_wandb(run) and run.name
    return {
        "name": name_of(place),
        "version": first("version", "run_id", "id"),
        "title": titled or None,
        "address": first("url", "_tracking_uri", "log_dir", "save_dir"),
    }


def settings_of(place: Any) -> Mapping[str, Any]:
    """Returns the hyperparameters that a logger was given, where it can tell them."""
    run = place.run if isinstance(place, WandbRun) else _experiment(place)
    if (stored := _stored(place)) is not None:
        return dict(stored.data.params)
    if _is_wandb(run):
        return dict(run.config)
    held = (getattr(one, "hparams", None) for one in (place, run))
    return next((dict(one) for one in held if isinstance(one, Mapping)), {})


def _stored(place: Any) -> Any:
    """Returns what MLflow's store holds of a run; None of other loggers."""
    client, run_id = _experiment(place), getattr(place, "run_id", None)
    return client.get_run(run_id) if run_id and callable(getattr(client, "get_run", None)) else None


def drop_from(logger: Any, step: int) -> None:
    """Tells TensorBoard that the run goes on from a step: what an ended run wrote there and later is void.

    This is what the `purge_step` of a `SummaryWriter` does as it is made, and holds for the whole run, whose
    steps from there on are taken anew.
    """
    writer = getattr(_experiment(logger), "file_writer", None)
    if writer is not None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        writer.add_event(Event(file_version="brain.Event:2"), step)
        writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)
        writer.flush()


def _experiment(place: Any) -> Any:
    """The object of a library that a logger or a tracker writes to; else the place itself."""
    for name in ("experiment", "tracker"):
        if getattr(place, name, None) is not None:
            return getattr(place, name)
    return place

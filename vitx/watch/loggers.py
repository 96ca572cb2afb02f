"""Loggers for pictures and numbers: those of frameworks, writers and runs of libraries, and trackers.

A logger is recognized by its methods, since many packages define classes of the same name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from vitx.errors import VitxError
from vitx.files import encode
from vitx.pictures.render import Picture


@dataclass(frozen=True)
class WandbRun:
    """A Weights & Biases run. Its own steps count calls, so the training step is logged as another axis."""

    experiment: Any  # what `wandb.init` returns
    axis: str = "vitx/step"

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log numbers or pictures at a step."""
        self.experiment.define_metric("vitx/*", step_metric=self.axis)
        self.experiment.log({**metrics, self.axis: step})

    def log_image(self, key: str, images: Sequence[Picture], step: int) -> None:
        """Log one picture at a step."""
        from wandb import Image as WandbImage

        self.log_metrics({key: WandbImage(images[0])}, step)


@dataclass(frozen=True)
class MlflowRun:
    """An MLflow run, which may have ended."""

    experiment: Any  # an `MlflowClient`
    run_id: str

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers at a step."""
        for name, value in metrics.items():
            self.experiment.log_metric(self.run_id, name, value, step=step)


def show_picture(logger: Any, tag: str, picture: Picture, step: int) -> bool:
    """Log a picture at a training step, and return whether this logger takes pictures.

    Another logger needs two lines here: a test for its methods, and the call that logs a picture.
    """
    held = _held(logger)
    if _can(getattr(held, "file_writer", None), "add_event"):
        _add_event(held.file_writer, tag, picture, step)
    elif _can(held, "add_image"):
        held.add_image(tag, picture, step, dataformats="HWC")
    elif _can(logger, "log_image", "active_run"):  # the mlflow module
        logger.log_image(picture, key=tag, step=step)
    elif _can(logger, "log_image"):  # Lightning's WandbLogger, and any logger with such a method
        logger.log_image(key=tag, images=[picture], step=step)
    elif _can(held, "log_image", "list_artifacts"):  # an MLflow client
        _log_once(held, logger.run_id, tag, picture, step)
    elif _can(held, "log_image", "log_asset"):  # Comet
        held.log_image(picture, name=tag, step=step)
    else:
        return False
    getattr(held, "flush", bool)()
    return True


def write_scalars(logger: Any, scalars: Mapping[str, float], step: int) -> None:
    """Log numbers, tag -> value, at a step."""
    held = _held(logger)
    if _can(logger, "log_metrics"):
        logger.log_metrics(dict(scalars), step=step)
    elif _can(held, "add_scalar"):
        for tag, value in scalars.items():
            held.add_scalar(tag, value, step)
        held.flush()
    elif _can(logger, "log"):  # a tracker of Accelerate
        logger.log(dict(scalars), step=step)
    else:
        raise VitxError(
            "a logger must be a SummaryWriter, a run of Weights & Biases, mlflow, an Accelerator, or an "
            f"object with a method log_metrics(metrics, step), found {type(logger).__name__}"
        )


def loggers_of(given: Any) -> Iterator[Any]:
    """Yield the given loggers, with the trackers of an Accelerator in its place."""
    for several in given if isinstance(given, (list, tuple)) else [given]:
        for one in getattr(several, "trackers", [several]):
            bare = _can(_held(one), "define_metric") and not _can(one, "log_metrics")
            yield WandbRun(_held(one)) if bare else one


def name_of(logger: Any) -> str:
    """Return the name of a logger for messages."""
    return str(getattr(logger, "__name__", type(logger).__name__))


def place_of(logger: Any) -> str:
    """Return the folder that a logger writes to, or else its name, for messages."""
    return str(getattr(_held(logger), "log_dir", None) or name_of(logger))


def facts_of(logger: Any) -> dict[str, str | None]:
    """Return the `name`, `version`, `title` and `address` of a logger's run; None for those it lacks."""
    held, stored = _held(logger), _stored(logger)

    def first(*names: str) -> str | None:
        found = (getattr(one, name, None) for one in (logger, held) for name in names)
        return next((str(one) for one in found if isinstance(one, (str, int, Path)) and str(one)), None)

    titled = stored.info.run_name if stored else _can(held, "define_metric") and held.name
    return {
        "name": name_of(logger),
        "version": first("version", "run_id", "id"),
        "title": titled or None,
        "address": first("url", "_tracking_uri", "log_dir", "save_dir"),
    }


def settings_of(logger: Any) -> Mapping[str, Any]:
    """Return the hyperparameters that a logger was given, if it exposes them."""
    held, stored = _held(logger), _stored(logger)
    if stored is not None:
        return dict(stored.data.params)
    if _can(held, "define_metric"):
        return dict(held.config)
    given = (getattr(one, "hparams", None) for one in (logger, held))
    return next((dict(one) for one in given if isinstance(one, Mapping)), {})


def drop_from(logger: Any, step: int) -> None:
    """Make TensorBoard drop what an earlier run logged at a step and later, as the run resumes there.

    The `purge_step` of a `SummaryWriter` does the same for the whole run when the writer is created.
    """
    writer = getattr(_held(logger), "file_writer", None)
    if writer is not None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        writer.add_event(Event(file_version="brain.Event:2"), step)
        writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)
        writer.flush()


def _add_event(writer: Any, tag: str, picture: Picture, step: int) -> None:
    """Log a picture to TensorBoard as JPEG, to be small: a checksum is computed in Python, byte by byte."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    encode(file := BytesIO(), picture, ".jpg")
    height, width, colors = picture.shape
    image = Summary.Image(height=height, width=width, colorspace=colors, encoded_image_string=file.getvalue())
    writer.add_event(Event(summary=Summary(value=[Summary.Value(tag=tag, image=image)])), step)


def _held(logger: Any) -> Any:
    """Return the library's object that a logger or a tracker wraps, or else the logger itself."""
    held = (getattr(logger, name, None) for name in ("experiment", "tracker"))
    return next((one for one in held if one is not None), logger)


def _can(one: Any, *methods: str) -> bool:
    return all(callable(getattr(one, method, None)) for method in methods)


def _stored(logger: Any) -> Any:
    """Return a run as MLflow's store holds it; None for other loggers."""
    client, run_id = _held(logger), getattr(logger, "run_id", None)
    return client.get_run(run_id) if run_id and _can(client, "get_run") else None


def _log_once(client: Any, run_id: str, tag: str, picture: Picture, step: int) -> None:
    """Log a picture to MLflow, unless it has one of this step: a resumed run would add a second file."""
    shown = f"images/{tag.replace('/', '~')}+step+{step}+"
    if not any(file.path.startswith(shown) for file in client.list_artifacts(run_id, "images")):
        client.log_image(run_id, picture, key=tag, step=step)

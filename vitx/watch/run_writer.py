"""The folder of a run, as a watch fills it: maps, logits, images, numbers, and what the run is."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vitx.models.outputs import Kind
from vitx.runs import FOLDER, LOGITS, SINKS
from vitx.runs.folder import RunFolder
from vitx.targets import Question
from vitx.watch.attempts import Attempts
from vitx.watch.host import Host
from vitx.watch.loggers import Picture, facts_of, save_picture
from vitx.watch.memory import Memory
from vitx.watch.messages import path_of
from vitx.watch.settings import Settings
from vitx.watch.showing import Display, Firing

_FEW = 100  # logits of an image, which are kept in full precision


class RunWriter:
    """Write what a report needs, on rank 0; with `save_maps=False`, pictures alone."""

    def __init__(self, settings: Settings, attempts: Attempts, memory: Memory) -> None:
        self._settings, self._attempts, self._memory = settings, attempts, memory
        self.folder: RunFolder | None = None  # of the run, once something is written

    def claim(self, host: Host) -> RunFolder | None:
        """Return the folder of the run, taken now if need be; None where it cannot be, as is said."""
        if self.folder is None and host.leaves_files:
            with self._attempts.forgiving(host, f"cannot write to {host.run or host.root}"):
                self._take(RunFolder.claim(host.run, host.root), host)
        return self.folder

    def reopen(self, host: Host, next_step: int) -> None:
        """Go on in the folder of an interrupted run, or take another one and say why."""
        before, moved = self._memory.folder, False
        known = [Path(one) for one in (host.run and host.run / FOLDER, before) if one]
        for path in known:
            with self._attempts.forgiving(host, f"cannot go on in {path_of(path)}"):
                found = None if self.folder else RunFolder.reopen(path, str(self._memory.run))
                if found is not None:
                    self._take(found.go_on(next_step), host)
                    moved = self.folder is not None and self.folder.path != found.path
        if before is None or (self.folder and not moved) or (folder := self.claim(host)) is None:
            return
        why = f"as {path_of(before)} is gone, is written to, or holds what came after this checkpoint"
        host.inform(f"{host.name} goes on in {path_of(folder.path)}, {why}")

    def _take(self, folder: RunFolder, host: Host) -> None:
        self.folder, fresh = folder, self._memory.folder is None
        self._memory.folder, self._memory.run = str(folder.path), folder.id
        if fresh and host.run and folder.path.parent != host.run.absolute():
            other = path_of(host.run)
            host.inform(f"{host.name} writes to {path_of(folder.path)}, as {other} holds another run")

    def write_display(self, host: Host, firing: Firing, display: Display) -> None:
        """Write the images that are watched from a firing on, and what the run is."""
        samples, kept = firing.samples, self._kept(firing)
        arrays = {
            "pixels": display.pixels.numpy(),
            "shown": np.array([kept.index(place) for place in samples.shown]),
        }
        if samples.labels is not None:
            labels = samples.labels[kept]
            arrays["labels"] = (labels.float() if labels.is_floating_point() else labels).numpy()

        def write(folder: RunFolder) -> None:
            folder.write_facts(facts_of_run(self._settings, host, display, firing.kind))
            folder.write_images(firing.step, arrays)

        self._write(host, write)

    def write_firing(self, host: Host, firing: Firing) -> None:
        """Write maps, logits and numbers."""
        kept = self._kept(firing)
        self._write(host, lambda folder: folder.write_firing(firing.step, arrays_of(firing, kept)))
        self.write_numbers(host, firing.numbers, firing.step)

    def write_numbers(self, host: Host, numbers: Mapping[str, float], step: int) -> None:
        """Write the numbers of a firing beside those of the training."""
        row = {"step": step, "epoch": host.epoch(), **host.metrics(), **numbers}
        self._write(host, lambda folder: folder.write_numbers(row))

    def write_picture(self, host: Host, tag: str, picture: Picture, step: int) -> str | None:
        """Write a picture that no logger took, and return where; beside maps, only the last one stays."""
        folder = self.claim(host)
        if folder is None:
            return None
        name = tag.rpartition("/")[2]
        path = folder.path / (f"{name}.png" if self._settings.save_maps else f"{name}-{step:06d}.png")
        taken = self._attempts.write(host, folder.path, partial(save_picture, path, picture))
        return path_of(path) if taken else None

    def end(self, host: Host) -> None:
        """Mark in the folder that the training has come to its end."""
        if self.folder is not None:
            self._attempts.write(host, self.folder.path, self.folder.end)

    def close(self) -> None:
        """Leave the folder to others."""
        if self.folder is not None:
            self.folder.close()
        self.folder = None

    def _kept(self, firing: Firing) -> list[int]:
        every = self._settings.save_maps == "all"
        return list(range(len(firing.samples)) if every else firing.samples.shown)

    def _write(self, host: Host, write: Callable[[RunFolder], None]) -> None:
        if self.folder is not None and self._settings.save_maps:
            self._attempts.write(host, self.folder.path, partial(write, self.folder))


def arrays_of(firing: Firing, kept: list[int]) -> dict[str, NDArray[Any]]:
    """Return each method's maps of the images that are kept, in half precision, logits and sinks."""
    arrays = {name: one.maps[kept].numpy().astype(np.float16) for name, one in firing.found.items()}
    first = firing.first
    logits = first.logits[kept].float().numpy()
    if firing.kind == "class" and logits.ndim == 2 and logits.shape[1] > _FEW:
        # A softmax does not change, and half a number is exact where it matters: at the likeliest classes.
        logits = (logits - logits.max(1, keepdims=True)).astype(np.float16)
    sinks = {} if first.sinks is None else {SINKS: first.sinks[kept].numpy()}
    return {**arrays, LOGITS: logits, **sinks}


def facts_of_run(settings: Settings, host: Host, display: Display, kind: Kind | None) -> dict[str, Any]:
    """Return what is trained and how it is watched, as values that JSON knows."""
    asked = settings.target
    asks = type(asked).__name__.lower() if isinstance(asked, Question) else "function"
    return {
        "model": model_name(host.model),
        "methods": settings.methods,
        "target": asked if isinstance(asked, str | int) else asks,
        "kind": kind,
        "class_names": display.class_names and [str(name) for name in display.class_names],
        "colormap": display.colormap,
        "normalization": display.colors.scale,
        "note": display.note,
        "settings": host.settings(),
        "loggers": [facts_of(logger) for logger in host.loggers],
    }


def model_name(model: nn.Module) -> str:
    """Return what its makers call a model, as `deit_tiny_patch16_224`; else its class."""
    for module in model.modules():
        name = (getattr(module, "pretrained_cfg", None) or {}).get("architecture")
        name = name or getattr(getattr(module, "config", None), "_name_or_path", None)
        if name:
            return str(name)
    return type(model).__name__

"""Writing the folder of a run: maps, logits, images, numbers, and facts about the run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from vitx.files import encode, write_atomically
from vitx.inputs.preprocessing import declared
from vitx.pictures.render import Picture
from vitx.runs import FOLDER, LOGITS, SINKS
from vitx.runs.folder import RunFolder
from vitx.targets import Question
from vitx.watch.host import Attempts, Host
from vitx.watch.loggers import facts_of
from vitx.watch.settings import Settings
from vitx.watch.showing import Display, Firing, path_of

_FEW = 100  # logits of an image, at most, that are kept in full precision


@dataclass
class Memory:
    """The state of a watch, which is saved in checkpoints."""

    fired_at: int | None = None  # the last moment of the training at which it could fire
    step: int = -1  # of the last firing in the logs; several moments may share one
    places: tuple[int, ...] | None = None  # the indices of the images in the data set
    out_of: int | None = None  # how many images the data set had
    maps: dict[str, Tensor] = field(default_factory=dict)  # of each method at the last firing, (n, h, w)
    scalars: dict[str, float] = field(default_factory=dict)  # of the last firing
    folder: str | None = None  # of the run
    run: str | None = None  # its id


class RunWriter:
    """Write all that a report needs, on rank 0; with `save_maps=False`, only pictures."""

    def __init__(self, settings: Settings, attempts: Attempts, memory: Memory) -> None:
        self._settings, self._attempts, self._memory = settings, attempts, memory
        self.folder: RunFolder | None = None  # of the run, once something is written

    def claim(self, host: Host) -> RunFolder | None:
        """Return the folder of the run, claimed at the first call; warn and return None if that fails."""
        if self.folder is None and host.leaves_files:
            with self._attempts.forgiving(host, f"cannot write to {host.run or host.root}"):
                self._take(RunFolder.claim(host.run, host.root), host)
        return self.folder

    def reopen(self, host: Host, next_step: int) -> None:
        """Continue in the folder of an interrupted run, or claim another one and report why."""
        before = self._memory.folder
        known = [Path(one) for one in (host.run and host.run / FOLDER, before) if one]
        for path in known:
            with self._attempts.forgiving(host, f"cannot continue in {path_of(path)}"):
                if not self.folder and (found := RunFolder.reopen(path, str(self._memory.run))):
                    self._take(found.go_on(next_step), host)
        same = self.folder is not None and self.folder.path in known
        if before is None or same or (folder := self.claim(host)) is None:
            return
        why = f"as {path_of(before)} is gone, in use, or holds results from after this checkpoint"
        host.inform(f"{host.name} continues in {path_of(folder.path)}, {why}")

    def _take(self, folder: RunFolder, host: Host) -> None:
        self.folder, fresh = folder, self._memory.folder is None
        self._memory.folder, self._memory.run = str(folder.path), folder.id
        if fresh and host.run and folder.path.parent != host.run.absolute():
            other = path_of(host.run)
            host.inform(f"{host.name} writes to {path_of(folder.path)}, as {other} holds another run")

    def write_display(self, host: Host, firing: Firing, display: Display) -> None:
        """Write the images that are watched from this firing on, and facts about the run."""
        samples, kept, target = firing.samples, self._kept(firing), self._settings.target
        shown = np.array([kept.index(place) for place in samples.shown])
        arrays = {"pixels": display.pixels.numpy(), "shown": shown}
        if samples.labels is not None:
            labels = samples.labels[kept]
            arrays["labels"] = (labels.float() if labels.is_floating_point() else labels).numpy()
        if not isinstance(target, str | int):
            target = type(target).__name__.lower() if isinstance(target, Question) else "function"

        def write(folder: RunFolder) -> None:
            facts = {
                "model": model_name(host.model),
                "methods": self._settings.methods,
                "target": target,
                "kind": firing.kind,
                "class_names": display.class_names and [str(name) for name in display.class_names],
                "colormap": display.colormap,
                "normalization": display.colors.scale,
                "note": display.note,
                "settings": host.settings(),
                "loggers": [facts_of(logger) for logger in host.loggers],
            }
            folder.write_facts(facts)
            folder.write_images(firing.step, arrays)

        self._write(host, write)

    def write_firing(self, host: Host, firing: Firing) -> None:
        """Write maps in half precision, logits, sinks and numbers."""
        kept, first = self._kept(firing), firing.first
        maps = {name: one.maps[kept].numpy().astype(np.float16) for name, one in firing.found.items()}
        logits = first.logits[kept].float().numpy()
        if firing.kind == "class" and logits.ndim == 2 and logits.shape[1] > _FEW:
            # This leaves the softmax unchanged, and half precision is most exact at the likeliest classes.
            logits = (logits - logits.max(1, keepdims=True)).astype(np.float16)
        arrays = {**maps, LOGITS: logits}
        if first.sinks is not None:
            arrays[SINKS] = first.sinks[kept].numpy()
        self._write(host, lambda folder: folder.write_firing(firing.step, arrays))
        self.write_numbers(host, firing.numbers, firing.step)

    def write_numbers(self, host: Host, numbers: Mapping[str, float], step: int) -> None:
        """Write the numbers of a firing together with the metrics of the training."""
        row = {"step": step, "epoch": host.epoch(), **host.metrics(), **numbers}
        self._write(host, lambda folder: folder.write_numbers(row))

    def write_picture(self, host: Host, tag: str, picture: Picture, step: int) -> list[str]:
        """Write a picture that no logger took, and return its folder; beside maps, only the last stays."""
        folder, name = self.claim(host), tag.rpartition("/")[2]
        if folder is not None:
            path = folder.path / (f"{name}.png" if self._settings.save_maps else f"{name}-{step:06d}.png")
            with self._attempts.forgiving(host, f"cannot write to {path_of(folder.path)}"):
                write_atomically(path, lambda file: encode(file, picture))
                return [str(folder.path)]
        return []

    def end(self, host: Host) -> None:
        """Mark the run as ended in its folder."""
        self._write(host, RunFolder.end, maps=False)

    def close(self) -> None:
        """Release the folder."""
        if self.folder is not None:
            self.folder.close()
        self.folder = None

    def _kept(self, firing: Firing) -> list[int]:
        every = self._settings.save_maps == "all"
        return list(range(len(firing.samples)) if every else firing.samples.shown)

    def _write(self, host: Host, write: Callable[[RunFolder], None], maps: bool = True) -> None:
        if self.folder is not None and (self._settings.save_maps or not maps):
            with self._attempts.forgiving(host, f"cannot write to {path_of(self.folder.path)}"):
                write(self.folder)


def model_name(model: nn.Module) -> str:
    """Return the published name of a model, such as `deit_tiny_patch16_224`, or else its class."""
    of_timm = (declared(model, "architecture") or {}).get("architecture")
    paths = (getattr(getattr(part, "config", None), "_name_or_path", None) for part in model.modules())
    return str(of_timm or next(filter(None, paths), type(model).__name__))

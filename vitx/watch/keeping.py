"""The folder of a run, as a watch fills it: maps, logits, images, numbers, and what the run is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from vitx.explanation import Explanation
from vitx.models.outputs import Kind
from vitx.pictures.colors import Colors
from vitx.runs import FOLDER, LOGITS, SINKS
from vitx.runs.folder import RunFolder
from vitx.targets import Question
from vitx.watch.attempts import Attempts
from vitx.watch.host import Host
from vitx.watch.images import Samples
from vitx.watch.past import Past
from vitx.watch.saying import path_of
from vitx.watch.settings import Settings
from vitx.watch.sinks import Picture, facts_of, save_picture

_FEW = 100  # logits of an image, which are kept in full precision


@dataclass(frozen=True)
class Look:
    """The images as they are shown, and what is written beside them.

    Attributes:
        pixels: of those shown, (n, H, W, 3) uint8, or frame by frame, (n, T, H, W, 3).
        colors: how these and the other images are drawn.
        class_names: in the order of the logits, or None.
        colormap: of the overlays.
        note: is written below each grid.
    """

    pixels: Tensor
    colors: Colors
    class_names: Sequence[str] | None
    colormap: str
    note: str


class Keeper:
    """Keeps what a report needs, on rank 0.

    Args:
        settings: what the user says.
        attempts: at writing.

    Attributes:
        folder: of the run; None until something is first written.
    """

    def __init__(self, settings: Settings, attempts: Attempts) -> None:
        self._settings, self._attempts = settings, attempts
        self.folder: RunFolder | None = None
        self._everything = settings.save_maps == "all"

    def claim(self, host: Host, past: Past) -> RunFolder | None:
        """Returns the folder of the run, taken now if need be; None where it cannot be, as is said."""
        if self.folder is None and host.leaves_files:
            with self._attempts.forgiving(host, f"cannot write to {host.run or host.root}"):
                self._take(RunFolder.claim(host.run, host.root), host, past)
        return self.folder

    def reopen(self, host: Host, past: Past, next_step: int) -> None:
        """Goes on in the folder of an interrupted run, or takes another and says why."""
        before, moved = past.folder, False
        known = [Path(one) for one in (host.run and host.run / FOLDER, before) if one]
        for path in known:
            with self._attempts.forgiving(host, f"cannot go on in {path_of(path)}"):
                found = None if self.folder else RunFolder.reopen(path, str(past.run))
                if found is not None:
                    self._take(found.go_on(next_step), host, past)
                    moved = self.folder is not None and self.folder.path != found.path
        if before is None or (self.folder and not moved) or (folder := self.claim(host, past)) is None:
            return
        why = f"as {path_of(before)} is gone, is written to, or holds what came after this checkpoint"
        host.inform(f"{host.name} goes on in {path_of(folder.path)}, {why}")

    def _take(self, folder: RunFolder, host: Host, past: Past) -> None:
        self.folder = folder
        fresh = past.folder is None
        past.folder, past.run = str(folder.path), folder.id
        if fresh and host.run and folder.path.parent != host.run.absolute():
            other = path_of(host.run)
            host.inform(f"{host.name} writes to {path_of(folder.path)}, as {other} holds another run")

    def keep_look(self, host: Host, samples: Samples, look: Look, kind: Kind | None, step: int) -> None:
        """Keeps the images that are watched from a step on, and what the run is."""

        def write(folder: RunFolder) -> None:
            folder.write_facts(facts_of_run(self._settings, host, look, kind))
            folder.write_images(step, images_of(samples, look, everything=self._everything))

        self._write(host, write)

    def keep_firing(
        self, host: Host, found: Mapping[str, Explanation], samples: Samples, kind: Kind | None, step: int
    ) -> None:
        """Keeps maps and logits."""
        arrays = partial(arrays_of, found, samples, kind, everything=self._everything)
        self._write(host, lambda folder: folder.write_firing(step, arrays()))

    def keep_numbers(self, host: Host, numbers: Mapping[str, float], step: int) -> None:
        """Keeps the numbers of a firing beside those of the training."""
        row = {"step": step, "epoch": host.epoch(), **host.metrics(), **numbers}
        self._write(host, lambda folder: folder.write_numbers(row))

    def keep_picture(self, host: Host, past: Past, tag: str, picture: Picture, step: int) -> str | None:
        """Writes a picture that no logger took, and returns where; where maps are kept, the last one does."""
        folder = self.claim(host, past)
        if folder is None:
            return None
        name = tag.rpartition("/")[2]
        path = folder.path / (f"{name}.png" if self._settings.save_maps else f"{name}-{step:06d}.png")
        taken = self._attempts.write(host, folder.path, partial(save_picture, path, picture))
        return path_of(path) if taken else None

    def end(self, host: Host) -> None:
        """Says in the folder that the training has come to its end."""
        self._write(host, RunFolder.end)

    def _write(self, host: Host, write: Callable[[RunFolder], None]) -> None:
        if self.folder is not None:
            self._attempts.write(host, self.folder.path, partial(write, self.folder))

    def close(self) -> None:
        """Lets go of the folder."""
        if self.folder is not None:
            self.folder.close()
        self.folder = None


def arrays_of(
    found: Mapping[str, Explanation], samples: Samples, kind: Kind | None, *, everything: bool
) -> dict[str, NDArray[Any]]:
    """Returns what `RunFolder.write_firing` takes: each method's maps, in half precision, logits and sinks.

    Args:
        found: the explanation of each method, of all samples.
        samples: the images.
        kind: what the outputs are.
        everything: whether all measured images are kept, not only those shown.
    """
    kept = slice(None) if everything else list(samples.shown)
    arrays = {name: explanation.maps[kept].numpy().astype(np.float16) for name, explanation in found.items()}
    first = next(iter(found.values()))
    logits = first.logits[kept].float().numpy()
    if kind == "class" and logits.ndim == 2 and logits.shape[1] > _FEW:
        # A softmax does not change, and half a number is exact where it matters: at the likeliest classes.
        logits = (logits - logits.max(1, keepdims=True)).astype(np.float16)
    sinks = {} if first.sinks is None else {SINKS: first.sinks[kept].numpy()}
    return {**arrays, LOGITS: logits, **sinks}


def images_of(samples: Samples, look: Look, *, everything: bool) -> dict[str, NDArray[Any]]:
    """Returns what `RunFolder.write_images` takes: the images shown, and what is known of those kept."""
    kept = list(range(len(samples))) if everything else list(samples.shown)
    arrays = {
        "pixels": look.pixels.numpy(),
        "shown": np.array([kept.index(place) for place in samples.shown]),
    }
    if samples.labels is not None:
        labels = samples.labels[kept]
        arrays["labels"] = (labels.float() if labels.is_floating_point() else labels).numpy()
    return arrays


def facts_of_run(settings: Settings, host: Host, look: Look, kind: Kind | None) -> dict[str, Any]:
    """Says what is trained and how it is watched, as values that JSON knows."""
    asked = settings.target
    asks = type(asked).__name__.lower() if isinstance(asked, Question) else "function"
    target = asked if isinstance(asked, str | int) else asks
    return {
        "model": model_name(host.model),
        "methods": settings.methods,
        "target": target,
        "kind": kind,
        "class_names": look.class_names and [str(name) for name in look.class_names],
        "colormap": look.colormap,
        "note": look.note,
        "settings": host.settings(),
        "loggers": [facts_of(sink) for sink in host.sinks],
    }


def model_name(model: nn.Module) -> str:
    """Returns what its makers call a model, as `deit_tiny_patch16_224`; else its class."""
    for module in model.modules():
        name = (getattr(module, "pretrained_cfg", None) or {}).get("architecture")
        name = name or getattr(getattr(module, "config", None), "_name_or_path", None)
        if name:
            return str(name)
    return type(model).__name__

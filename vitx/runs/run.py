"""A training run, played back: the maps of each image at each firing."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitx.attribution import telling, title_of
from vitx.evaluation.metrics import drift
from vitx.pictures import render
from vitx.pictures.captions import Caption, captions_of, classes_of
from vitx.pictures.overview import overview_of
from vitx.pictures.render import Picture
from vitx.pictures.views import Layer, laid_out

_NOTABLE = 0.005  # drift that two digits show
_ACCURACY = re.compile(r"acc(uracy)?(/dataloader_idx_0)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Run:
    """A training run: T firings that show the same n images."""

    path: Path  # of its folder, as the user gave it, without folders of this machine
    folder: Path  # the same, as a path on this machine
    facts: Mapping[str, Any]  # from `run.json`, as `vitx.watch.run_writer` writes it
    numbers: Mapping[str, Mapping[int, float]]  # tag -> step -> value
    steps: tuple[int, ...]  # (T,) steps of the firings, in order
    maps: Mapping[str, NDArray[np.float32]]  # by method, (T, n, h, w); for clips, some frames side by side
    logits: NDArray[np.float32]  # (T, n, classes), or other outputs of the model
    pixels: NDArray[np.uint8]  # (n, H, W, 3)
    labels: NDArray[Any] | None = None  # (n, ...)
    frames: int = 1  # the number of frames side by side
    before: int = 0  # the number of earlier firings, of other images, which are left out
    sinks: NDArray[np.bool_] | None = None  # (T, n, h, w), see `vitx.Explanation`

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.pixels)

    @property
    def titled(self) -> dict[str, NDArray[np.float32]]:
        """The maps by the titles of their methods."""
        return {title_of(name): maps for name, maps in self.maps.items()}

    @property
    def earlier(self) -> str:
        """The firings that are not shown, in words; "" if all are shown."""
        said = f"{self.before} steps" if self.before > 1 else "step"
        return f"the first {said}, of other images" if self.before else ""

    def tiles(self, firing: int, image: int) -> dict[str, Picture]:
        """Draw one image at a firing, an index of `steps`; return title -> picture, the input first."""
        return {title: drawn[0].numpy() for title, drawn in self._columns(firing, [image])[0].items()}

    def captions(self, firing: int) -> list[Caption]:
        """Return a caption for each image, with its prediction and its label."""
        logits = torch.from_numpy(self.logits[firing])
        labels = None if self.labels is None else torch.from_numpy(self.labels)
        return captions_of(logits, labels, self.facts.get("class_names"), self.facts.get("kind"))

    def grid(self, firing: int, images: Sequence[int], tile_width: int = render.TILE_WIDTH) -> Picture:
        """Draw the grid of some images, as the training did."""
        captions = self.captions(firing)
        columns, marks = self._columns(firing, images)
        said = [captions[image] for image in images]
        note = "; ".join(filter(None, (self.facts["note"], marks)))
        return render.grid(columns, said, self.facts["colormap"], tile_width=tile_width, note=note)

    def overview(self) -> Picture | None:
        """Draw an overview of the maps at the last firing by predicted class; return None for clips."""
        if self.frames > 1:
            return None
        method = telling(self.maps)
        pixels, maps = torch.from_numpy(self.pixels), torch.from_numpy(self.maps[method][-1])
        names = classes_of(self.captions(-1))
        return overview_of(pixels, maps, names, self.facts["colormap"], title_of(method))

    def heading(self, firing: int) -> str:
        """Return the step of a firing and the last validation accuracy, such as `step 437, accuracy 91%`."""
        step, values = self.steps[firing], self.numbers.get(accuracy_tag(self.numbers) or "", {})
        accuracy = values.get(max((known for known in values if known <= step), default=-1))
        if accuracy is None:
            return f"step {step}"
        # Some trainings log shares, some percentages.
        return f"step {step}, accuracy {accuracy if accuracy > 1 else 100 * accuracy:.0f}%"

    def position(self, firing: int) -> float:
        """Return the share of the training that precedes a firing."""
        return self.steps[firing] / max(self.steps[-1], 1)

    def nearest(self, position: float) -> int:
        """Return the firing nearest to a share of the training."""
        return min(range(len(self.steps)), key=lambda firing: abs(self.position(firing) - position))

    def _columns(self, firing: int, images: Sequence[int]) -> tuple[dict[str, torch.Tensor], str]:
        """Draw the input and the overlays, title -> (n, H, W, 3), and describe the marks in them."""
        shown = list(images)
        pixels = torch.from_numpy(self.pixels[shown])
        marks = None if self.sinks is None else torch.from_numpy(self.sinks[firing, shown])
        maps = {title: torch.from_numpy(of_all[firing, shown]) for title, of_all in self.titled.items()}
        if self.frames == 1:
            layers = {title: Layer(values, sinks=marks) for title, values in maps.items()}
            return laid_out(pixels, layers, colormap=self.facts["colormap"])
        return {"input": pixels} | {title: self._overlaid(pixels, one) for title, one in maps.items()}, ""

    def _overlaid(self, pixels: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """Lay maps over side-by-side frames, one frame at a time, so that no map extends into the next."""
        clips, apart = (one.unflatten(2, (self.frames, -1)).movedim(2, 1) for one in (pixels, maps))
        drawn = Layer(apart).over(clips, self.facts["colormap"], signed=False)
        return Layer(maps).marked(drawn.movedim(1, 2).flatten(2, 3))


def rank(run: Run) -> dict[int, str]:
    """Rank images: wrong at the end, most confident first, then those whose maps moved most.

    Return image -> the reason for its rank, in words.
    """
    found = []
    for image, caption in enumerate(run.captions(-1)):
        moved, reason = _largest_move(run, image)
        sure = -1.0  # unless it is wrong
        if caption.right is False:
            sure = caption.probability or 0.0
            reason = f"wrong at the end{f', and {sure:.0%} sure' if sure else ''}; {reason}"
        found.append((-sure, -moved, image, reason))
    return {image: reason for *_, image, reason in sorted(found)}


def _largest_move(run: Run, image: int) -> tuple[float, str]:
    """Return the largest drift of an image's maps between successive firings, and where it is, in words."""
    largest, said = 0.0, ""
    for title, maps in run.titled.items():
        of_image = torch.from_numpy(maps[:, image])
        drifts = drift(of_image[1:], of_image[:-1]).tolist()
        for moved, (before, after) in zip(drifts, pairwise(run.steps), strict=True):
            if moved > largest:
                largest, said = moved, f"{title} moved most from step {before} to {after} (drift {moved:.2f})"
    return largest, f"its {said}" if largest >= _NOTABLE else "its maps stand still"


def accuracy_tag(tags: Iterable[str]) -> str | None:
    """Choose the tag that is most likely the validation accuracy.

    Example:
        >>> accuracy_tag(["train/accuracy", "val_clean/accuracy", "val/accuracy"])
        'val/accuracy'
    """
    found = [tag for tag in tags if "val" in tag.lower() and _ACCURACY.search(tag)]
    return min(found, key=len, default=None)

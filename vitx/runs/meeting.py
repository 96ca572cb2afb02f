"""Images that several runs watch by the same methods: which, and where the runs disagree most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from vitx.evaluation import metrics
from vitx.runs.run import Run

_THUMBNAIL = 16, 16  # pixels
_TOLERANCE = 12  # of 255: a picture that was enlarged or written anew differs a little


@dataclass(frozen=True)
class Meeting:
    """Images that the same runs watch."""

    titles: tuple[str, ...]  # of their methods, sorted
    note: str  # the words below their maps
    images: list[dict[int, int]]  # of each, the run's number -> the number that the image has in the run

    @property
    def runs(self) -> list[int]:
        """The runs' numbers."""
        return list(self.images[0])


def meetings(runs: Sequence[Run]) -> list[Meeting]:
    """Put the images together that the same runs watch; those of most runs come first."""
    found: dict[tuple[tuple[int, ...], tuple[str, ...], str], Meeting] = {}
    for watched in _same_images(runs):
        kinds: dict[tuple[tuple[str, ...], str], dict[int, int]] = {}
        for number, image in watched.items():  # maps are compared with those by the same methods
            kind = tuple(sorted(runs[number].maps)), runs[number].note
            kinds.setdefault(kind, {})[number] = image
        for (titles, note), images in kinds.items():
            found.setdefault((tuple(images), titles, note), Meeting(titles, note, [])).images.append(images)
    return sorted(found.values(), key=lambda meeting: (-len(meeting.runs), meeting.runs))


def _same_images(runs: Sequence[Run]) -> list[dict[int, int]]:
    """Return each image as the run's number -> its number there."""
    known: dict[int, list[tuple[NDArray[np.int16], dict[int, int]]]] = {}  # by the form of the picture
    for number, run in enumerate(runs):
        for image in range(run.count):
            picture = run.input(image)
            small = Image.fromarray(picture).resize(_THUMBNAIL, Image.Resampling.BOX)
            thumbnail = np.asarray(small).astype(np.int16)
            alike = known.setdefault(round(16 * picture.shape[0] / picture.shape[1]), [])
            for seen, watched in alike:
                if number not in watched and np.abs(seen - thumbnail).max() <= _TOLERANCE:
                    watched[number] = image
                    break
            else:
                alike.append((thumbnail, {number: image}))
    return [watched for alike in known.values() for _, watched in alike]


def disagreement(runs: Sequence[Run], images: Mapping[int, int]) -> tuple[int, float]:
    """Measure how much runs disagree at their ends about an image, which they know by these numbers.

    Returns:
        The number of classes that they name beyond one, and the distance of their maps from the mean of all:
        the mean over runs and methods of 1 - cosine.
    """
    named = {runs[number].captions(-1)[image].prediction for number, image in images.items()}
    apart = []
    for title in runs[next(iter(images))].maps:
        last = [torch.from_numpy(runs[number].maps[title][-1, image]) for number, image in images.items()]
        small = [interpolate(one[None, None], _THUMBNAIL, mode="bilinear")[0] for one in last]
        maps = torch.cat([one / one.sum().clamp_min(torch.finfo(one.dtype).tiny) for one in small])
        apart.append(metrics.drift(maps, maps.mean(0, keepdim=True).expand_as(maps)).mean().item())
    return len(named) - 1, sum(apart) / len(apart)

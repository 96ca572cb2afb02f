"""Which images of a run are worth a look first, and why."""

from dataclasses import dataclass

import torch

from vitx import metrics
from vitx.methods import title_of
from vitx.pictures.captions import Caption
from vitx.runs.saved import SavedMaps

_NOTABLE = 0.005  # drift that two digits show


@dataclass(frozen=True)
class Ranked:
    """An image with the reason for its place.

    Attributes:
        image: its number.
        reason: in words.
    """

    image: int
    reason: str


def rank(saved: SavedMaps, captions: list[Caption]) -> list[Ranked]:
    """Puts those first that are wrong at the end, the surest of them in front, then those that moved most.

    Args:
        saved: the maps of all firings.
        captions: what the model says of each image at the last firing.
    """
    moves = [_largest_move(saved, image) for image in range(len(saved.pixels))]

    def key(image: int) -> tuple[bool, float, float]:
        caption = captions[image]
        wrong = caption.right is False
        return not wrong, -(caption.probability or 0) if wrong else 0, -moves[image][0]

    return [
        Ranked(image, "; ".join(filter(None, (_verdict(captions[image]), moves[image][1]))))
        for image in sorted(range(len(moves)), key=key)
    ]


def _verdict(caption: Caption) -> str:
    if caption.right is not False:
        return ""
    sure = "" if caption.probability is None else f", and {caption.probability:.0%} sure"
    return f"wrong at the end{sure}"


def _largest_move(saved: SavedMaps, image: int) -> tuple[float, str]:
    """Returns the largest drift of a map between two firings, and says where it was."""
    moves = []
    for name, maps in saved.maps.items():
        of_image = torch.from_numpy(maps[:, image])
        drifts = metrics.drift(of_image[1:], of_image[:-1]).tolist() if len(of_image) > 1 else []
        title = title_of(name)
        for drift, before, after in zip(drifts, saved.steps, saved.steps[1:], strict=False):
            moves.append((drift, f"its {title} moved most from step {before} to {after} (drift {drift:.2f})"))
    largest = max(moves, default=(0.0, ""))
    return largest if largest[0] >= _NOTABLE else (largest[0], "its maps stand still")

"""The images of a run that are worth a look first, and why."""

import torch

from vitx.evaluation import metrics
from vitx.runs.run import Run

_NOTABLE = 0.005  # drift that two digits show


def rank(run: Run) -> dict[int, str]:
    """Put those first that are wrong at the end, the surest of them in front, then those that moved most.

    Each image has the reason for its place, in words.
    """
    found: list[tuple[tuple[bool, float, float], int, str]] = []
    for image, caption in enumerate(run.captions(-1)):
        moved, reason = _largest_move(run, image)
        wrong, sure = caption.right is False, caption.probability
        if wrong:
            reason = f"wrong at the end{'' if sure is None else f', and {sure:.0%} sure'}; {reason}"
        found.append(((not wrong, -(sure or 0) if wrong else 0, -moved), image, reason))
    return {image: reason for _, image, reason in sorted(found)}


def _largest_move(run: Run, image: int) -> tuple[float, str]:
    """Return the largest drift of a map between two firings, and its place in words."""
    largest, said = 0.0, ""
    for title, maps in run.maps.items():
        of_image = torch.from_numpy(maps[:, image])
        drifts = metrics.drift(of_image[1:], of_image[:-1]).tolist() if len(of_image) > 1 else []
        for drift, before, after in zip(drifts, run.steps, run.steps[1:], strict=False):
            if drift > largest:
                largest, said = drift, f"{title} moved most from step {before} to {after} (drift {drift:.2f})"
    return largest, f"its {said}" if largest >= _NOTABLE else "its maps stand still"

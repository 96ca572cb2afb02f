"""A run of training, read from wherever it was logged."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitx.runs.logged import Curve
from vitx.runs.playback import Playback

_ACCURACY = re.compile(r"acc(uracy)?(/dataloader_idx_0)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Run:
    """A run of training.

    Attributes:
        path: where it was logged: its folder, or the store with the names of experiment and run.
        playback: its images at each firing.
        scalars: tag -> curve.
        config: name -> text in YAML, of its settings.
    """

    path: Path
    playback: Playback
    scalars: Mapping[str, Curve]
    config: Mapping[str, str]

    def accuracy(self, step: int) -> float | None:
        """Returns the accuracy in validation at a step, or the last before it; None where there is none."""
        curve = self.scalars.get(accuracy_tag(self.scalars) or "")
        return None if curve is None else curve.at(step)

    def heading(self, firing: int) -> str:
        """Says where in the training a firing is, as `step 437, accuracy 91%`."""
        step = self.playback.steps[firing]
        accuracy = self.accuracy(step)
        return f"step {step}" if accuracy is None else f"step {step}, accuracy {_percent(accuracy)}"

    def position(self, firing: int) -> float:
        """Where in the training a firing is, in [0, 1]."""
        steps = self.playback.steps
        return steps[firing] / max(steps[-1], 1)

    def nearest(self, position: float) -> int:
        """Returns the firing that is nearest to a position in the training."""
        firings = range(len(self.playback.steps))
        return min(firings, key=lambda firing: abs(self.position(firing) - position))


def accuracy_tag(tags: Iterable[str]) -> str | None:
    """Chooses the tag that is most likely the accuracy in validation.

    Example:
        >>> accuracy_tag(["train/accuracy", "val_clean/accuracy", "val/accuracy", "val/loss"])
        'val/accuracy'
        >>> accuracy_tag(["valid_top1_acc", "train_acc"]), accuracy_tag(["train_acc"])
        ('valid_top1_acc', None)
    """
    found = [tag for tag in tags if "val" in tag.lower() and _ACCURACY.search(tag)]
    return min(found, key=len, default=None)


def names_apart(paths: Sequence[Path]) -> list[str]:
    """Names runs by the part of their paths that tells them apart.

    Example:
        >>> names_apart([Path("logs/demo/version_0"), Path("logs/shortcut/version_0")])
        ['demo', 'shortcut']
        >>> names_apart([Path("logs/demo/version_0"), Path("logs/demo/version_1")])
        ['version_0', 'version_1']
        >>> names_apart([Path("logs/demo/version_0")])
        ['demo/version_0']
    """
    whole = [list(path.resolve().parts) for path in paths]
    apart = [list(parts) for parts in whole]
    for end in (0, -1):
        while all(apart) and len({parts[end] for parts in apart}) == 1:
            for parts in apart:
                parts.pop(end)
    return ["/".join(part or full[-2:]) for part, full in zip(apart, whole, strict=True)]


def _percent(accuracy: float) -> str:
    """Some log shares, some log percent."""
    return f"{accuracy:.0%}" if accuracy <= 1 else f"{accuracy:.0f}%"

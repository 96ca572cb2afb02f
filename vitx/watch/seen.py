"""What the user's own step showed of a batch: its images, its labels, and how the model is called."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vitx.models.outputs import Kind
from vitx.watch.origins import Comparison
from vitx.watch.replay import WHOLE, Replay
from vitx.watch.step import StepWatch


@dataclass(frozen=True)
class Seen:
    """What was seen of one step.

    Attributes:
        where: the step.
        images: the paths of the images that the output depends on, in the order of the batch.
        size: how many images there were.
        output: makes the output from the tensors of a batch.
        kind: what it is compared as; None where no comparison was seen.
        truth: makes what it is compared with; None where that is not known.
        logits: makes logits of an output of probabilities; None for others.
    """

    where: str
    images: tuple[str, ...]
    size: int
    output: Replay
    kind: Kind | None = None
    truth: Replay | None = None
    logits: Callable[[Tensor], Tensor] | None = None

    def run(self, model: nn.Module, leaves: Mapping[str, Tensor], count: int) -> Tensor:
        """Returns the logits of a model whose part in the step was seen, (B, ...)."""
        found: Tensor = self.output(leaves, model, count, self.size)
        return found if self.logits is None else self.logits(found)

    def runs(self, model: nn.Module, paths: set[str]) -> bool:
        """Returns whether a model and the tensors of a batch at these paths are all that it takes."""
        return self.output.fits(model) and paths.issuperset(self.output.leaves)

    def labels(self, leaves: Mapping[str, Tensor], count: int) -> Tensor | None:
        """Returns what is true, (B, ...); None where it cannot be told of each image."""
        if self.truth is None or not all(path in leaves for path in self.truth.leaves):
            return None
        found: Tensor = self.truth(leaves, nn.Identity(), count, self.size)
        found = found.long() if found.dtype == torch.bool else found
        return found if found.ndim and len(found) == count else None


def seen_in(watch: StepWatch, where: str) -> Seen | None:
    """Returns what a watch saw; None where no model ran on images."""
    found = [one for one in watch.comparisons if one.output in watch.places]
    best = min(found, key=lambda one: one.rank, default=None)
    if watch.failed or not (best or watch.outputs):
        return None
    if best is not None:
        output = watch.replay(watch.places[best.output])
    else:
        first, *others = watch.outputs[0]
        output = watch.replay((first[0], WHOLE) if others else first)
    images = tuple(path for path in watch.leaves if path in watch.images and path in output.leaves)
    if not images:
        return None
    seen = Seen(where, images, len(watch.leaves[images[0]]), output)
    if best is None:
        return seen
    truth = watch.replay(watch.places[best.truth]) if best.truth in watch.places else None
    return replace(seen, kind=_kind(watch, best), truth=truth, logits=_logits(watch, best))


def _kind(watch: StepWatch, best: Comparison) -> Kind:
    place = watch.places[best.output]
    shape = watch.shapes[place]
    if len(shape) not in (1, 2):
        return "features"
    if best.kind == "numbers":
        end = best.ends[-1] if best.ends else watch.probable.get(place, "")
        ended: dict[str, Kind] = {"sigmoid": "shares", "softmax": "class"}
        return ended.get(end, "numbers")
    single = len(shape) == 1 or shape[1] == 1
    return "class" if single and best.kind == "classes" else best.kind


def _logits(watch: StepWatch, best: Comparison) -> Callable[[Tensor], Tensor] | None:
    """Returns what makes logits of an output that a loss takes for probabilities."""
    if watch.places[best.output] in watch.probable:
        return None  # an explanation begins before the function that ends the model
    if best.name == "binary_cross_entropy" and not best.ends:
        return _logit
    return torch.log if best.ends[:1] == ("log",) else None


def _logit(shares: Tensor) -> Tensor:
    """As torch.logit, in calls that the tape follows."""
    least = torch.finfo(shares.dtype).eps
    shares = shares.clamp(least, 1 - least)
    return shares.log() - (1 - shares).log()

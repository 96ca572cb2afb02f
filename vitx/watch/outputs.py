"""The output of the model in a training: what it is, and what fits it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vitx.models.outputs import Kind, beyond, declared_classes, kind_of, told_apart
from vitx.watch.images import Samples
from vitx.watch.observed import ObservedStep


@dataclass(frozen=True)
class Output:
    """The output of one image."""

    kind: Kind | None = None  # None as long as that is not known
    width: int = 0  # how many numbers it has
    words: str = ""  # what it is

    @classmethod
    def of(cls, logits: Tensor, kind: Kind) -> "Output":
        """Describe an output, (B, ...)."""
        sizes = " x ".join(map(str, logits.shape[1:]))
        words = "features" if logits.ndim < 3 else f"{sizes} numbers for each image"
        return cls(kind, logits[0].numel(), words)

    @property
    def of_classes(self) -> bool:
        """True for scores of classes."""
        return self.kind in ("class", "classes")

    @property
    def of_numbers(self) -> bool:
        """True for the output of a regression."""
        return self.kind in ("numbers", "shares")

    @property
    def predicts(self) -> bool:
        """True if it tells what the model predicts: a class or one number."""
        return self.kind != "features" and not (self.of_numbers and self.width > 1)

    def fits(self, names: Sequence[str] | None) -> bool:
        """Return whether there is a name for each class."""
        return names is None or not self.of_classes or len(names) >= max(self.width, 2)

    def doubts(self, labels: Tensor | None, names: Sequence[str] | None) -> Iterator[str]:
        """Yield what does not fit it, and what to do about it."""
        if names is not None and not self.fits(names):
            yield (
                f"{len(names)} names are left out, as there are {self.width} outputs: give class_names "
                "with one for each"
            )
        if labels is not None and beyond(labels, self.width):
            yield f"label {int(labels.max())} is beyond the {self.width} outputs"


def kind_in_training(
    logits: Tensor,
    samples: Samples,
    model: nn.Module,
    observed: ObservedStep | None,
    class_names: Sequence[str] | None,
    names: Sequence[str] | None,
    of_class: bool,
) -> Kind:
    """Return the kind of an output: as the user's step compares it, else as labels, names and model tell.

    The step is None where it is not what is run. `class_names` are the user's, `names` those of whoever gives
    them; `of_class` says whether maps of a class are asked for.
    """
    flat = logits.ndim in (1, 2)
    if observed is not None and observed.kind is not None:
        seen = told_apart(observed.kind, logits[0].numel(), samples.labels)
        return seen if flat else "features"
    declared = {*declared_classes(model), *([len(class_names)] if class_names else [])}
    counts = range(len(names), len(names) + 1) if names else samples.counts
    kind = kind_of(logits, samples.labels, counts, frozenset(declared))
    if of_class:
        return "class" if flat and kind == "features" else kind
    uncompared = samples.unlabelled or observed is not None
    return "features" if uncompared and logits.shape[-1] not in {*declared, *(counts or ())} else kind

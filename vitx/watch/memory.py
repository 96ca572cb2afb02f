"""Memory of a watch: its last firing, which a resumed run must know."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitx.watch.images import Samples

_TOLERANCE = 0.05  # of thumbnails: another version of a decoder changes the last bits of an image


@dataclass
class Memory:
    """The state of a watch, which goes into checkpoints."""

    fired_at: int | None = None  # the moment of the training when it last could fire
    step: int = -1  # that the last firing was logged at, which may be that of several moments
    places: tuple[int, ...] | None = None  # of the images in the data set
    out_of: int | None = None  # how many images the data set had
    thumbnails: Tensor | None = None  # of the images, (n, C, 4, 4)
    maps: dict[str, Tensor] = field(default_factory=dict)  # each method's, at the last firing, (n, h, w)
    scalars: dict[str, float] = field(default_factory=dict)  # of the last firing
    folder: str | None = None  # of the run
    run: str | None = None  # its id

    def remember(self, samples: Samples) -> str | None:
        """Remember these images; return a sentence if they are not those of before, or their data set."""
        before, thumbnails = self.thumbnails, samples.thumbnails()
        change = None
        if before is not None and self.out_of != samples.out_of:
            change = f"the data set has changed: it has {samples.out_of} images and had {self.out_of}"
        elif before is not None and not (
            before.shape == thumbnails.shape and torch.allclose(before, thumbnails, atol=_TOLERANCE)
        ):
            change = "watches other images than before: the data set has changed"
        self.places, self.out_of, self.thumbnails = samples.places, samples.out_of, thumbnails
        return change

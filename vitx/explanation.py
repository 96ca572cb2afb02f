"""The result of `vitx.explain`: maps of a batch of images, which can be drawn, saved and loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.files import PICTURES, encode, savez, write_or_say
from vitx.inputs.reading import readable
from vitx.pictures.drawing import Drawing
from vitx.pictures.gif import write_gif

_MOST_SHOWN = 16  # images in the picture that a notebook displays
_NOT_SAVED = {"images", "viewer"}


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(Drawing):
    """The maps that one method computed for a batch of images.

    Iterating and indexing give explanations of single images. A notebook shows each image next to its map.

    The methods that draw share their arguments: `images`, the explained images, if they were not kept;
    `mean` and `std`, to undo a normalization that the model does not declare; `bands`, the one or three
    channels to show, by default the first three, or the mean of two; `colormap`, by its matplotlib name;
    `signed`, to show what supports the score in red and what opposes it in blue; `class_names`, by default
    those that the model declares, or of ImageNet for 1,000 classes, otherwise numbers.

    Attributes:
        maps: (B, h, w), >= 0, one value per patch, on the model's device; float32, or float64 for a
            float64 model. (B, t, h, w) for clips and volumes, (B, f, t) for spectrograms.
        logits: (B, classes), the output of the model, in the precision of the maps.
        target: (B,) long, the class that each map explains; None if the method or the target has no class.
        image_size: height and width of the images, in pixels; for clips, preceded by the number of frames.
        images: (B, C, H, W), or clips, volumes, spectrograms; None if they were not kept.
        mean: the mean subtracted from each channel of the images, in units of [0, 1].
        std: the standard deviation by which each channel was then divided.
        method: the name of the method.
        conservation: (B,), the share of the relevance that reaches the image and the model's own tokens, or
            of the score that image and constants add up to: 1 up to rounding, or an error is raised. It
            verifies the backward pass, not the model: see [what it promises](../trust.md).
        signed: same shape as the maps, negative where a patch opposes the class; None for unsigned methods.
        channels: the dimension of the images that holds their channels; None if there is none.
        captions: a line about the target for each image; None to show the prediction instead.
        boxes: (B, 4), the box that the target refers to, x0, y0, x1, y1 in pixels; None if there is none.
        paired: True if consecutive images form pairs, as those of `vitx.targets.similar_to` do.
        sinks: (B, h, w) bool, patches that most queries of most layers attend to, see
            [Sinks](../trust.md#sinks). None if they cannot be determined, as in a windowed model.
        objects: (B, Q), the confidence of each query of a detector; None for other models.
        class_names: the names of the classes that the model declares; None if it declares none.
        viewer: builds the page of `view`, and holds a weak reference to the model; None if there is none.
    """

    def __repr__(self) -> str:
        return f"Explanation({self.method!r}, maps {tuple(self.maps.shape)} of images {self.image_size})"

    def __len__(self) -> int:
        return len(self.maps)

    def __iter__(self) -> "Iterator[Explanation]":
        return (self[place] for place in range(len(self)))

    def __getitem__(self, part: int | slice | Sequence[int] | Tensor) -> "Explanation":
        """Return the explanation of one image, as a batch of one, or of several images."""
        places = range(len(self))[part] if isinstance(part, (int, slice)) else part
        rows = torch.as_tensor(places, device="cpu").reshape(-1)
        rows = torch.arange(len(self), device="cpu")[rows if rows.dtype == torch.bool else rows.long()]
        kept = {name: one[rows.to(one.device)] for name, one in self._tensors().items()}
        if self.captions is not None:
            kept["captions"] = [self.captions[row] for row in rows]
        first, second = rows[::2], rows[1::2]
        pairs = len(rows) % 2 == 0 and bool(((first % 2 == 0) & (second == first + 1)).all())
        return replace(self, **kept, paired=self.paired and pairs)

    def __getstate__(self) -> dict[str, Any]:
        """Drop the viewer when pickling: its model may not exist where this is unpickled."""
        return vars(self) | {"viewer": None}

    def to(self, device: torch.device | str) -> "Explanation":
        """Return this explanation, with its images, on a device."""
        return replace(self, **{name: one.to(device) for name, one in self._tensors().items()})

    def cpu(self) -> "Explanation":
        """Return this explanation, with its images, in host memory."""
        return self.to("cpu")

    def without_images(self) -> "Explanation":
        """Return this explanation without a viewer and without the images, which take the most memory."""
        return replace(self, images=None, viewer=None)

    def view(self, class_names: Sequence[str] | None = None) -> Any:
        """Build an interactive page that shows where each patch attends, by layer and head.

        A notebook displays it, and its `save` writes it to one file. Explanations do not keep attention, so
        it is recorded again: the model must still exist, and be unchanged.
        """
        if self.viewer is None or self.images is None:
            said = "a page needs the model and the images, which explanations of a DataLoader or a file lack"
            raise VitxError(f"{said}: explain some images and view the result")
        return self.viewer(self, class_names)

    def save(self, path: str | Path, **options: Any) -> None:
        """Save a picture (.png, .jpg, .webp), an interactive page (.html), a film (.gif) or arrays (.npz).

        The file is written atomically. `vitx.load` reads .npz files, which do not contain the images. The
        options are those of `picture`, `view` or `film`.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in PICTURES:
            drawn = self.picture(**options)
            write_or_say(path, lambda file: encode(file, drawn, suffix))
        elif suffix == ".html":
            self.view(**options).save(path)
        elif suffix == ".gif":
            write_gif(path, self.film(**options))
        elif suffix == ".npz":
            arrays = {
                name: one.cpu().numpy() if isinstance(one, Tensor) else np.array(one)
                for name, one in vars(self).items()
                if one is not None and name not in _NOT_SAVED
            }
            write_or_say(path, lambda file: savez(file, arrays))
        else:
            known = ", ".join((*PICTURES, ".html", ".gif"))
            raise VitxError(f"an explanation is saved as {known} or .npz, found {path}")

    def _repr_png_(self) -> bytes | None:
        """Return the picture that a notebook displays, or None if the images were not kept."""
        if self.images is None:
            return None
        file = BytesIO()
        encode(file, self[:_MOST_SHOWN].picture())
        return file.getvalue()

    def _tensors(self) -> dict[str, Any]:
        """Return the fields that are tensors, with one row per image, by name."""
        return {name: one for name, one in vars(self).items() if isinstance(one, Tensor)}


def load(path: str | Path) -> Explanation:
    """Load an explanation, without its images, from a .npz file of `Explanation.save`."""
    with readable(Path(path)), np.load(path, allow_pickle=False) as arrays:
        found: dict[str, Any] = dict(arrays)
    known = {one.name: one.type for one in fields(Explanation) if one.name not in _NOT_SAVED}
    if not {"maps", "logits", "image_size", "method"} <= found.keys() <= known.keys():
        raise VitxError(f"{path} is not a saved explanation: it holds {', '.join(found)}")
    for name, array in found.items():
        value = array.tolist()
        found[name] = tuple(value) if isinstance(value, list) else value
        if known[name] in (Tensor, Tensor | None):
            found[name] = torch.from_numpy(array)
    absent: dict[str, Any] = dict.fromkeys(known)
    return Explanation(**absent | found)


def join(parts: Sequence[Explanation]) -> Explanation:
    """Concatenate the explanations of several batches, with the images if all of them have theirs."""
    tensors = [part._tensors() for part in parts]
    joined: dict[str, Any] = {
        name: torch.cat([one[name] for one in tensors]) if all(name in one for one in tensors) else None
        for name in tensors[0]
    }
    said = [one for part in parts for one in part.captions or ()]
    return replace(parts[0].without_images(), **joined, captions=said or None)

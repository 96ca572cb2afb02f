"""The result of `vitx.explain`: maps of a batch of images, drawn, saved and loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitx.errors import VitxError, failure
from vitx.files import PICTURES, encode, savez, write_or_say
from vitx.pictures.drawing import Drawing
from vitx.pictures.gif import write_gif

_MOST_SHOWN = 16  # images, where a notebook asks for a picture
_NOT_SAVED = {"images", "viewer"}


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(Drawing):
    """The maps that one method found in a batch of images.

    Iterating and indexing give explanations of single images. A notebook shows each image beside its map.

    All that draws takes the same arguments: `images`, those that were explained, where they were not kept;
    `mean` and `std`, to undo a normalisation that the model does not declare; `bands`, the channels to show,
    one or three, by default the first three, and of two channels their mean; `colormap`, a name of
    matplotlib's; `signed`, to show what speaks for the score in red and against it in blue; `class_names`,
    by default ImageNet's for 1,000 classes, else numbers.

    Attributes:
        maps: (B, h, w), >= 0, one value per patch, on the model's device; float32, or float64 for a
            float64 model. (B, t, h, w) of clips and volumes, (B, f, t) of spectrograms.
        logits: (B, classes), the output of the model, in the precision of the maps.
        target: (B,) long, the class of each map; None where the method or the target knows no class.
        image_size: height and width of the images, in pixels; of clips, frames come first.
        images: (B, C, H, W), or clips, volumes, spectrograms; None where they are not kept.
        mean: subtracted from each channel of the images, in units of [0, 1].
        std: then divided by, for each channel.
        method: the name of the method.
        conservation: (B,), the share of the relevance that arrived at the image and the model's own tokens,
            or of the score that image and constants add up to: 1 up to rounding, else an error was raised.
            It checks the way back, not the model: see [what it promises](../trust.md).
        signed: of the shape of the maps, below 0 where a patch speaks against the class; None: no sign.
        channels: the dimension of the images that holds their channels; None: there is none.
        captions: a line for each image, of the target; None: a picture shows the prediction.
        boxes: (B, 4), the place that the target is about: x0, y0, x1, y1 in pixels; None: it is no box.
        paired: True if two images each belong together, as those of `vitx.targets.similar_to`.
        sinks: (B, h, w) bool, patches that most queries of most layers attend to, whatever they look for
            (Darcet et al. 2024, arXiv 2309.16588): a rollout is bright there without a reason in the
            picture. None where they cannot be told, as in a windowed model.
        objects: (B, Q), the confidence of each query of a detector; None: it is no detector.
        viewer: makes the page of `view`; it holds the model weakly. None: there is none.
    """

    def __repr__(self) -> str:
        return f"Explanation({self.method!r}, maps {tuple(self.maps.shape)} of images {self.image_size})"

    def __len__(self) -> int:
        return len(self.maps)

    def __iter__(self) -> "Iterator[Explanation]":
        return (self[place] for place in range(len(self)))

    def __getitem__(self, part: int | slice | Sequence[int] | Tensor) -> "Explanation":
        """Return the explanation of one image, as a batch of one, or of some."""
        places = range(len(self))[part] if isinstance(part, (int, slice)) else part
        rows = torch.as_tensor(places).cpu().reshape(-1)
        rows = torch.arange(len(self))[rows if rows.dtype == torch.bool else rows.long()]
        kept = {name: one[rows.to(one.device)] for name, one in self._tensors().items()}
        if self.captions is not None:
            kept["captions"] = [self.captions[row] for row in rows]
        first, second = rows[::2], rows[1::2]
        pairs = len(rows) % 2 == 0 and bool(((first % 2 == 0) & (second == first + 1)).all())
        return replace(self, **kept, paired=self.paired and pairs)

    def __post_init__(self) -> None:
        """Let the logits of a detector tell `vitx.targets.best_queries` which objects are the surest."""
        if self.objects is not None:
            self.logits.objects = self.objects  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the viewer: the model may be gone where this is read."""
        return vars(self) | {"viewer": None}

    def to(self, device: torch.device | str) -> "Explanation":
        """Return the same on a device, with the images."""
        return replace(self, **{name: one.to(device) for name, one in self._tensors().items()})

    def cpu(self) -> "Explanation":
        """Return the same in host memory, with the images."""
        return self.to("cpu")

    def without_images(self) -> "Explanation":
        """Return the same without the images, which take the most memory, and without a viewer."""
        return replace(self, images=None, viewer=None)

    def view(self, class_names: Sequence[str] | None = None) -> Any:
        """Make a page to click: which patch looks where, in which layer, by which head.

        A notebook shows it, and its `save` writes it to one file. The attention is recorded anew, so that no
        explanation keeps it: the model has to be there still, and the same.

        Raises:
            VitxError: The model or the images are gone, or there is nothing that can be pointed at.
        """
        if self.viewer is None or self.images is None:
            raise VitxError(
                "a page needs the model and the images, and this explanation has none, as that of a "
                "DataLoader or of a file: explain some images, and view that"
            )
        return self.viewer(self, class_names)

    def save(self, path: str | Path, **options: Any) -> None:
        """Write a picture (.png, .jpg, .webp), a page to click (.html), a film (.gif), or arrays (.npz).

        The file is whole, or there is none. `vitx.load` reads arrays back; the images are not among them.
        Options are those of `picture`, `view` or `film`.

        Raises:
            VitxError: The name ends otherwise, or the file cannot be written; or as for what is written.
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
        """Return the picture that a notebook shows; None where the images were not kept."""
        if self.images is None:
            return None
        file = BytesIO()
        encode(file, self[:_MOST_SHOWN].picture())
        return file.getvalue()

    def _tensors(self) -> dict[str, Any]:
        """Return all that has a row for each image, by the names of the fields."""
        return {name: one for name, one in vars(self).items() if isinstance(one, Tensor)}


def load(path: str | Path) -> Explanation:
    """Read the explanation that `Explanation.save` wrote as .npz: all but the images.

    Raises:
        VitxError: There is no such file, or it holds something else.
    """
    with failure(f"{path} could not be read"), np.load(path, allow_pickle=False) as arrays:
        found: dict[str, Any] = dict(arrays)
    known = {one.name: one.type for one in fields(Explanation) if one.name not in _NOT_SAVED}
    if not {"maps", "logits", "image_size", "method"} <= found.keys() <= known.keys():
        raise VitxError(f"{path} is no explanation that was saved: it holds {', '.join(found)}")
    for name, array in found.items():
        value = array.tolist()
        found[name] = tuple(value) if isinstance(value, list) else value
        if known[name] in (Tensor, Tensor | None):
            found[name] = torch.from_numpy(array)
    absent: dict[str, Any] = dict.fromkeys(known)
    return Explanation(**absent | found)


def join(parts: Sequence[Explanation]) -> Explanation:
    """Join the explanations of several batches, with their images where all keep them."""
    tensors = [part._tensors() for part in parts]
    joined: dict[str, Any] = {
        name: torch.cat([one[name] for one in tensors]) if all(name in one for one in tensors) else None
        for name in tensors[0]
    }
    said = [one for part in parts for one in part.captions or ()]
    return replace(parts[0].without_images(), **joined, captions=said or None)

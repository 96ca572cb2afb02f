"""What a method found in a batch of images, and how to look at it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitx.errors import VitxError
from vitx.files import encode, savez, write_or_say, write_png

if TYPE_CHECKING:
    from vitx.pictures.views import View

_MOST_SHOWN = 16  # images, where a notebook asks for a picture


@dataclass(frozen=True, eq=False)
class Explanation:
    """What one method found in a batch of images.

    A notebook shows it as a picture: each image beside its map.

    Attributes:
        maps: (B, h, w), >= 0, one value per patch, on the model's device; float32, or float64 for a
            float64 model. (B, t, h, w) of clips and volumes, (B, f, t) of spectrograms.
        logits: (B, classes), what the model put out, in the precision of the maps.
        target: (B,) long, the class that each map is about; None for methods without a class and for
            targets that are a function.
        image_size: height and width of the images, in pixels; of clips, frames come first.
        images: (B, C, H, W), or what else was explained; None where they are not kept, as those of a
            DataLoader.
        mean: what was subtracted from each channel of the images, in units of [0, 1].
        std: what each channel was then divided by.
        method: the name of the method.
        conservation: (B,), the share of the relevance that arrived at the image and the model's own tokens,
            or of the score that image and constants add up to: 1 up to rounding, else an error was raised.
            It checks the way back, not the model: see [what it promises](../conservation.md).
        signed: of the shape of the maps, below 0 where a patch speaks against the class; None for methods
            without a sign.
        channels: the dimension of the images that holds their channels; None: there is none.
        captions: what a picture says of each image, where the target has something to say; None: what the
            model predicts.
        boxes: (B, 4), what the target is about: x0, y0, x1, y1 in pixels; None: it is no box.
        paired: whether two images each belong together, as those of `vitx.targets.similar_to`.
        sinks: (B, h, w) bool, patches that most queries of most layers attend to, whatever they look for
            (Darcet et al. 2024, arXiv 2309.16588): a rollout is bright there without a reason in the
            picture. None where they cannot be told, as in a windowed model.
        objects: (B, Q), how sure each query of a detector is of an object; None: it is no detector.
        viewer: makes the page of `view`; it holds the model weakly. None: there is none.
    """

    maps: Tensor
    logits: Tensor
    target: Tensor | None
    image_size: tuple[int, ...]
    images: Tensor | None = None
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    method: str = ""
    conservation: Tensor | None = None
    signed: Tensor | None = None
    channels: int | None = 1
    captions: Sequence[str] | None = None
    boxes: Tensor | None = None
    paired: bool = False
    objects: Tensor | None = None
    sinks: Tensor | None = None
    viewer: "Callable[[Explanation, Sequence[str] | None], Any] | None" = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what belongs to the model, which may be gone where this is read."""
        return vars(self) | {"viewer": None}

    def cpu(self) -> "Explanation":
        """Returns the same in host memory, without the images."""
        kept: dict[str, Any] = {name: one.cpu() for name, one in self._tensors().items() if name != "images"}
        return replace(self, **(kept | {"images": None, "viewer": None}))

    def _tensors(self) -> dict[str, Tensor]:
        """Returns what has a row for each image, by the names of the fields."""
        return {name: one for name, one in vars(self).items() if isinstance(one, Tensor)}

    def heatmaps(self, size: tuple[int, ...] | None = None) -> Tensor:
        """Scales the maps up linearly and each one to [0, 1].

        Args:
            size: height and width, behind the number of frames of clips; by default those of the images.

        Returns:
            (B, H, W) or (B, T, H, W) in [0, 1]; a constant map gives zeros.
        """
        from vitx.pictures.render import heatmaps

        return heatmaps(self.maps, size or self.image_size)

    def pixels(
        self,
        images: Tensor | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bands: Sequence[int] | None = None,
    ) -> Tensor:
        """Returns the images as the model saw them, not normalised.

        Args:
            images: (B, C, H, W), those that were explained; by default the ones that are kept.
            mean: what was subtracted from each channel; by default what the model declares, if that brings
                the images into [0, 1], else colours are guessed.
            std: what each channel was then divided by; as for the mean.
            bands: the channels to show, one or three; by default the first three, and of two the mean.

        Returns:
            (B, H, W, 3) uint8, on the CPU; (B, T, H, W, 3) of clips and volumes, (B, F, T, 3) of
            spectrograms.

        Raises:
            VitxError: The images are not kept and not given, or mean, std or bands do not fit them.
        """
        return self._shown(images, mean, std, bands)[0]

    def _shown(
        self,
        images: Tensor | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bands: Sequence[int] | None = None,
    ) -> tuple[Tensor, str]:
        """Returns what `pixels` does, and what a picture has to say of the colours."""
        from vitx.pictures.colours import draw

        images = self.images if images is None else images
        if images is None:
            raise VitxError("the images were not kept with the explanation: give those that were explained")
        scale = (self.mean if mean is None else mean, self.std if std is None else std)
        asked = mean is not None or std is not None
        return draw(images, self.channels, [scale], bands, scale if asked else None)

    def overlays(
        self,
        images: Tensor | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        colormap: str = "inferno",
    ) -> Tensor:
        """Lays the heat maps over the images.

        Args:
            images: as for `pixels`.
            mean: as for `pixels`.
            std: as for `pixels`.
            colormap: the name of a colour map of matplotlib.

        Returns:
            uint8 of the shape of the pixels, on the CPU.
        """
        from vitx.pictures.render import overlays

        pixels = self.pixels(images, mean, std)
        return overlays(pixels, self.heatmaps(tuple(pixels.shape[1:-1])), colormap)

    def signed_overlays(self) -> Tensor:
        """Lays what speaks for the class, in red, and against it, in blue, over the images in grey.

        Returns:
            uint8 of the shape of the pixels, on the CPU.

        Raises:
            VitxError: The maps have no sign.
        """
        from vitx.pictures.render import signed_overlays

        return signed_overlays(self.pixels(), self._signs())

    def _signs(self) -> Tensor:
        if self.signed is None:
            raise VitxError(f"the maps of {self.method or 'this method'} have no sign: use evidence")
        return self.signed

    def picture(
        self,
        class_names: Sequence[str] | None = None,
        colormap: str = "inferno",
        *,
        signed: bool = False,
        view: "View | None" = None,
        time_axis: int | None = None,
    ) -> NDArray[np.uint8]:
        """Draws each image beside its map, with what the model predicted.

        A clip is a strip of at most 8 frames above their maps, a volume the three planes through the
        brightest place, a spectrogram lies with time to the right.

        Args:
            class_names: by default ImageNet's for 1,000 classes, else the numbers.
            colormap: the name of a colour map of matplotlib, for maps without a sign.
            signed: show what speaks for the class, and what against it.
            view: "frames" or "planes"; by default frames where there are three channels.
            time_axis: of spectrograms, the dimension of time, 1 or 2; by default the longer one.

        Returns:
            (height, width, 3) uint8.

        Raises:
            VitxError: A sign is asked for, and the maps have none.
        """
        from vitx.attribution import title_of
        from vitx.pictures.views import Layer, laid_out, slices_of, tile_width

        pixels, note = self._shown()
        size = tuple(pixels.shape[1:-1])
        layer = Layer(self.maps, self._signs() if signed else self.signed, self.boxes, self.sinks)
        channels = 1 if self.images is None else self.images.shape[self.channels or 0]
        slices = slices_of(size, None if self.channels is None else channels, view, time_axis)
        title = title_of(self.method) or "map"
        columns, marks = laid_out(pixels, {title: layer}, slices, colormap, signed=signed)
        note = "; ".join(filter(None, (note, marks)))
        if self.paired:
            second = {f"{name} of the other": one[1::2] for name, one in columns.items()}
            columns = {name: one[::2] for name, one in columns.items()} | second
        width = tile_width(columns, slices)
        return self._drawn(columns, width, note, class_names, colormap, signed)

    def _drawn(
        self,
        columns: dict[str, Tensor],
        width: int,
        note: str,
        class_names: Sequence[str] | None = None,
        colormap: str = "inferno",
        signed: bool = False,
    ) -> NDArray[np.uint8]:
        from vitx.pictures.captions import captions_said
        from vitx.pictures.render import grid, legend

        captions = captions_said(self.logits, self.captions, class_names)[:: 1 + self.paired]
        return grid(columns, captions, tile_width=width, note=note, **legend(colormap, signed=signed))

    def film(self, class_names: Sequence[str] | None = None) -> list[NDArray[np.uint8]]:
        """Draws a clip or volume frame by frame, each beside its map: what `save` writes as .gif.

        Raises:
            VitxError: There are no frames.
        """
        from vitx.attribution import title_of
        from vitx.pictures.render import overlays

        pixels, note = self._shown()
        if pixels.ndim != 5:
            raise VitxError("only clips and volumes have frames for a film: save a picture (.png)")
        drawn = overlays(pixels, self.heatmaps(tuple(pixels.shape[1:-1])))
        title = title_of(self.method) or "map"
        return [
            self._drawn({"input": pixels[:, frame], title: drawn[:, frame]}, 224, note, class_names)
            for frame in range(pixels.shape[1])
        ]

    def view(self, class_names: Sequence[str] | None = None) -> Any:
        """Makes a page to click: which patch looks where, in which layer, by which head.

        A notebook shows it, and its `save` writes it: one file, without a network. The attention is recorded
        anew, so that no explanation keeps it: the model has to be there still, and the same.

        Args:
            class_names: as for `picture`.

        Raises:
            VitxError: The model or the images are gone, or there is nothing that can be pointed at.
        """
        if self.viewer is None or self.images is None:
            raise VitxError(
                "a page needs the model and the images, and this explanation has none, as that of a "
                "DataLoader, of .cpu(), or of a file: explain some images, and view that"
            )
        return self.viewer(self, class_names)

    def save(self, path: str | Path) -> None:
        """Writes a picture (.png), a page to click (.html), a film of the frames (.gif), or arrays (.npz).

        The file is whole, or there is none.

        Raises:
            VitxError: The name ends otherwise, or the file cannot be written; or as for `view`.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix == ".png":
            write_png(path, self.picture())
        elif suffix == ".html":
            self.view().save(path)
        elif suffix == ".gif":
            from vitx.pictures.gif import write_gif

            write_gif(path, self.film())
        elif suffix == ".npz":
            kept = ("maps", "signed", "logits", "target")
            found = {name: one.cpu().numpy() for name, one in self._tensors().items() if name in kept}
            write_or_say(path, lambda file: savez(file, found))
        else:
            raise VitxError(f"an explanation is saved as .png, .html, .gif or .npz, found {path}")

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows; nothing where the images were not kept."""
        if self.images is None:
            return None
        file = BytesIO()
        encode(file, self[:_MOST_SHOWN].picture())
        return file.getvalue()

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, part: slice) -> "Explanation":
        """Returns the same of some of the images."""
        kept: dict[str, Any] = {name: one[part] for name, one in self._tensors().items()}
        return replace(self, **kept, captions=None if self.captions is None else self.captions[part])


def join(parts: Sequence[Explanation]) -> Explanation:
    """Joins the explanations of several batches, without their images."""
    tensors = [part._tensors() for part in parts]
    kept: dict[str, Any] = {
        name: torch.cat([one[name] for one in tensors if name in one])
        for name in dict.fromkeys(name for one in tensors for name in one)
    }
    said = [one for part in parts for one in part.captions or ()]
    return replace(parts[0], **(kept | {"images": None, "viewer": None}), captions=said or None)

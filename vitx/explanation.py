"""What a method found in a batch of images, and how to look at it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitx.errors import VitxError
from vitx.files import encode, savez, write_or_say, write_png

_MOST_SHOWN = 16  # images, where a notebook asks for a picture


@dataclass(frozen=True, eq=False)
class Explanation:
    """What one method found in a batch of images.

    A notebook shows it as a picture: each image beside its map.

    Attributes:
        maps: (B, h, w), >= 0, one value per patch, on the model's device; float32, or float64 for a
            float64 model.
        logits: (B, classes), what the model put out, in the precision of the maps.
        target: (B,) long, the class that each map is about; None for methods without a class and for
            targets that are a function.
        image_size: height and width of the images, in pixels.
        images: (B, C, H, W), what was explained; None where they are not kept, as those of a DataLoader.
        mean: what was subtracted from each channel of the images, in units of [0, 1].
        std: what each channel was then divided by.
        method: the name of the method.
        conservation: (B,), what share of the relevance was accounted for by the image and the model's own
            tokens, or of the score by all that adds to it: 1 up to rounding, or an error was raised.
        signed: (B, h, w), below 0 where a patch speaks against the class; None for methods without a sign.
    """

    maps: Tensor
    logits: Tensor
    target: Tensor | None
    image_size: tuple[int, int]
    images: Tensor | None = None
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    method: str = ""
    conservation: Tensor | None = None
    signed: Tensor | None = None

    def cpu(self) -> "Explanation":
        """Returns the same in host memory, without the images."""
        return replace(
            self,
            maps=self.maps.cpu(),
            logits=self.logits.cpu(),
            target=None if self.target is None else self.target.cpu(),
            conservation=None if self.conservation is None else self.conservation.cpu(),
            signed=None if self.signed is None else self.signed.cpu(),
            images=None,
        )

    def heatmaps(self, size: tuple[int, int] | None = None) -> Tensor:
        """Scales the maps up bilinearly and each one to [0, 1].

        Args:
            size: height and width, by default those of the images.

        Returns:
            (B, H, W) in [0, 1]; a constant map gives zeros.
        """
        from vitx.render import heatmaps

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
            (B, H, W, 3) uint8, on the CPU.

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
        from vitx.colours import choose_colours

        images = self.images if images is None else images
        if images is None:
            raise VitxError("the images were not kept with the explanation: give those that were explained")
        scale = (self.mean if mean is None else mean, self.std if std is None else std)
        asked = mean is not None or std is not None
        colours = choose_colours(images, [scale], bands, scale if asked else None)
        return colours.pixels(images), colours.note

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
            (B, H, W, 3) uint8, on the CPU.
        """
        from vitx.render import overlays

        pixels = self.pixels(images, mean, std)
        return overlays(pixels, self.heatmaps((pixels.shape[1], pixels.shape[2])), colormap)

    def signed_overlays(self) -> Tensor:
        """Lays what speaks for the class, in red, and against it, in blue, over the images in grey.

        Returns:
            (B, H, W, 3) uint8, on the CPU.

        Raises:
            VitxError: The maps have no sign.
        """
        from vitx.render import signed_overlays

        if self.signed is None:
            raise VitxError(f"the maps of {self.method or 'this method'} have no sign: take evidence")
        return signed_overlays(self.pixels(), self.signed)

    def picture(
        self,
        class_names: Sequence[str] | None = None,
        colormap: str = "inferno",
        *,
        signed: bool = False,
    ) -> NDArray[np.uint8]:
        """Draws each image beside its map, with what the model predicted.

        Args:
            class_names: by default ImageNet's for 1,000 classes, else the numbers.
            colormap: the name of a colour map of matplotlib, for maps without a sign.
            signed: show what speaks for the class, and what against it.

        Returns:
            (height, width, 3) uint8.

        Raises:
            VitxError: A sign is asked for, and the maps have none.
        """
        from vitx.captions import captions_of
        from vitx.classes import known_class_names, short
        from vitx.methods import title_of
        from vitx.render import SIGNED, grid, overlays

        if class_names is None and self.logits.ndim == 2:
            known = known_class_names(self.logits.shape[1])
            class_names = None if known is None else [short(name) for name in known]
        pixels, note = self._shown()
        columns = {
            "input": pixels,
            title_of(self.method) or "map": (
                self.signed_overlays()
                if signed
                else overlays(pixels, self.heatmaps((pixels.shape[1], pixels.shape[2])), colormap)
            ),
        }
        captions = captions_of(self.logits, class_names=class_names)
        if signed:
            return grid(columns, captions, tile_width=224, colormap=SIGNED[0], ends=SIGNED[1], note=note)
        return grid(columns, captions, tile_width=224, colormap=colormap, note=note)

    def save(self, path: str | Path) -> None:
        """Writes a picture (.png), or the maps, logits and targets as arrays (.npz), whole or not at all.

        Raises:
            VitxError: The name ends otherwise, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix == ".png":
            write_png(path, self.picture())
        elif path.suffix == ".npz":
            arrays = {
                "maps": self.maps,
                "signed": self.signed,
                "logits": self.logits,
                "target": self.target,
            }
            found = {name: array.cpu().numpy() for name, array in arrays.items() if array is not None}
            write_or_say(path, lambda file: savez(file, found))
        else:
            raise VitxError(f"an explanation is saved as .png or .npz, found {path}")

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
        return replace(
            self,
            maps=self.maps[part],
            logits=self.logits[part],
            target=None if self.target is None else self.target[part],
            images=None if self.images is None else self.images[part],
            conservation=None if self.conservation is None else self.conservation[part],
            signed=None if self.signed is None else self.signed[part],
        )


def join(parts: Sequence[Explanation]) -> Explanation:
    """Joins the explanations of several batches, without their images."""
    targets = [part.target for part in parts if part.target is not None]
    shares = [part.conservation for part in parts if part.conservation is not None]
    signed = [part.signed for part in parts if part.signed is not None]
    return replace(
        parts[0],
        maps=torch.cat([part.maps for part in parts]),
        logits=torch.cat([part.logits for part in parts]),
        target=torch.cat(targets) if targets else None,
        images=None,
        conservation=torch.cat(shares) if shares else None,
        signed=torch.cat(signed) if signed else None,
    )

"""Drawing of explanations: pixels, overlays, pictures, films and overviews, with the same arguments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitx.attribution import title_of
from vitx.errors import VitxError
from vitx.pictures import render
from vitx.pictures.captions import Caption, Names, captions_said, classes_said
from vitx.pictures.colors import Bands, draw
from vitx.pictures.overview import overview_of
from vitx.pictures.render import Picture
from vitx.pictures.views import Layer, Slices, View, laid_out, slices_of

Images = Tensor | None
Numbers = Sequence[float] | None
_PICTURE = 224  # width of a picture in pixels
_NARROWEST, _WIDEST = 448, 1344  # width of a strip in pixels: readable, and no wider than a screen


@dataclass(frozen=True, eq=False, repr=False)
class Drawing:
    """The part of `vitx.Explanation` that draws; see there for the attributes."""

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
    class_names: Names = None
    viewer: Callable[..., Any] | None = None

    def heatmaps(self, size: tuple[int, ...] | None = None) -> Tensor:
        """Upsample the maps linearly, and rescale each to [0, 1]: (B, H, W), or (B, T, H, W) for clips.

        A constant map gives zeros. The size is (height, width), or (frames, height, width) for clips; by
        default that of the images.
        """
        return render.heatmaps(self.maps, size or self.image_size)

    def pixels(
        self, images: Images = None, *, mean: Numbers = None, std: Numbers = None, bands: Bands = None
    ) -> Tensor:
        """Return the images as the model saw them, but not normalized, as uint8 on the CPU.

        The shape is (B, H, W, 3), (B, T, H, W, 3) for clips and volumes, (B, F, T, 3) for spectrograms.

        Raises:
            VitxError: The images are neither kept nor given, or mean, std or bands do not fit them.
        """
        return self._shown(images, mean, std, bands)[0]

    def overlays(
        self, images: Images = None, *, colormap: str = "inferno", signed: bool = False, **scale: Any
    ) -> Tensor:
        """Overlay the heat maps on the images: uint8 on the CPU, in the shape of `pixels`.

        Raises:
            VitxError: As for `pixels`; or `signed` is set, and the maps have no sign.
        """
        return self._layer(signed).over(self.pixels(images, **scale), colormap, signed)

    def picture(
        self,
        images: Images = None,
        *,
        class_names: Names = None,
        colormap: str = "inferno",
        signed: bool = False,
        view: View = None,
        time_axis: int | None = None,
        **scale: Any,
    ) -> Picture:
        """Draw each image next to its map, with the prediction.

        A clip is drawn as a strip of at most 8 frames above their maps, a volume as the three planes through
        the brightest place, and a spectrogram with time to the right. `view` is "frames" or "planes", by
        default "frames" if there are three channels. `time_axis` is the time dimension of a spectrogram, 1 or
        2, by default the longer one.
        """
        pixels, note = self._shown(images, **scale)
        images = self.images if images is None else images
        channels = None if self.channels is None or images is None else images.shape[self.channels]
        layers, captions = {title_of(self.method) or "map": self._layer(signed)}, self._captions(class_names)
        slices = slices_of(tuple(pixels.shape[1:-1]), channels, view, time_axis)
        return draw_layers(pixels, layers, captions, slices, (note,), colormap, signed, self.paired)

    def film(
        self,
        images: Images = None,
        *,
        class_names: Names = None,
        colormap: str = "inferno",
        signed: bool = False,
        **scale: Any,
    ) -> list[Picture]:
        """Draw clips or volumes frame by frame, each next to its map, as `save` writes them to a .gif.

        Raises:
            VitxError: There are no frames; or as for `overlays`.
        """
        pixels, note = self._shown(images, **scale)
        if pixels.ndim != 5:
            raise VitxError("only clips and volumes have frames for a film: save a picture (.png)")
        title, drawn = title_of(self.method) or "map", self._layer(signed).over(pixels, colormap, signed)
        look: dict[str, Any] = {"note": note, "signed": signed, "tile_width": _PICTURE}
        frames, said = zip(pixels.unbind(1), drawn.unbind(1), strict=True), self._captions(class_names)
        return [render.grid({"input": one, title: map_}, said, colormap, **look) for one, map_ in frames]

    def overview(
        self, images: Images = None, *, class_names: Names = None, colormap: str = "inferno", **scale: Any
    ) -> Picture:
        """Draw all maps at once: mean maps, and up to 24 crops around the brightest patches.

        There is a mean map of all images, and one for each of up to ten classes, the most frequent ones; each
        is drawn over the mean image. A shortcut lies at one place in all images, or looks the same in all
        crops. Treat this as a question, not a verdict: photographers center their objects.

        Raises:
            VitxError: As for `pixels`; or the images are clips, volumes or spectrograms.
        """
        classes = classes_said(self.logits, self.target, self._names(class_names))
        pixels = self.pixels(images, **scale)
        return overview_of(pixels, self.maps, classes, colormap, title_of(self.method))

    def _shown(
        self, images: Images, mean: Numbers = None, std: Numbers = None, bands: Bands = None
    ) -> tuple[Tensor, str]:
        """Return the pixels, and a note for pictures whose colors are uncertain."""
        images = self.images if images is None else images
        if images is None:
            raise VitxError("the images were not kept with the explanation: give those that were explained")
        scale = (self.mean if mean is None else mean, self.std if std is None else std)
        asked = mean is not None or std is not None
        return draw(images, self.channels, [scale], bands, scale if asked else None)

    def _layer(self, signed: bool) -> Layer:
        if signed and self.signed is None:
            raise VitxError(f"the maps of {self.method or 'this method'} have no sign: use evidence")
        return Layer(self.maps, self.signed, self.boxes, self.sinks)

    def _names(self, given: Names) -> Names:
        return self.class_names if given is None else given

    def _captions(self, class_names: Names) -> list[Caption]:
        return captions_said(self.logits, self.captions, self._names(class_names))[:: 1 + self.paired]


def draw_layers(
    pixels: Tensor,
    layers: Mapping[str, Layer],
    captions: Sequence[Caption],
    slices: Slices | None,
    notes: Sequence[str] = (),
    colormap: str = "inferno",
    signed: bool = False,
    paired: bool = False,
    tile_width: int | None = None,
) -> Picture:
    """Draw a row for each image, (B, ..., 3) uint8, or for each pair of images, next to the maps."""
    columns, marks = laid_out(pixels, layers, slices, colormap, signed)
    if paired:
        second = {f"{title} of the other": one[1::2] for title, one in columns.items()}
        columns = {title: one[::2] for title, one in columns.items()} | second
    note = "; ".join(filter(None, (*notes, marks)))
    strip = min(max(next(iter(columns.values())).shape[2], _NARROWEST), _WIDEST)
    width = tile_width or (_PICTURE if slices is None else strip)
    return render.grid(columns, captions, colormap=colormap, tile_width=width, note=note, signed=signed)

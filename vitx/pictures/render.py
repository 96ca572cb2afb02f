"""Pictures: heat maps, overlays, and grids with captions and a legend."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from textwrap import wrap

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from vitx.errors import VitxError
from vitx.pictures.captions import Caption

Picture = NDArray[np.uint8]  # (height, width, 3)
_ENDS = "looked at least", "most"  # of the legend
SIGNED = "bwr", ("against", "for")  # blue, white for 0, red; and the ends of the legend
OVERLAY_STRENGTH = 0.6  # share of the color map in an overlay
TILE_WIDTH, GAP = 110, 5  # three tiles are as wide as TensorBoard's card, so that text stays sharp
_TEXT_SIZE, _SMALL = 13, 10
LINE = 19
_BETWEEN = 24  # pixels between pictures with headings
PAPER, INK, FAINT = "#ffffff", "#1a1a1a", "#5c5c5c"
VERDICTS = {True: "#00695c", False: "#b71c1c", None: INK}  # colors of right, wrong and unknown


def heatmaps(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Upsample maps, (B, h, w) or (B, t, h, w), linearly, rescaled to [0, 1] each; a constant map gives 0."""
    scaled = _scaled_up(maps, size)
    whole = tuple(range(1, maps.ndim))
    low, high = scaled.amin(whole, keepdim=True), scaled.amax(whole, keepdim=True)
    # Interpolating a constant map may leave rounding errors, which must not be amplified.
    flat = high - low <= 1e-6 * high.abs()
    return ((scaled - low) / (high - low).masked_fill(flat, 1)).masked_fill(flat, 0)


def _scaled_up(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    mode = "bilinear" if maps.ndim == 3 else "trilinear"
    return F.interpolate(maps[:, None], size, mode=mode)[:, 0]


def overlays(pixels: Tensor, heat: Tensor, colormap: str = "inferno") -> Tensor:
    """Overlay heat maps, (B, ...) in [0, 1], on images, (B, ..., 3) uint8, on the CPU: bright places glow."""
    if pixels.shape[:-1] != heat.shape:
        raise VitxError(
            f"found {len(pixels)} images for {len(heat)} maps, of {tuple(pixels.shape[1:-1])} and "
            f"{tuple(heat.shape[1:])} pixels: give the images that were explained"
        )
    index = (heat.detach().float().cpu() * 255).round().long()
    colors = torch.from_numpy(palette(colormap))[index].float()
    mixed = torch.lerp(pixels.cpu().float(), colors, OVERLAY_STRENGTH)
    return mixed.round().to(torch.uint8)


def signed_overlays(pixels: Tensor, signed: Tensor, colormap: str = SIGNED[0]) -> Tensor:
    """Overlay maps, (B, h, w) or (B, t, h, w), on gray images: red speaks for, blue against, 0 is white."""
    scaled = _scaled_up(signed.float(), tuple(pixels.shape[1:-1]))
    largest = scaled.abs().amax(tuple(range(1, scaled.ndim)), keepdim=True)
    scaled = scaled / torch.where(largest == 0, 1, largest)
    gray = pixels.float().mean(-1, keepdim=True).expand(pixels.shape)
    return overlays(gray.round().to(torch.uint8), (scaled + 1) / 2, colormap)


def grid(
    columns: Mapping[str, Tensor],
    captions: Sequence[Caption],
    colormap: str = "inferno",
    *,
    tile_width: int = TILE_WIDTH,
    note: str = "",
    signed: bool = False,
) -> Picture:
    """Draw one row per image, with a caption, and one column per title, with a legend below.

    `columns` maps titles to pictures, (B, H, W, 3) uint8, which are scaled to the width of a tile. Rows are
    as high as the longest caption needs. The legend has the color map, or that of `signed` overlays, and a
    note between its ends or, if that is too long, on lines below.
    """
    colormap, ends = SIGNED if signed else (colormap, _ENDS)
    tiles = {title: [tile(p, tile_width) for p in pixels.numpy()] for title, pixels in columns.items()}
    lefts = {title: GAP + column * (tile_width + GAP) for column, title in enumerate(tiles)}
    width = GAP + len(tiles) * (tile_width + GAP)
    room = width - 2 * GAP  # for a caption
    bold = font(_TEXT_SIZE, bold=True)
    said = [caption.lines(lambda text: bold.getlength(text) <= room) for caption in captions]
    lines = max(map(len, said), default=1)
    row = lines * LINE + next(iter(tiles.values()))[0].height + GAP
    heads = {title: wrapped(title, tile_width) for title in tiles}
    top = LINE * max(map(len, heads.values()))
    tops = range(top, top + len(captions) * row, row)
    canvas = Image.new("RGB", (width, top + len(captions) * row), PAPER)
    draw = ImageDraw.Draw(canvas)
    for title, pictures in tiles.items():
        for number, line in enumerate(heads[title]):
            write(draw, (lefts[title], number * LINE + 3), line, FAINT, tile_width)
        for at, picture in zip(tops, pictures, strict=False):
            canvas.paste(picture, (lefts[title], at + lines * LINE))
    for at, caption, texts in zip(tops, captions, said, strict=False):
        for number, line in enumerate(texts):
            write(draw, (GAP, at + number * LINE + 2), line, VERDICTS[caption.right], room, bold=True)
    return np.concatenate([canvas, _legend(width, colormap, note, ends)])


def scaled_up(pictures: Tensor, width: int) -> Tensor:
    """Scale pictures, (B, H, W, 3) uint8, up by the smallest integer that makes them at least as wide."""
    times = -(-width // pictures.shape[2])
    return pictures if times <= 1 else resized(pictures.numpy(), times * pictures.shape[2])


def resized(pictures: Iterable[Picture], width: int) -> Tensor:
    """Scale pictures of one aspect ratio to a width: (B, H, W, 3) uint8."""
    return torch.from_numpy(np.stack([np.asarray(tile(one, width)) for one in pictures]))


def differences(pixels: Tensor, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Color images, (B, H, W, 3) uint8: red where the second map is higher than the first, blue where lower.

    Each image has one map, (1, h, w), in both, on any grid. Maps are scaled to a sum of 1 and then compared.
    """
    size, whole = (pixels.shape[1], pixels.shape[2]), []
    for maps in (first, second):
        scaled = torch.cat([_scaled_up(one, size) for one in maps])
        whole.append(scaled / scaled.sum((1, 2), keepdim=True).clamp_min(torch.finfo(scaled.dtype).tiny))
    return signed_overlays(pixels, whole[1] - whole[0], "coolwarm")


def beside(pictures: Mapping[str, Picture]) -> Picture:
    """Arrange pictures, (height, width, 3) uint8, side by side, each under the lines of its heading."""
    headed = []
    for heading, picture in pictures.items():
        lines, width = heading.splitlines(), picture.shape[1]
        head = Image.new("RGB", (width, len(lines) * LINE + GAP), PAPER)
        for number, line in enumerate(lines):
            at = GAP, number * LINE + 3
            write(ImageDraw.Draw(head), at, line, INK, width - 2 * GAP, bold=number == 0)
        headed.append(np.concatenate([head, picture]))
    return joined(headed, axis=1)


def joined(pictures: Sequence[Picture], axis: int) -> Picture:
    """Stack pictures below each other (axis 0) or side by side (axis 1), with gaps."""
    long = max(picture.shape[1 - axis] for picture in pictures)
    parts = []
    for number, picture in enumerate(pictures):
        room = [(0, 0)] * 3
        room[1 - axis] = (0, long - picture.shape[1 - axis])
        room[axis] = (_BETWEEN if number else 0, 0)
        parts.append(np.pad(picture, room, constant_values=255))
    return np.concatenate(parts, axis)


def _legend(width: int, colormap: str, note: str, ends: tuple[str, str]) -> Image.Image:
    """Draw a color bar over the full width, name its ends, and write a note between or below them."""
    left, right = map(_length, ends)
    between = left + _length(note) + right <= width - 4 * GAP
    lines = [note] if between else ["", *wrapped(note, width - 2 * GAP)]
    canvas = Image.new("RGB", (width, (1 + len(lines)) * LINE), PAPER)
    bar = palette(colormap)[np.linspace(0, 255, width - 2 * GAP).astype(int)]
    canvas.paste(Image.fromarray(np.repeat(bar[None], LINE // 2, axis=0)), (GAP, 2))
    draw, top, face = ImageDraw.Draw(canvas), LINE // 2 + 4, font(_TEXT_SIZE)
    draw.text((GAP, top), ends[0], FAINT, face)
    draw.text((width - GAP, top), ends[1], FAINT, face, anchor="ra")
    middle = (width + left - right) // 2 if between else width // 2
    for number, line in enumerate(lines):
        draw.text((middle, top + number * LINE), line, FAINT, face, anchor="ma")
    return canvas


def wrapped(text: str, room: int) -> list[str]:
    """Break the lines of a text into lines at most `room` pixels wide, if that is possible."""
    for letters in range(len(text), 1, -1):
        lines = [line for part in text.splitlines() for line in wrap(part, letters)]
        if all(_length(line) <= room for line in lines):
            return lines
    return [text]


def _length(text: str) -> float:
    return font(_TEXT_SIZE).getlength(text)


def tile(pixels: Picture, width: int) -> Image.Image:
    """Scale a picture to a width, and keep its aspect ratio."""
    height = round(width * pixels.shape[0] / pixels.shape[1])
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, color: str, room: int, bold: bool = False
) -> None:
    """Write a line of text in the largest letters that fit; if none do, cut it off with an ellipsis."""
    fonts = [font(size, bold) for size in range(_TEXT_SIZE, _SMALL - 1, -1)]
    typeface = next((one for one in fonts if draw.textlength(text, one) <= room), fonts[-1])
    shown = text
    while text and draw.textlength(shown, typeface) > room:
        text = text[:-1]
        shown = f"{text}\N{HORIZONTAL ELLIPSIS}"
    draw.text(at, shown, color, typeface)


@lru_cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Load the font that matplotlib ships, so that pictures look alike on every machine."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


@lru_cache
def palette(colormap: str) -> NDArray[np.uint8]:
    """Return the 256 colors of a color map, (256, 3)."""
    import matplotlib

    if colormap not in matplotlib.colormaps:
        known = "matplotlib's, such as inferno, viridis, magma, plasma, cividis"
        raise VitxError(f"there is no color map {colormap!r}: take one of {known}")
    table = matplotlib.colormaps[colormap](np.linspace(0, 1, 256))[:, :3]
    return np.asarray((table * 255).round(), np.uint8)

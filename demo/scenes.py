"""Scenes: glyphs at random places and scales among fragments of other glyphs.

The clutter is cut from the same kind of strokes as the glyph that counts and is colored and scaled
alike, so neither brightness nor color gives the glyph away: only its shape does.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from demo.glyphs import GLYPH_SIZE, INK_SIZE

SCENE_SIZE = 64
GLYPH_PIXELS = (22.0, 32.0)  # the longer side of a glyph in the scene
FRAGMENT_WINDOW = (7.0, 11.0)  # the sides of a fragment, in pixels of the glyph it is cut from
SPRITE_SIZE = 20  # holds the largest fragment when rotated
FRAGMENTS = 36
CLEARANCE = 0.5  # least distance of a fragment's center from a glyph, in sizes of the glyph
MAX_ROTATION = math.radians(8)
MAX_SHEAR = 0.1
MAX_STRETCH = 0.1


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes.

    Attributes:
        images: (B, 3, 64, 64) float32 in [0, 1].
        ink: (B, G, 64, 64), the visible part of each glyph, in [0, 1].
    """

    images: Tensor
    ink: Tensor

    def boxes(self) -> Tensor:
        """Return the box of the first glyph as a mask (B, 64, 64), True inside."""
        inked = self.ink[:, 0] > 0.25
        return _between(inked.any(2))[:, :, None] & _between(inked.any(1))[:, None, :]


def cut_fragments(glyphs: Tensor, generator: Generator | None = None) -> Tensor:
    """Cut one fragment out of each glyph: (n, 28, 28) -> (n, 20, 20), scaled as in a scene."""
    count = len(glyphs)
    inked = (glyphs.flatten(1) > 0.5).float() + 1e-6
    pick = torch.multinomial(inked, 1, generator=generator)
    center = torch.cat([pick % GLYPH_SIZE, pick // GLYPH_SIZE], 1).float()
    half = _uniform((count, 2), *FRAGMENT_WINDOW, generator) / 2
    near = (torch.arange(GLYPH_SIZE) - center[..., None]).abs() <= half[..., None]
    window = near[:, 1, :, None] & near[:, 0, None, :]
    pixels = _uniform((count,), *GLYPH_PIXELS, generator)
    offset = (center + 0.5) / GLYPH_SIZE * 2 - 1
    affine = torch.cat([_distort(pixels, SPRITE_SIZE, generator), offset[..., None]], -1)
    return _sample(glyphs * window, affine, SPRITE_SIZE)


def draw_scenes(glyphs: Tensor, fragments: Tensor, generator: Generator | None = None) -> Scenes:
    """Draw scenes, with all randomness from the generator.

    Args:
        glyphs: (B, G, 28, 28) ink of the glyphs to show, the first on top; zeros show nothing.
        fragments: (n, 20, 20) fragments to draw the clutter from, see `cut_fragments`.
        generator: source of the randomness; torch's global one by default.
    """
    batch, count = glyphs.shape[:2]
    pixels = _uniform((batch, count), *GLYPH_PIXELS, generator)
    center = _uniform((batch, count, 2), -1, 1, generator) * (1 - pixels / SCENE_SIZE)[..., None]
    linear = _distort(pixels.flatten(), SCENE_SIZE, generator)
    affine = torch.cat([linear, -linear @ center.view(-1, 2, 1)], -1)
    ink = _sample(glyphs.flatten(0, 1), affine, SCENE_SIZE).view(batch, count, SCENE_SIZE, -1)
    present = glyphs.flatten(2).any(2)
    images = _clutter(fragments, center, pixels * present, generator)
    colors = _stroke_colors((batch, count), generator)
    for layer in reversed(range(count)):
        images = torch.lerp(images, colors[:, layer, :, None, None], ink[:, layer, None])
    above = torch.cat([torch.ones_like(ink[:, :1]), (1 - ink[:, :-1]).cumprod(1)], 1)
    return Scenes(images, ink * above)


def _clutter(fragments: Tensor, center: Tensor, pixels: Tensor, generator: Generator | None) -> Tensor:
    """Draw dark backgrounds strewn with fragments, (B, 3, 64, 64), clear of the glyphs."""
    batch = len(center)
    shape = (batch, FRAGMENTS)
    corner = torch.randint(-SPRITE_SIZE + 4, SCENE_SIZE - 4, (*shape, 2), generator=generator)
    middle = (corner + SPRITE_SIZE / 2) / SCENE_SIZE * 2 - 1
    distance = (middle[:, :, None] - center[:, None]).abs().amax(-1) * SCENE_SIZE / 2
    clear = (distance >= CLEARANCE * pixels[:, None]).all(-1)
    picked = torch.randint(len(fragments), shape, generator=generator)
    alpha = fragments[picked] * clear[..., None, None]
    colors = _stroke_colors(shape, generator)
    # Where fragments overlap, one of them should lie on top: random powers of ten weight them.
    height = 10 ** _uniform((*shape, 1, 1), 0, 6, generator)
    weight = (alpha * height)[:, :, None]
    paint = torch.cat([weight * colors[..., None, None], weight, alpha[:, :, None]], 2)
    # Sprites overhang the scene: paint on a canvas with a margin, then cut the margin off.
    side = SCENE_SIZE + 2 * SPRITE_SIZE
    within = torch.arange(SPRITE_SIZE)
    rows = corner[..., 1, None] + SPRITE_SIZE + within
    columns = corner[..., 0, None] + SPRITE_SIZE + within
    flat = (rows[..., :, None] * side + columns[..., None, :]).flatten(1)
    canvas = torch.zeros(batch, 5, side * side)
    canvas.scatter_add_(2, flat[:, None].expand(-1, 5, -1), paint.transpose(1, 2).flatten(2))
    inner = slice(SPRITE_SIZE, SPRITE_SIZE + SCENE_SIZE)
    canvas = canvas.view(batch, 5, side, side)[:, :, inner, inner]
    color = canvas[:, :3] / canvas[:, 3:4].clamp_min(1e-6)
    return torch.lerp(_backgrounds(batch, generator), color, canvas[:, 4:].clamp_max(1))


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator | None) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _distort(pixels: Tensor, canvas: int, generator: Generator | None) -> Tensor:
    """Return random maps from canvas to glyph coordinates, (n, 2, 2): rotation, shear and stretch."""
    shape = (len(pixels),)
    angle = _uniform(shape, -MAX_ROTATION, MAX_ROTATION, generator)
    shear = _uniform(shape, -MAX_SHEAR, MAX_SHEAR, generator)
    stretch = _uniform(shape, -MAX_STRETCH, MAX_STRETCH, generator).exp()
    zoom = canvas / pixels * INK_SIZE / GLYPH_SIZE
    cos, sin = angle.cos(), angle.sin()
    x = torch.stack([cos, sin + shear * cos], -1) * (zoom * stretch)[:, None]
    y = torch.stack([-sin, cos - shear * sin], -1) * (zoom / stretch)[:, None]
    return torch.stack([x, y], -2)


def _sample(glyphs: Tensor, affine: Tensor, canvas: int) -> Tensor:
    grid = F.affine_grid(affine, [len(glyphs), 1, canvas, canvas], align_corners=False)
    return F.grid_sample(glyphs[:, None], grid, mode="bilinear", align_corners=False)[:, 0]


def _stroke_colors(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """Return bright colors of any hue, (*shape, 3): the strongest channel is made bright."""
    colors = torch.rand((*shape, 3), generator=generator) * 0.9 + 0.1
    brightness = _uniform((*shape, 1), 0.75, 1.0, generator)
    return colors / colors.amax(-1, keepdim=True) * brightness


def _backgrounds(batch: int, generator: Generator | None) -> Tensor:
    """Return dark, smoothly varying colors, (B, 3, 64, 64)."""
    coarse = _uniform((batch, 3, 4, 4), 0.0, 0.35, generator)
    size = [SCENE_SIZE, SCENE_SIZE]
    return F.interpolate(coarse, size, mode="bicubic", align_corners=False).clamp(0, 1)


def _between(hits: Tensor) -> Tensor:
    """Fill each row of a boolean (B, n) from its first True to its last."""
    from_left = hits.long().cummax(1).values
    from_right = hits.long().flip(1).cummax(1).values.flip(1)
    return (from_left * from_right).bool()

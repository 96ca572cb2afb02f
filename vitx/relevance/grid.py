"""From the relevance of pixels to a map: the grid of the first tokens, where the pixels show one."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitx.relevance.rules import blank

_ALIKE = 1e-5  # of the largest value


@dataclass
class First:
    """The shadows of the first tokens, where the grid of a map is read off.

    Attributes:
        embedded: what the first call with weights made of the pixels.
        channels: the dimension of its channels.
        stem: what the convolutions before the first attention put out, (B, c, h, w) each, last one first.
    """

    embedded: Tensor
    channels: int
    stem: list[Tensor] = field(default_factory=list)


def in_grid(image: Tensor, pixels: Tensor, first: First | None, tokens: Sequence[Tensor]) -> Tensor:
    """Returns the map in the grid of the first tokens, or the pixels as they are.

    The first tokens lie in a grid if each one is made of a block of pixels. If their pixels overlap, as
    behind a stem of convolutions, their own relevance is the map, where all of it passes through them and
    they lie in the picture as they do in the tensor.

    Args:
        image: the shadow of the image, (B, 1, H, W).
        pixels: their relevance, (B, H, W).
        first: the first tokens.
        tokens: the relevance of those in `first.stem`.

    Returns:
        (B, h, w).
    """
    if first is None:
        return pixels
    grid = blocks(_marked(image, first.embedded, first.channels))
    if grid != tuple(pixels.shape[1:]):
        cells = pooled(pixels, grid)
        rows, columns = pixels.shape[1] // grid[0], pixels.shape[2] // grid[1]
        even = (cells / (rows * columns))[:, :, None, :, None]
        apart = pixels.view(len(pixels), grid[0], rows, grid[1], columns) - even
        if bool(apart.abs_().amax() <= _ALIKE * pixels.abs().amax()):
            return cells
    for shadow, found in zip(first.stem, tokens, strict=True):
        cells = found.sum(1)
        whole = torch.allclose(cells.sum((1, 2)), pixels.sum((1, 2)), rtol=1e-3, atol=1e-6)
        if whole and _upright(image, shadow):
            return cells
    return pixels


def _marked(image: Tensor, shadow: Tensor, channels: int) -> Tensor:
    """Gives each token a number of its own, and returns what the pixels get, (1, H, W)."""
    shape = list(shadow.shape)
    shape[channels] = 1
    generator = torch.Generator().manual_seed(0)
    marks = torch.rand(shape, generator=generator, dtype=torch.float64).to(shadow).expand(shadow.shape)
    (found,) = torch.autograd.grad(shadow, image, marks, retain_graph=True)
    return found.sum(1)[:1].cpu()  # one read: what follows would wait for a GPU more than once


def _upright(image: Tensor, stem: Tensor) -> bool:
    """Whether rows of tokens are rows of the picture, from top to bottom, and columns from left to right."""
    height, width = image.shape[2:]
    rows, columns = stem.shape[2:]
    if height % rows or width % columns:
        return False
    for row, column in ((0, columns - 1), (rows - 1, 0)):
        marks = blank(stem.shape, stem).clone()
        marks[:, :, row, column] = 1
        (found,) = torch.autograd.grad(stem, image, marks, retain_graph=True)
        lit = found[0].sum(0)
        centre = [
            float((lit.sum(1 - dim) * torch.arange(size, device=lit.device)).sum() / lit.sum()) / (size - 1)
            for dim, size in enumerate((height, width))
        ]
        if (rows > 1 and (centre[0] < 0.5) != (row == 0)) or (
            columns > 1 and (centre[1] < 0.5) != (column == 0)
        ):
            return False
    return True


def blocks(pixels: Tensor) -> tuple[int, int]:
    """Finds the coarsest regular grid that holds an image exactly: rows and columns of constant blocks.

    Args:
        pixels: (B, H, W).

    Example:
        >>> blocks(torch.arange(6.0).view(1, 2, 3).repeat_interleave(4, 1).repeat_interleave(2, 2))
        (2, 3)
    """
    return _steps(pixels, 1), _steps(pixels, 2)


def _steps(pixels: Tensor, dim: int) -> int:
    size = pixels.shape[dim]
    before, after = pixels.narrow(dim, 0, size - 1), pixels.narrow(dim, 1, size - 1)
    tolerance = _ALIKE * pixels.abs().amax()
    changes = ((before - after).abs() > tolerance).transpose(0, dim).flatten(1).any(1)
    edges = [int(edge) + 1 for edge in changes.nonzero()[:, 0]]
    for block in range(size, 0, -1):
        if size % block == 0 and all(edge % block == 0 for edge in edges):
            return size // block
    return size


def pooled(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sums the pixels, (B, H, W), of each cell of a grid that divides the image."""
    batch, height, width = pixels.shape
    rows, columns = grid
    return pixels.view(batch, rows, height // rows, columns, width // columns).sum((2, 4))

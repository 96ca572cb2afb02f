"""From the relevance of pixels to a map: the grid of the first tokens, where the pixels show one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitx.errors import VitxError
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


def channel_axis(image: Tensor, first: First | None) -> int | None:
    """Finds the dimension of an input that holds its channels: the first weights take all of them alike.

    Args:
        image: the shadow of the input: (B, 1, H, W), (B, C, T, H, W) or (B, T, C, H, W), or (B, F, T).
        first: the first tokens.

    Returns:
        The dimension; None where there is none, as in a spectrogram (B, F, T).

    Raises:
        VitxError: Neither dimension of a clip is taken so.
    """
    if image.ndim == 3:
        return None
    if image.ndim == 4 or first is None:
        return 1
    marked = _marked(image, first.embedded, first.channels)
    for dim in (1, 2):
        if _steps(marked, dim) == 1:
            return dim
    raise VitxError(
        f"the model takes neither dimension 1 nor 2 of an input of shape {tuple(image.shape)} as a whole: "
        "one of them must be its channels"
    )


def without(values: Tensor, channels: int | None) -> Tensor:
    """Sums over the channels."""
    return values if channels is None else values.sum(channels)


def in_grid(
    image: Tensor, pixels: Tensor, first: First | None, tokens: Sequence[Tensor], channels: int | None = 1
) -> Tensor:
    """Returns the map in the grid of the first tokens, or the pixels as they are.

    The first tokens lie in a grid if each one is made of a block of pixels. If their pixels overlap, as
    behind a stem of convolutions, their own relevance is the map, where all of it passes through them and
    they lie in the picture as they do in the tensor.

    Args:
        image: the shadow of the image, as for `channel_axis`.
        pixels: their relevance, (B, H, W), (B, T, H, W) or (B, F, T).
        first: the first tokens.
        tokens: the relevance of those in `first.stem`.
        channels: the dimension of the image that holds its channels.

    Returns:
        (B, h, w), (B, t, h, w) or (B, f, t).
    """
    if first is None:
        return pixels
    grid = blocks(without(_marked(image, first.embedded, first.channels), channels))
    if grid != tuple(pixels.shape[1:]):
        cells = pooled(pixels, grid)
        even = divided(cells, pixels.shape[1:])
        if bool((pixels - even).abs_().amax() <= _ALIKE * pixels.abs().amax()):
            return cells
    for shadow, found in zip(first.stem, tokens, strict=True):
        cells = found.sum(1)
        if cells.ndim != pixels.ndim or len(cells) != len(pixels):
            continue  # as of frames one by one
        whole = torch.allclose(cells.flatten(1).sum(1), pixels.flatten(1).sum(1), rtol=1e-3, atol=1e-6)
        if whole and _upright(image, shadow, channels):
            return cells
    return pixels


def _marked(image: Tensor, shadow: Tensor, channels: int) -> Tensor:
    """Gives each token a number of its own, and returns what the first image gets, (1, ...)."""
    shape = list(shadow.shape)
    shape[channels] = 1
    generator = torch.Generator().manual_seed(0)
    marks = torch.rand(shape, generator=generator, dtype=torch.float64).to(shadow).expand(shadow.shape)
    (found,) = torch.autograd.grad(shadow, image, marks, retain_graph=True)
    return found[:1].cpu()  # one read: what follows would wait for a GPU more than once


def _upright(image: Tensor, stem: Tensor, channels: int | None) -> bool:
    """Whether tokens lie in each dimension as the pixels do, from the first to the last."""
    size = without(image, channels).shape[1:]
    grid = stem.shape[2:]
    if any(pixels % count for pixels, count in zip(size, grid, strict=True)):
        return False
    for swapped in range(2):  # a corner, and the opposite one
        ends = [(number + swapped) % 2 for number in range(len(grid))]  # 1: at the last place
        marks = blank(stem.shape, stem).clone()
        corner: tuple[Any, ...] = (slice(None), slice(None), *(-end for end in ends))
        marks[corner] = 1
        (found,) = torch.autograd.grad(stem, image, marks, retain_graph=True)
        lit = without(found, channels)[0]
        for dim, (count, end) in enumerate(zip(grid, ends, strict=True)):
            along = lit.sum([other for other in range(lit.ndim) if other != dim])
            middle = float((along * torch.arange(len(along), device=along.device)).sum() / along.sum())
            if count > 1 and (middle / (len(along) - 1) > 0.5) != bool(end):
                return False
    return True


def blocks(pixels: Tensor) -> tuple[int, ...]:
    """Finds the coarsest regular grid that holds images exactly: how many constant blocks in each dimension.

    Args:
        pixels: (B, H, W), or with any other dimensions.

    Example:
        >>> blocks(torch.arange(6.0).view(1, 2, 3).repeat_interleave(4, 1).repeat_interleave(2, 2))
        (2, 3)
    """
    return tuple(_steps(pixels, dim) for dim in range(1, pixels.ndim))


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


def pooled(pixels: Tensor, grid: Sequence[int]) -> Tensor:
    """Sums the pixels, (B, ...), of each cell of a grid that divides the image."""
    for dim, count in enumerate(grid, 1):
        pixels = pixels.unflatten(dim, (count, -1)).sum(dim + 1)
    return pixels


def divided(cells: Tensor, grid: Sequence[int]) -> Tensor:
    """Shares out each cell of maps, (B, ...), evenly among those of a finer grid that it divides."""
    for dim, count in enumerate(grid, 1):
        parts = count // cells.shape[dim]
        cells = cells.repeat_interleave(parts, dim) / parts
    return cells

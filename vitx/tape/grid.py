"""From the relevance of pixels to a map: the grid of the first tokens, if the pixels show one."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.tape.attention import Attention
from vitx.tape.axes import channel_dims
from vitx.tape.expanded import core, ratio, summed
from vitx.tape.rules.layers import CONVOLUTIONS
from vitx.tape.sums import Sum
from vitx.tape.tape import Tape
from vitx.tape.values import Value
from vitx.tape.walk import marks, through, walk

_ALIKE = 1e-5  # relative to the largest value


class Grid:
    """The layout of the first tokens of a pass in the image."""

    def __init__(self, tape: Tape) -> None:
        self._tape, self._image = tape, tape.image

    @cached_property
    def embedded(self) -> Value | None:
        """The output of the first call that applies weights to the pixels."""
        made = (s.outputs[0] for s in self._tape.steps if s.outputs[0].fan or s.name in CONVOLUTIONS)
        return next((value for value in made if value.ancestors >> self._image.number & 1), None)

    @cached_property
    def stem(self) -> list[Value]:
        """The values before the first attention that have the dimensions of the image, the last one first."""
        ndim = len(self._image.shape) if self.embedded else 0
        found = []
        for step in takewhile(lambda step: not isinstance(step, Attention), self._tape.steps):
            value = step.outputs[0]
            slides = step.name in CONVOLUTIONS or "pool" in step.name
            slides = slides or (isinstance(step, Sum) and step.stream is None)
            if slides and len(value.shape) == ndim and channel_dims(value.axes) == [1]:
                found.append(value)
        return found[::-1]

    @cached_property
    def channels(self) -> int | None:
        """The dimension of the image that holds its channels; None if there is none, as in a spectrogram.

        It is the one that the first weights take as a whole. A clip without one raises a VitxError.
        """
        shape = self._image.shape
        if len(shape) == 3:
            return None
        if self.embedded is None:
            return 1
        counts = blocks(self._marks)
        last = len(shape) - 1
        among = (1, last) if last == 3 else (1, 2, last)
        found = next((dim for dim in among if counts[dim - 1] == 1), None)
        if found is None and last > 3:
            raise VitxError(
                f"the model takes neither dimension 1 nor 2 of an input of shape {tuple(shape)} as a whole: "
                "one of them must be its channels"
            )
        return 1 if found is None else found

    @cached_property
    def _marks(self) -> Tensor:
        assert self.embedded is not None
        return self._marked(self.embedded)

    def without_channels(self, pixels: Tensor) -> Tensor:
        """Sum over the channels."""
        return pixels if self.channels is None else summed(pixels, [self.channels])

    def map(self, pixels: Tensor, tokens: Mapping[Value, Tensor]) -> Tensor:
        """Return the map in the grid of the first tokens, (B, h, w), or else the pixels unchanged.

        The first tokens form a grid if each one is computed from a block of pixels. If their pixels overlap,
        as after a convolutional stem, the map is the relevance of a value in `stem`, provided that all of it
        passes through it, and that the tokens are ordered in the image as in the tensor. A pixel that
        several tokens share is no brighter for it.
        """
        if self.embedded is None:
            return pixels
        passed = [one for one in self.stem if one in tokens and _same_sums(tokens[one], pixels)]
        grid = blocks(self.without_channels(self._marks))
        if grid != tuple(pixels.shape[1:]):
            cells = pooled(pixels, grid)
            even = divided(cells, pixels.shape[1:])
            if bool((pixels - even).abs_().amax() <= _ALIKE * pixels.abs().amax()):
                return self._evened(cells, passed[0] if passed else self.embedded)
        for value in passed:
            if len(value.shape) == pixels.ndim + 1 and self._is_upright(value):
                return tokens[value].sum(1)
        return pixels

    def _evened(self, cells: Tensor, tokens: Value) -> Tensor:
        """Divide cells by what they get from equal tokens, and restore their absolute sum."""
        same = self._at_image(tokens, torch.ones(1, dtype=torch.float64, device="cpu").expand(tokens.shape))
        alike = pooled(self.without_channels(same), cells.shape[1:]).to(cells)
        seen = alike > _ALIKE * alike.amax()
        if alike.amax() - alike[seen].amin() <= _ALIKE * alike.amax():
            return cells
        even, whole = ratio(cells * seen, alike), tuple(range(1, cells.ndim))
        return even * ratio(*(one.abs().sum(whole, keepdim=True) for one in (cells, even)))

    def _marked(self, value: Value) -> Tensor:
        """Give each token a number of its own, and return what the images get, as in `_at_image`."""
        return self._at_image(value, marks(value.shape, value.axes))

    def _at_image(self, value: Value, sent: Tensor) -> Tensor:
        """Return what the first image gets, (1, ...), or what all get, (B, ...), if these may differ."""
        assert value.made_by is not None
        with torch.no_grad():
            way = walk(self._tape, {value: sent}, through, steps=range(value.made_by.index + 1))
        found = way.arrived.get(self._image, sent.new_zeros(()).expand(self._image.shape))
        return found if self._tape.together else found[:1]

    def _is_upright(self, value: Value) -> bool:
        """Return whether tokens are ordered as the pixels in each dimension: a rising ramp stays rising."""
        for dim, count in enumerate(value.shape[2:], 2):
            rising = _rising(count).view(-1, *[1] * (len(value.shape) - dim - 1)).expand(value.shape)
            lit = self.without_channels(self._at_image(value, rising)).transpose(0, dim - 1).flatten(1)
            if len(lit) % count or (count > 1 and lit.sum(1) @ _rising(len(lit)) <= 0.1 * lit.abs().sum()):
                return False
        return True


def _same_sums(some: Tensor, others: Tensor) -> bool:
    """Return whether two tensors have the same sum for each image; False if one holds single frames."""
    first, second = some.flatten(1).sum(1), others.flatten(1).sum(1)
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-3, atol=1e-6)


def _rising(count: int) -> Tensor:
    return torch.linspace(-1, 1, count, dtype=torch.float64, device="cpu")


def blocks(pixels: Tensor) -> tuple[int, ...]:
    """Count, in each dimension of images (B, ...), the blocks within which no image changes.

    Example:
        >>> blocks(torch.arange(6.0).view(1, 2, 3).repeat_interleave(4, 1).repeat_interleave(2, 2))
        (2, 3)
    """
    found, pixels = [], core(pixels)
    for dim, size in enumerate(pixels.shape[1:], 1):
        changes = pixels.diff(dim=dim).abs() > _ALIKE * pixels.abs().amax()
        edges = changes.transpose(0, dim).flatten(1).any(1).nonzero().flatten() + 1
        found.append(size // math.gcd(size, *edges.tolist()))
    return tuple(found)


def pooled(pixels: Tensor, grid: Sequence[int]) -> Tensor:
    """Sum the pixels, (B, ...), in each cell of a grid that divides the image."""
    for dim, count in enumerate(grid, 1):
        pixels = pixels.unflatten(dim, (count, -1)).sum(dim + 1)
    return pixels


def divided(cells: Tensor, grid: Sequence[int]) -> Tensor:
    """Distribute each cell of maps, (B, ...), evenly among the cells of a finer grid that lie in it."""
    for dim, count in enumerate(grid, 1):
        parts = count // cells.shape[dim]
        cells = cells.repeat_interleave(parts, dim) / parts
    return cells

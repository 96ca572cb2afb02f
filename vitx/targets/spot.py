"""The token of the last layer at a cell of the map: where relevance starts, and its features as a score."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.tape.attention import Attention
from vitx.tape.axes import channel_dims
from vitx.tape.expanded import scaled
from vitx.tape.grid import Grid
from vitx.tape.relevance import Placement, Propagation
from vitx.tape.score import Score, output_value
from vitx.tape.tape import Tape
from vitx.tape.tensors import Kept
from vitx.tape.values import Step, Value
from vitx.tape.walk import Sent

Cells = Callable[[tuple[int, ...]], Sequence[tuple[int, ...]]]

_ALL = 1 - 1e-3  # of the largest share of a cell: tokens with at least this much count as equal


class Spot(NamedTuple):
    """The start of relevance: one token of each image."""

    score: Score  # the squared length of its features
    start: Tensor  # relevance in the shape of the features, which sums to 1 for each image
    grid: tuple[int, ...]  # the shape of the map


def find_spot(tape: Tape, images: int, cells_of: Cells, kind: torch.dtype) -> Spot:
    """Find the token at a cell of the map of each image.

    The last attention between tokens that lie in the picture determines the tokens. They are read after its
    MLP, and after the norm behind that if it is one operator. Raise a VitxError if there are no such tokens.
    """
    grid = Grid(tape)
    for value, kept, channels in _ends(tape):
        with torch.enable_grad():
            sizes = [1 if dim in channels else size for dim, size in enumerate(value.shape)]
            leaf = torch.ones(sizes, dtype=kind, device=kept.tensor.device, requires_grad=True)
            maps = _placed(tape, grid, value, leaf.expand(value.shape))
            if maps is None:
                continue
            shape = tuple(maps.shape[1:])
            pairs = zip(maps, cells_of(shape), strict=True)
            start = torch.stack([_begin(leaf, of_one[cell]) for of_one, cell in pairs]).sum(0)
        if (start.sum() - images).abs() < 1e-3 * images:
            output_value(tape, value)
            features, copies = kept.tensor.to(kind), start.numel() / value.shape.numel()
            score = Score(value, features, torch.where(start > 0, features, 0))
            return Spot(score, scaled(start.expand(value.shape), copies), shape)
    raise VitxError("no layer has tokens that lie in the picture like the map's patches: give a function")


def outlines(cells: Sequence[tuple[int, ...]], grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return the boxes of cells of a grid over images of a size, (B, 4): x0, y0, x1, y1 in pixels."""
    corners = torch.tensor(cells, device="cpu").flip(1)
    step = (torch.tensor(size, device="cpu") / torch.tensor(grid, device="cpu")).flip(0)
    return torch.cat([corners, corners + 1], 1) * step.repeat(2)


class _Placing(Propagation):
    """Relevance that keeps its place: it stops where attention, or indexing by values, would move it."""

    def _send(self, step: Step, arrived: list[Tensor]) -> Sent:
        return [] if isinstance(step, Attention) or step.chooses else super()._send(step, arrived)


def _placed(tape: Tape, grid: Grid, value: Value, sent: Tensor) -> Tensor | None:
    """Return what reaches each cell of the map from some tokens, (B, h, w); None if nothing does."""
    found = _Placing(tape, Placement()).run({value: sent}, grid.stem)
    pixels = found.arrived.get(tape.image)
    if pixels is None or not pixels.requires_grad:
        return None  # as for the queries of a decoder, which are parameters
    return grid.map(grid.without_channels(pixels), found.passed)


def _ends(tape: Tape) -> list[tuple[Value, Kept, list[int]]]:
    """Return the outputs of layers, last one first, with their tensors and their channel dimensions."""
    found: dict[Value, tuple[Value, Kept, list[int]]] = {}
    for layer in reversed(tape.layers):
        for residual in layer.residuals:
            out = residual.outputs[0]
            end = (tape.ends or {}).get(out.shape.numel())
            if end is not None and (end[0] is out or end[0].made_from(out)):
                branch = residual.branches[0]
                channels = channel_dims(branch.axes) if end[0].shape == out.shape == branch.shape else []
                found.setdefault(end[0], (*end, channels))
    return [*found.values()]


def _begin(leaf: Tensor, at: Tensor) -> Tensor:
    """Return relevance that starts at the token with the largest share of a cell, and sums to 1."""
    (share,) = torch.autograd.grad(at, leaf, retain_graph=True, materialize_grads=True)
    chosen = (share > 0) & (share >= _ALL * share.amax())
    return chosen.to(share) / chosen.sum().clamp(min=1)

"""Takes relevance through the layers of a trace, from the last one down, tile by tile."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from vitx.fused import SharedAttention
from vitx.tiles import Tile
from vitx.trace import Trace


class Propagation(Protocol):
    """What a method makes of the attention of one layer after another, last layer first.

    Attributes:
        start_layer: the first layer of the model that counts.
    """

    start_layer: int

    @property
    def relevance(self) -> Tensor:
        """Of each token, after the layers seen so far, (B, N)."""

    def read(self, tile: Tile) -> None:
        """Takes in some rows of the layer."""

    def end_layer(self) -> None:
        """Goes on to the layer below."""


def propagate_gradients(trace: Trace, propagations: Sequence[Propagation], score: Tensor) -> None:
    """Shows methods that need gradients each layer, while the backward pass goes through it.

    So no gradient outlives its layer, and A and its gradient, which the backward pass of attention needs
    too, are computed once.

    Args:
        trace: of a pass that was captured with gradients.
        propagations: the methods; layers without gradient are not shown to them.
        score: a scalar, the sum over the images of what is explained.
    """

    def show(index: int, gradient: Tensor) -> None:
        _show(propagations, index, trace.layers[index].tiles(gradient))

    first = min(one.start_layer for one in propagations)
    handles = []
    for index in range(first + 1, len(trace.layers)):
        layer = trace.layers[index]
        if isinstance(layer, SharedAttention):
            layer.reader = partial(_read, propagations, index)
        else:
            handles.append(trace.outputs[index].register_hook(partial(show, index)))
    try:
        for index in range(first, len(trace.layers)):
            gradient = trace.output_gradient(score, index)
            if gradient is not None:  # else the gradient stops above: the pass has not begun
                show(index, gradient)
                break
    finally:
        for handle in handles:
            handle.remove()  # else trace and hook would keep each other alive


def _read(propagations: Sequence[Propagation], index: int, tiles: Iterator[Tile]) -> Iterator[Tile]:
    """Passes on the tiles of a layer when all methods for which it counts have read them."""
    reading = [one for one in propagations if one.start_layer <= index]
    for tile in tiles:
        for one in reading:
            one.read(tile)
        yield tile
    for one in reading:
        one.end_layer()


def _show(propagations: Sequence[Propagation], index: int, tiles: Iterator[Tile]) -> None:
    for _ in _read(propagations, index, tiles):
        pass

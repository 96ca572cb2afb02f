"""The attention sinks of a pass: where they lie in the image, and the attention without them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.functional.sinks import sinks
from vitx.tape.attention import Attention
from vitx.tape.sums import Layer
from vitx.tape.tape import Tape
from vitx.tape.values import Value

Place = Callable[[Iterable[tuple[Value, Tensor]]], Tensor]  # maps parts of values to the image, (B, h, w)


@dataclass(frozen=True)
class Sinks:
    """The attention sinks of a pass.

    Attributes:
        tokens: (B, N), True at patches that are sinks.
        maps: (B, h, w), True where these lie; None if there are none.
    """

    tokens: Tensor
    maps: Tensor | None = None

    def marked(self, like: Tensor) -> Tensor:
        """Return where the sinks lie in maps of this shape, (B, h, w) bool."""
        if self.maps is None:
            return torch.zeros_like(like, dtype=torch.bool)
        if self.maps.shape == like.shape:
            return self.maps
        scaled = torch.nn.functional.interpolate(self.maps[:, None].float(), like.shape[1:])
        return scaled[:, 0].bool()


def find_sinks(tape: Tape, place: Place) -> Sinks | None:
    """Return the patches that are sinks, and where they lie; None if that cannot be determined."""
    layers = _alike(tape)
    if not layers:
        return None
    tokens = sinks([[one.weights for one in layer.attentions] for layer in layers])
    if tokens.is_meta:
        return None  # a meta tensor has no values
    found = tokens.any(0).nonzero().flatten().tolist()
    first = layers[0].attentions[0]
    try:
        located = dict(zip(found, _located(first, found, place), strict=True))
    except VitxError:
        return None  # it is unknown where the first tokens lie
    patches = [one for one in found if located[one].sum() > 0.5]
    kept = torch.zeros_like(tokens)
    kept[:, patches] = tokens[:, patches]
    if not patches:
        return Sinks(kept)
    places = torch.stack([located[one] > located[one].amax() / 2 for one in patches]).float()
    return Sinks(kept, torch.tensordot(kept[:, patches].float(), places, 1) > 0)


@contextmanager
def without(tape: Tape, found: Sinks | None) -> Iterator[None]:
    """Leave sinks out of A on the tape, inside the block."""
    if found is None:
        raise VitxError(
            "without_sinks needs attention among the same tokens in all layers, found windows or several "
            "sizes: leave it out"
        )
    before = {one: one.weights for one in tape.attentions}
    try:
        for one, weights in before.items() if found.maps is not None else ():
            if (weights.shape[0], weights.shape[3]) == tuple(found.tokens.shape):
                one.weights = weights.without(found.tokens)
        yield
    finally:
        for one, weights in before.items():
            one.weights = weights


def _alike(tape: Tape) -> list[Layer]:
    """Return the layers of more than one query, if all attend among the same tokens of each image."""
    layers = [layer for layer in tape.layers if layer.attentions[0].weights.shape[2] > 1]
    shapes = {(w.shape[0], *w.shape[2:]) for layer in layers for w in (a.weights for a in layer.attentions)}
    if len(shapes) != 1 or tape.together:
        return []
    ((images, queries, keys),) = shapes
    return layers if images == tape.image.shape[0] and queries == keys else []


def _located(attention: Attention, tokens: Sequence[int], place: Place) -> Iterator[Tensor]:
    """Yield the place of each of some tokens in the image, (h, w)."""
    like = attention.weights
    for start in range(0, len(tokens), like.shape[0]):  # each image can hold one of them
        some = tokens[start : start + like.shape[0]]
        marks = torch.zeros(like.shape[0], like.shape[3], dtype=like.dtype, device=like.device)
        marks[range(len(some)), some] = 1
        yield from place([(attention.inputs[0], attention.to_values(marks))])[: len(some)]

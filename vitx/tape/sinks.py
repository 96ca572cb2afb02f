"""The attention sinks of a pass: where they sit in the picture, and the attention without them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.functional.sinks import sinks
from vitx.tape.attention import Attention, Layer
from vitx.tape.tape import Tape
from vitx.tape.values import Value
from vitx.tape.walk import through, walk

Place = Callable[[Iterable[tuple[Value, Tensor]]], Tensor]  # draws what values have, (B, h, w)


@dataclass(frozen=True)
class Sinks:
    """What was found in a pass.

    Attributes:
        tokens: (B, N), True at patches that are sinks.
        maps: (B, h, w), True where these sit; None: there are none.
    """

    tokens: Tensor
    maps: Tensor | None = None

    def marked(self, like: Tensor) -> Tensor:
        """Returns where they sit in maps, (B, h, w) bool."""
        if self.maps is None:
            return torch.zeros_like(like, dtype=torch.bool)
        if self.maps.shape == like.shape:
            return self.maps
        scaled = torch.nn.functional.interpolate(self.maps[:, None].float(), like.shape[1:])
        return scaled[:, 0].bool()


def find_sinks(tape: Tape, place: Place, embedded: Value | None) -> Sinks | None:
    """Finds the patches that are sinks; None where they cannot be told.

    Args:
        tape: of the pass.
        place: draws what some values have where it sits in the picture.
        embedded: what the first weights made of the pixels, if that is known.
    """
    layers = _alike(tape)
    if not layers:
        return None
    tokens = sinks([[one.weights for one in layer.attentions] for layer in layers])
    if tokens.is_meta:
        return None  # values are needed to tell
    found = tokens.any(0).nonzero().flatten().tolist()
    first = layers[0].attentions[0]
    try:
        patches = [
            one for some in _by_image(first, found) for one in _from_image(tape, first, some, embedded)
        ]
        located = dict(zip(patches, _located(first, patches, place), strict=True))
    except VitxError:
        return None  # where the first tokens sit is not known
    patches = [one for one in patches if located[one].sum() > 0.5]
    kept = torch.zeros_like(tokens)
    kept[:, patches] = tokens[:, patches]
    if not patches:
        return Sinks(kept)
    places = torch.stack([located[one] > located[one].amax() / 2 for one in patches]).float()
    return Sinks(kept, torch.tensordot(kept[:, patches].float(), places, 1) > 0)


@contextmanager
def without(tape: Tape, found: Sinks | None) -> Iterator[None]:
    """Leaves sinks out of A on the tape of a pass."""
    if found is None:
        raise VitxError(
            "without_sinks needs attention among the same tokens in all layers, found windows or several "
            "sizes: leave it out"
        )
    changed = [one for one in tape.attentions if _fits(one.weights.shape, found.tokens)]
    before = [one.weights for one in changed]
    try:
        if found.maps is not None:
            for one in changed:
                one.weights = one.weights.without(found.tokens)
        yield
    finally:
        for one, weights in zip(changed, before, strict=True):
            one.weights = weights


def _fits(shape: tuple[int, ...], tokens: Tensor) -> bool:
    return (shape[0], shape[3]) == tuple(tokens.shape)


def _alike(tape: Tape) -> list[Layer]:
    """Returns the layers that attend among the same tokens of each image; none where others do not."""
    layers = [layer for layer in tape.layers if layer.attentions[0].weights.shape[2] > 1]
    shapes = {(w.shape[0], *w.shape[2:]) for layer in layers for w in (a.weights for a in layer.attentions)}
    if len(shapes) != 1 or tape.together:
        return []
    ((images, queries, keys),) = shapes
    return layers if images == tape.image.shape[0] and queries == keys else []


def _by_image(attention: Attention, tokens: Sequence[int]) -> list[Sequence[int]]:
    """Divides some tokens into parts, so that each image can have one of them."""
    images = attention.weights.shape[0]
    return [tokens[start : start + images] for start in range(0, len(tokens), images)]


def _marks(attention: Attention, tokens: Sequence[int]) -> tuple[Value, Tensor]:
    """Returns the values of an attention, with 1 at one of some tokens in each image."""
    weights = attention.weights
    found = torch.zeros(weights.shape[0], weights.shape[3], dtype=weights.dtype, device=weights.device)
    found[range(len(tokens)), tokens] = 1
    return attention.inputs[0], attention.to_values(found)


def _from_image(
    tape: Tape, attention: Attention, tokens: Sequence[int], embedded: Value | None
) -> Sequence[int]:
    """Returns those of some tokens that may come from the image; a class token does not."""
    value, marks = _marks(attention, tokens)
    if embedded is None or embedded.made_by is None or value.made_by is None:
        return tokens
    steps = range(embedded.made_by.index + 1, value.made_by.index + 1)
    arrived = walk(tape, {value: marks}, through, steps=steps).arrived.get(embedded)
    if arrived is None:
        return []
    if arrived.shape[0] != len(marks):
        return tokens
    share = arrived.flatten(1).sum(1).tolist()
    return [one for one, part in zip(tokens, share, strict=False) if part > 0.5]


def _located(attention: Attention, tokens: Sequence[int], place: Place) -> Iterator[Tensor]:
    """Yields where each of some tokens sits, (h, w)."""
    for some in _by_image(attention, tokens):
        yield from place([_marks(attention, some)])[: len(some)]

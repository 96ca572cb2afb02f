"""How tensors lie in their storages, and what is kept of those for the ways back."""

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from vitx.tape.axes import Axes, by_place
from vitx.tape.expanded import summed

Geometry = tuple[Sequence[int], Sequence[int], int]  # size, strides, offset


def storage_of(tensor: Tensor) -> int | None:
    """Returns what tells storages apart; None where a tensor has none of its own."""
    own = type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout == torch.strided
    return tensor.untyped_storage()._cdata if own else None


def geometry(tensor: Tensor) -> Geometry:
    """Returns how a tensor lies in its storage."""
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def lay(part: Tensor, where: Geometry, shape: Sequence[int]) -> Tensor:
    """Adds a part up where it lies in its storage, of this shape."""
    sizes, strides, offset = where
    copies = [dim for dim, stride in enumerate(strides) if stride == 0 and sizes[dim] > 1]
    part = summed(part, copies, keepdim=True)
    places = torch.arange(offset, offset + 1, device=part.device)
    for size, stride in zip(part.shape, strides, strict=True):
        places = places[..., None] + stride * torch.arange(size, device=part.device)
    return part.new_zeros(tuple(shape)).index_add(0, places.flatten(), part.reshape(-1))


def moved(axes: Axes, where: Geometry) -> Axes:
    """Returns the axes of a part of a storage."""
    return by_place(axes, lambda marks: marks.as_strided(*where).contiguous())


def overlap(first: Geometry, second: Geometry, size: int) -> bool:
    """Returns whether two tensors in a storage of this size have elements in common."""
    marks = torch.zeros(size, dtype=torch.bool)
    marks.as_strided(*first).fill_(True)
    return bool(marks.as_strided(*second).any())


def in_order(where: Geometry) -> bool:
    """Returns whether a tensor lies contiguously, from the beginning of its storage."""
    return where[2] == 0 and tuple(where[1]) == torch.empty(tuple(where[0]), device="meta").stride()


class Kept:
    """A tensor that is kept as it is now: itself, or a copy of it since its storage was written into."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


class Keeper:
    """Keeps tensors safe from what the model writes in place later."""

    def __init__(self) -> None:
        self._kept: dict[int | None, list[weakref.ref[Kept]]] = {}

    def keep(self, tensor: Tensor) -> Kept:
        """Keeps a tensor as it is now."""
        kept = Kept(tensor)
        self._kept.setdefault(storage_of(tensor), []).append(weakref.ref(kept))
        return kept

    def preserve(self, tensors: Iterable[Tensor]) -> None:
        """Copies what is kept of the storages of these tensors, before they are written into."""
        for tensor in tensors:
            for reference in self._kept.pop(storage_of(tensor), ()):
                kept = reference()
                if kept is not None:
                    kept.tensor = kept.tensor.clone()

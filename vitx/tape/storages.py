"""How tensors lie in their storages."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitx.tape.axes import Axes, by_place
from vitx.tape.expanded import summed

Geometry = tuple[Sequence[int], Sequence[int], int]  # size, strides, offset


def storage_of(tensor: Tensor) -> int | None:
    """Returns what tells storages apart; None where a tensor has none of its own."""
    if type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout == torch.strided:
        number: int = tensor.untyped_storage()._cdata
        return number
    return None


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

"""Storages that were written into, and the values that tensors see there.

A write into part of a storage counts as a scatter into the whole, and what another tensor sees there as a
view of the result: relevance and the gradient go back by the rules of these operators.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from vitx.tape.call import Call
from vitx.tape.overload import overload
from vitx.tape.rules import rule_of
from vitx.tape.tape import Tape
from vitx.tape.tensors import Geometry, Tensors, flat_view, geometry, storage_of
from vitx.tape.values import Value

ATEN = torch.ops.aten


@dataclass(eq=False)
class Version:
    """The contents of a storage since a value was written into it."""

    storage: StorageWeakRef
    value: Value
    where: Geometry  # the layout of the value in the storage
    dtype: torch.dtype  # of the elements that the layout counts
    before: "Version | None"  # the contents around the value; None if nothing there is live
    whole: Value | None = None  # of the whole storage, (n,), computed on demand


class Versions(dict[int | None, Version]):
    """The contents of each storage that was written into."""

    def __init__(self, tape: Tape, tensors: Tensors) -> None:
        super().__init__()
        self._tape, self._tensors = tape, tensors

    def is_stale(self, tensor: Tensor) -> bool:
        """Return whether the storage of a tensor was written into since the tensor got its value."""
        known = self._tensors.get(tensor)
        return (known is None or known.value is None) and self._of(tensor) is not None

    def read(self, tensors: Iterable[Tensor]) -> None:
        """Update the values of stale tensors to what their storages hold now."""
        for tensor in tensors:
            if self.is_stale(tensor):
                self._tensors.bind(tensor, self.seen(tensor))

    def write(self, tensor: Tensor, value: Value) -> None:
        """Note that a value was written into a tensor."""
        written = None
        if not _fills(tensor):
            self._begin(tensor)
            written = _marks(geometry(tensor), len(flat_view(tensor)))
        self._put(tensor, value)
        for other, _ in self._tensors.live_in(storage_of(tensor)):
            alike = other.dtype == tensor.dtype  # otherwise its layout counts other elements
            if written is None or not alike or written.as_strided(*geometry(other)).any():
                self._tensors.bind(other, None)
        self._tensors.bind(tensor, value)

    def seen(self, tensor: Tensor) -> Value:
        """Return the value that a tensor sees in its storage, whatever its layout."""
        self._begin(tensor)
        version, where, flat = self._of(tensor), geometry(tensor), flat_view(tensor)
        assert version is not None
        if version.dtype != tensor.dtype:  # no rule reads numbers as others, such as complex ones as real
            return self._follow(ATEN.view.dtype, [flat, tensor.dtype], [(flat, version.value)], tensor)
        while where != version.where and version.before and not _overlap(where, version.where, len(flat)):
            version = version.before  # the last write went elsewhere
        if where == version.where:
            return version.value
        whole = flat, self._whole(version, flat)
        if _fills(tensor) and tensor.is_contiguous():
            return self._follow(ATEN.view.default, [flat, where[0]], [whole], tensor)
        return self._follow(ATEN.as_strided.default, [flat, *where], [whole], tensor)

    def _of(self, tensor: Tensor) -> Version | None:
        """Return the current version of a tensor's storage; None if it was never written into."""
        version = self.get(storage_of(tensor))
        return None if version is None or version.storage.expired() else version

    def _begin(self, tensor: Tensor) -> None:
        """Count the live tensors in a storage as written there, unless it has a version already."""
        if self._of(tensor) is None:
            inside = [pair for pair in self._tensors.live_in(storage_of(tensor)) if pair[0] is not tensor]
            for one, value in [pair for pair in inside if _fills(pair[0])][-1:] or inside:
                self._put(one, value)

    def _put(self, tensor: Tensor, value: Value) -> None:
        before = None if _fills(tensor) else self._of(tensor)
        storage = StorageWeakRef(tensor.untyped_storage())
        self[storage_of(tensor)] = Version(storage, value, geometry(tensor), tensor.dtype, before)

    def _whole(self, version: Version, flat: Tensor) -> Value:
        """Return the value of a whole storage, (n,)."""
        if version.whole is None:
            part = flat.as_strided(*version.where)
            live = [(part, version.value)]
            if _fills(part) and part.is_contiguous():
                version.whole = self._follow(ATEN.view.default, [part, flat.shape], live, flat)
                return version.whole
            if version.before is not None:
                held = flat, self._whole(version.before, flat)
                live = [held] if version.value.is_constant else [held, *live]
            rest = flat if version.before else flat.clone()  # constants, which may be overwritten later
            args = [rest, part, *version.where]
            version.whole = self._follow(ATEN.as_strided_scatter.default, args, live, flat)
        return version.whole

    def _follow(
        self, function: Any, args: Sequence[Any], live: Sequence[tuple[Tensor, Value]], out: Tensor
    ) -> Value:
        """Return the value that the output of a call would have."""
        call = Call(self._tape, self._tensors, overload(function), args, {}, live, [out])
        return rule_of(call)(call)[0]


def _fills(tensor: Tensor) -> bool:
    """Return whether a tensor covers its whole storage."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _overlap(first: Geometry, second: Geometry, size: int) -> bool:
    """Return whether two layouts in a storage of this size have elements in common."""
    return bool(_marks(first, size).as_strided(*second).any())


def _marks(where: Geometry, size: int) -> Tensor:
    """Return which elements of a storage of this size a layout holds, (size,) bool."""
    marks = torch.zeros(size, dtype=torch.bool, device="cpu")
    marks.as_strided(*where).fill_(True)
    return marks

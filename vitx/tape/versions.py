"""Storages that were written into: what they hold, and what of it a tensor sees that lies there.

Values are versions. Where a storage is written into, all other tensors in it are stale, and get the value of
what lies there now when they are read.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from vitx.tape import axes as ax
from vitx.tape.expanded import reshaped
from vitx.tape.storages import Geometry, geometry, in_order, lay, moved, overlap, storage_of
from vitx.tape.tape import Tape
from vitx.tape.tensors import Tensors
from vitx.tape.values import AxesOf, Back, Step, Value, after


class Version(NamedTuple):
    """What a storage holds since it was written into: the value of a tensor that fills it.

    Attributes:
        stamp: how many values had been given to tensors by then.
        part: what was written last, and where; None if that is all.
        before: what it held before that.
    """

    storage: StorageWeakRef
    value: Value
    geometry: Geometry
    stamp: int
    part: tuple[Value, Geometry] | None = None
    before: "Version | None" = None


class Versions(dict[int | None, Version]):
    """What each storage holds that was written into."""

    def __init__(self, tape: Tape, tensors: Tensors) -> None:
        super().__init__()
        self._tape, self._tensors = tape, tensors

    def of_stale(self, tensor: Tensor) -> Version | None:
        """Returns what the storage of a tensor holds that has no value of it; None if it is not stale."""
        version, known = self._of(tensor), self._tensors.get(tensor)
        fresh = version and known and known.value is not None and known.stamp > version.stamp
        return None if fresh else version

    def read(self, tensors: Sequence[Tensor]) -> None:
        """Gives those of several tensors that are stale the values of what lies there now."""
        for tensor in tensors:
            version = self.of_stale(tensor)
            if version is not None:
                self._tensors.bind(tensor, self._seen(tensor, version))

    def write(self, tensor: Tensor, value: Value) -> None:
        """Notes that a value was written into a tensor."""
        storage, where, stamp = tensor.untyped_storage(), geometry(tensor), self._tensors.stamp
        version = Version(StorageWeakRef(storage), value, where, stamp)
        if tensor.numel() < _size(tensor):
            flat = self._flat(tensor)
            before = self._of(tensor) or version._replace(value=flat, geometry=_whole(tensor))
            held = self._overwritten(flat, value, where)
            version = Version(version.storage, held, _whole(tensor), stamp, (value, where), before)
        self[storage._cdata] = version
        self._tensors.bind(tensor, value)

    def laid(self, tensor: Tensor) -> Value:
        """Returns the value of a tensor that lies in a storage in any way, as `as_strided` makes it."""
        return self._part(tensor, self._flat(tensor))

    def _of(self, tensor: Tensor) -> Version | None:
        """Returns what the storage of a tensor holds; None if nobody wrote there."""
        key = storage_of(tensor)
        version = self.get(key)
        if version is not None and version.storage.expired():
            del self[key]
            return None
        return version

    def _seen(self, tensor: Tensor, version: Version) -> Value:
        """Returns the value of what a tensor sees of its storage."""
        where, size = geometry(tensor), _size(tensor)
        while version.part is not None and version.before is not None:
            value, there = version.part
            if where == there:
                return value
            if overlap(where, there, size):
                break
            version = version.before  # what was written lies elsewhere
        if where == version.geometry:
            return version.value
        if tensor.numel() == size and in_order(where) and in_order(version.geometry):
            return self._reshaped(version.value, where[0])
        return self._part(tensor, self._flattened(version.value, version.geometry, size))

    def _flat(self, tensor: Tensor) -> Value:
        """Returns the value of all that lies in a tensor's storage, (n,), before it is written into."""
        size, version = _size(tensor), self._of(tensor)
        if version is not None:
            return self._flattened(version.value, version.geometry, size)
        inside = self._tensors.live_in(tensor.untyped_storage()._cdata)
        for one, value in inside:
            if one.numel() == size:
                return self._flattened(value, geometry(one), size)
        whole = tensor.as_strided(*_whole(tensor)).clone() if self._tape.accounts else None
        flat = self._tape.constant(whole, (size,))
        for one, value in sorted(inside, key=lambda pair: pair[0].numel()):
            flat = self._overwritten(flat, value, geometry(one))
        return flat

    def _overwritten(self, flat: Value, value: Value, where: Geometry) -> Value:
        """Returns the value of a storage, (n,), with something written into it."""

        def back(arrived: list[Tensor]) -> list[Tensor]:
            rest = arrived[0].clone()
            part = rest.as_strided(*where).clone()
            rest.as_strided(*where).zero_()
            return [rest, part]

        return self._step("write", [flat, value], flat.shape, back)

    def _flattened(self, value: Value, where: Geometry, size: int) -> Value:
        """Returns the value of a storage, (n,), from one that fills it."""
        if where[0] == (size,):
            return value
        if in_order(where):
            return self._reshaped(value, (size,))
        flat = self._step("view", [value], (size,), lambda r: [r[0].contiguous().as_strided(*where)])
        flat.roots = value.roots
        return flat

    def _reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """Returns the value of the same elements in the same order."""
        back = partial(reshaped, shape=value.shape)
        found = self._step(
            "view", [value], shape, lambda r: [back(r[0])], lambda of: ax.reshaped(of[0], shape)
        )
        found.roots, found.fan, found.place = value.roots, value.fan, value.place
        found.sum, found.via = value.sum, after(back, value.via)
        return found

    def _part(self, tensor: Tensor, flat: Value) -> Value:
        """Returns the value of a tensor from that of all that lies in its storage."""
        where, size = geometry(tensor), flat.shape
        if flat.is_constant:
            return self._tape.constant(tensor.clone() if self._tape.accounts else None, tensor.shape)
        found = self._step(
            "read", [flat], where[0], lambda r: [lay(r[0], where, size)], lambda of: moved(of[0], where)
        )
        found.roots = flat.roots
        return found

    def _step(
        self, name: str, inputs: list[Value], shape: Sequence[int], back: Back, axes: AxesOf | None = None
    ) -> Value:
        """Adds a step by which relevance and the gradient go back alike."""
        found = self._tape.value(shape, inputs)
        self._tape.append(Step(name, inputs, [found], back, back, axes=axes))
        return found


def _size(tensor: Tensor) -> int:
    """Returns how many elements the storage of a tensor has."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _whole(tensor: Tensor) -> Geometry:
    """Returns how a tensor lies in its storage that is all of it, (n,)."""
    return (_size(tensor),), (1,), 0

"""Storages that were written into: what they hold, and what of it a tensor sees that lies there.

Values are versions. Where a storage is written into, all other tensors in it are stale, and get the value of
what lies there now when they are read.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from vitx.tape import axes as ax
from vitx.tape.expanded import reshaped
from vitx.tape.storages import Geometry, geometry, in_order, lay, moved, overlap, pick, storage_of
from vitx.tape.tape import Tape
from vitx.tape.tensors import Tensors
from vitx.tape.values import Step, Value, after

AxesOf = Callable[[list[ax.Axes]], ax.Axes | None]


class Version(NamedTuple):
    """What a storage holds since it was written into.

    Attributes:
        storage: a reference to it.
        value: of the tensor that lies in it.
        geometry: how that lies in it.
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
        """Begins with none."""
        super().__init__()
        self._tape, self._tensors = tape, tensors

    def is_stale(self, tensor: Tensor) -> bool:
        """Returns whether the storage of a tensor was written into since it got its value."""
        return self._unread(tensor) is not None

    def read(self, tensor: Tensor) -> Value | None:
        """Gives a stale tensor the value of what lies there now, and returns it; None if it is not stale."""
        version = self._unread(tensor)
        if version is None:
            return None
        value = self._seen(tensor, version)
        self._tensors.bind(tensor, value)
        return value

    def write(self, tensor: Tensor, value: Value) -> None:
        """Notes that a value was written into a tensor."""
        storage, where, stamp = tensor.untyped_storage(), geometry(tensor), self._tensors.stamp
        reference = StorageWeakRef(storage)
        version = Version(reference, value, where, stamp)
        if tensor.numel() * tensor.element_size() < storage.nbytes():
            flat = self._flat(tensor)
            everywhere: Geometry = (tuple(flat.shape), (1,), 0)
            before = self._of(tensor) or Version(reference, flat, everywhere, stamp)
            held = self._overwritten(flat, value, where)
            version = Version(reference, held, everywhere, stamp, (value, where), before)
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

    def _unread(self, tensor: Tensor) -> Version | None:
        """Returns what the storage of a stale tensor holds; None if it is not stale."""
        version, known = self._of(tensor), self._tensors.get(tensor)
        if version is None or (known is not None and known.value is not None and known.stamp > version.stamp):
            return None
        return version

    def _seen(self, tensor: Tensor, version: Version) -> Value:
        """Returns the value of what a tensor sees of its storage."""
        where, shape = geometry(tensor), (_size(tensor),)
        while version.part is not None and version.before is not None:
            value, there = version.part
            if where == there:
                return value
            if overlap(where, there, *shape):
                break
            version = version.before  # what was written lies elsewhere
        value = version.value
        if where == version.geometry:
            return value
        if in_order(where) and in_order(version.geometry) and value.shape.numel() == shape[0]:
            return self._reshaped(value, tuple(tensor.shape))
        return self._part(tensor, self._flattened(value, version.geometry, shape))

    def _flat(self, tensor: Tensor) -> Value:
        """Returns the value of all that lies in a tensor's storage, (n,), before it is written into."""
        shape, version = (_size(tensor),), self._of(tensor)
        if version is not None:
            return self._flattened(version.value, version.geometry, shape)
        inside = list(self._tensors.live_in(tensor.untyped_storage()._cdata))
        for one, value in inside:
            if one.numel() == shape[0]:
                return self._flattened(value, geometry(one), shape)
        whole = tensor.as_strided(shape, (1,), 0).clone() if self._tape.accounts else None
        flat = self._tape.constant(whole, shape)
        for one, value in sorted(inside, key=lambda pair: pair[0].numel()):
            flat = self._overwritten(flat, value, geometry(one))
        return flat

    def _overwritten(self, flat: Value, value: Value, where: Geometry) -> Value:
        """Returns the value of a storage, (n,), with something written into it."""

        def back(arrived: list[Tensor]) -> list[Tensor]:
            rest = arrived[0].clone()
            part = pick(rest, where).clone()
            pick(rest, where).zero_()
            return [rest, part]

        return self._step("write", [flat, value], flat.shape, back)

    def _flattened(self, value: Value, where: Geometry, shape: tuple[int, ...]) -> Value:
        """Returns the value of a storage, (n,), which a value fills."""
        if tuple(value.shape) == shape and where[2] == 0:
            return value
        straight = tuple(value.shape) == tuple(where[0]) and in_order(where)
        axes = (lambda of: ax.reshaped(of[0], shape)) if straight else None
        flat = self._step("view", [value], shape, lambda r: [pick(r[0].contiguous(), where)], axes)
        flat.roots, flat.open = value.roots, value.open
        return flat

    def _reshaped(self, value: Value, shape: tuple[int, ...]) -> Value:
        """Returns the value of the same elements in the same order."""
        before = value.shape
        found = self._step(
            "view", [value], shape, lambda r: [reshaped(r[0], before)], lambda of: ax.reshaped(of[0], shape)
        )
        found.roots, found.open, found.fan, found.place = value.roots, value.open, value.fan, value.place
        found.sum, found.via = value.sum, after(lambda r: reshaped(r, before), value.via)
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
        self,
        name: str,
        inputs: list[Value],
        shape: Sequence[int],
        back: Callable[[list[Tensor]], list[Tensor]],
        axes: AxesOf | None = None,
    ) -> Value:
        """Adds a step by which relevance and the gradient go back alike."""
        found = self._tape.value(shape, inputs)
        self._tape.append(Step(name, inputs, [found], back, back, axes=axes))
        return found


def _size(tensor: Tensor) -> int:
    """Returns how many elements a tensor's storage has."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()

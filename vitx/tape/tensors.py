"""What is known of the tensors of a pass: which are live, and of what the others were made."""

import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from vitx.tape.storages import storage_of
from vitx.tape.values import Value

Factors = Sequence[tuple[Tensor, Value | None]] | None  # with their values; None for constants


class Known(weakref.ref[Tensor]):
    """What is known of a tensor, to which it is a weak reference.

    Attributes:
        key: the identity of the tensor.
        value: its value, if it is live.
        stamp: how many values had been given to tensors when it got this one.
        factors: what it is the product of.
        fixed: of what the pass made without the image, whether nothing learned went into it; else None.
        source: the live value of which a mask or an index was made.
    """

    key: int
    value: Value | None = None
    stamp = 0
    factors: Factors = None
    fixed: bool | None = None
    source: Value | None = None


class Tensors:
    """What is known of each tensor, as long as there is one, and where the model keeps its own."""

    def __init__(self, model: nn.Module) -> None:
        self.stamp = 0  # how many values were given to tensors
        self._known: dict[int, Known] = {}
        modules = list(model.modules())
        buffers = [b for module in modules for b in module._buffers.values() if b is not None]
        parameters = [p for module in modules for p in module._parameters.values() if p is not None]
        self._buffers = set(map(storage_of, buffers))
        self._own = self._buffers.union(map(storage_of, parameters))

    def get(self, tensor: Tensor) -> Known | None:
        """Returns what is known of a tensor; None if nothing is."""
        return self._known.get(id(tensor))

    def of(self, tensor: Tensor) -> Known:
        """Returns what is known of a tensor, to be added to."""
        key = id(tensor)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Known(tensor, self._forget)
            known.key = key
        return known

    def _forget(self, known: Known) -> None:
        del self._known[known.key]

    def bind(self, tensor: Tensor, value: Value, factors: Factors = None) -> None:
        """Says which value a tensor has from now on."""
        self.stamp += 1
        known = self.of(tensor)
        known.value, known.stamp, known.factors = value, self.stamp, factors

    def live(self, tensors: Iterable[Tensor]) -> list[tuple[Tensor, Value]]:
        """Returns the live ones of several tensors, with their values."""
        known = self._known
        return [(t, one.value) for t in tensors if (one := known.get(id(t))) and one.value]

    def live_in(self, storage: int) -> list[tuple[Tensor, Value]]:
        """Returns the live tensors that lie in a storage, with their values."""
        tensors = [tensor for known in list(self._known.values()) if (tensor := known()) is not None]
        return [(tensor, value) for tensor, value in self.live(tensors) if storage_of(tensor) == storage]

    def is_fixed(self, constant: Tensor) -> bool:
        """Returns whether a constant was not learned: made of nothing that was, or a buffer."""
        known = self.get(constant)
        if known is not None and known.fixed is not None:
            return known.fixed
        return bool(self._buffers) and storage_of(constant) in self._buffers

    def is_of_model(self, tensor: Tensor) -> bool:
        """Returns whether a tensor lies where the model keeps its own."""
        return storage_of(tensor) in self._own

"""What is known of the tensors of a pass: which are live, and of what the others were made."""

import weakref
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from vitx.tape.storages import storage_of
from vitx.tape.values import Value

Factors = Sequence[tuple[Tensor, Value | None]] | None  # with their values; None for constants


class Known(weakref.ref[Tensor]):
    """What is known of a tensor, to which it is a weak reference.

    Attributes:
        key: the tensor's identity.
        value: its value, if it is live.
        stamp: how many values had been given when it got this one.
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
    """What is known of each tensor, as long as there is one.

    Attributes:
        stamp: how many values were given to tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        """Looks where the model keeps its own."""
        self.stamp = 0
        self._known: dict[int, Known] = {}
        modules = list(model.modules())
        parameters = [p for module in modules for p in module._parameters.values() if p is not None]
        buffers = [b for module in modules for b in module._buffers.values() if b is not None]
        self._buffers = {storage_of(buffer) for buffer in buffers}
        self._own = self._buffers | {storage_of(parameter) for parameter in parameters}

    def get(self, tensor: Tensor) -> Known | None:
        """Returns what is known of a tensor; None if nothing is."""
        return self._known.get(id(tensor))

    def bind(self, tensor: Tensor, value: Value, factors: Factors = None) -> None:
        """Says which value a tensor has from now on."""
        self.stamp += 1
        known = self._of(tensor)
        known.value, known.stamp, known.factors = value, self.stamp, factors

    def made(self, tensor: Tensor, fixed: bool) -> None:
        """Notes that the pass made a constant, and whether of nothing that was learned."""
        self._of(tensor).fixed = fixed

    def answers(self, tensor: Tensor, source: Value) -> None:
        """Notes of which live value a mask or an index was made."""
        self._of(tensor).source = source

    def is_fixed(self, constant: Tensor) -> bool:
        """Returns whether a constant was not learned: made of nothing that was, or a buffer."""
        known = self.get(constant)
        if known is not None and known.fixed is not None:
            return known.fixed
        return bool(self._buffers) and storage_of(constant) in self._buffers

    def are_fixed(self, constants: Iterable[Tensor]) -> bool:
        """Returns whether none of several constants was learned."""
        return all(self.is_fixed(one) for one in constants if one.is_floating_point())

    def is_of_model(self, tensor: Tensor) -> bool:
        """Returns whether a tensor lies where the model keeps its own."""
        return storage_of(tensor) in self._own

    def live_in(self, storage: int) -> Iterator[tuple[Tensor, Value]]:
        """Yields the live tensors that lie in a storage, with their values."""
        for known in list(self._known.values()):
            tensor = known()
            if tensor is not None and known.value is not None and storage_of(tensor) == storage:
                yield tensor, known.value

    def _of(self, tensor: Tensor) -> Known:
        key = id(tensor)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Known(tensor, self._forget)
            known.key = key
        return known

    def _forget(self, known: Known) -> None:
        del self._known[known.key]

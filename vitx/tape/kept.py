"""Tensors of a pass that are kept for the ways back, safe from what the model writes in place later."""

import weakref
from collections.abc import Iterable

from torch import Tensor

from vitx.tape.storages import storage_of


class Kept:
    """A tensor that is kept as it is now: itself, or a copy of it since its storage was written into."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        """Keeps a tensor."""
        self.tensor = tensor.detach()


class Keeper:
    """Knows what is kept of which storage."""

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

"""Notes on the tensors of a pass, and copies of those that backward walks need."""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vitx.tape.values import Value

Factors = Sequence[tuple[Tensor, Value | None]] | None  # tensors with their values; None for constants

# "fixed": computed from numbers, or a buffer. "given": neither computed in the pass nor held by the model,
# such as a user's mask or swapped-in weights. A combination has the last of its origins in this order.
Origin = Literal["fixed", "given", "learned"]
ORIGINS: tuple[Origin, ...] = get_args(Origin)


Geometry = tuple[Sequence[int], Sequence[int], int]  # size, strides, offset


def storage_of(tensor: Tensor) -> int | None:
    """Return an identifier of a tensor's storage; None if it has no storage of its own."""
    # A subclass with a dispatch of its own wraps other tensors.
    own = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.layout == torch.strided
    if not own:
        return None
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # a batch of vmap
        return None


def flat_view(tensor: Tensor) -> Tensor:
    """Return a flat view of the whole storage of a tensor, (n,)."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def geometry(tensor: Tensor) -> Geometry:
    """Return the layout of a tensor in its storage."""
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


class Known(weakref.ref[Tensor]):
    """Notes on a tensor, and a weak reference to it."""

    key: int  # the identity of the tensor
    value: Value | None = None  # if it is live, and its storage was not written into since
    factors: Factors = None  # its factors, if it is a known product
    origin: Origin | None = None  # of a tensor that the pass computed without the image
    source: Value | None = None  # the live value that a mask or an index was computed from


class Tensors:
    """Notes on each tensor while it exists, and the storages that belong to the model."""

    def __init__(self, model: nn.Module) -> None:
        self._known: dict[int, Known] = {}
        self._model = model

    @cached_property
    def _buffers(self) -> set[int | None]:
        return {storage_of(one) for one in self._model.buffers()}

    @cached_property
    def _weights(self) -> set[int | None]:
        modules = [*self._model.modules()]
        held = [one for module in modules for one in module._parameters.values() if one is not None]
        scripts = [module for module in modules if isinstance(module, torch.jit.ScriptModule)]
        return {storage_of(one) for one in (*held, *chain.from_iterable(map(_frozen, scripts)))}

    def get(self, tensor: Tensor) -> Known | None:
        """Return the notes on a tensor; None if there are none."""
        return self._known.get(id(tensor))

    def of(self, tensor: Tensor) -> Known:
        """Return the notes on a tensor, created if there are none."""
        key = id(tensor)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Known(tensor, self._forget)
            known.key = key
        return known

    def _forget(self, known: Known) -> None:
        del self._known[known.key]

    def bind(self, tensor: Tensor, value: Value | None, factors: Factors = None) -> None:
        """Set the value that a tensor has from now on."""
        known = self.of(tensor)
        known.value, known.factors = value, factors

    def live(self, tensors: Iterable[Tensor]) -> list[tuple[Tensor, Value]]:
        """Return the live tensors among several, with their values."""
        known = self._known
        return [(t, one.value) for t in tensors if (one := known.get(id(t))) and one.value]

    def live_in(self, storage: int | None) -> list[tuple[Tensor, Value]]:
        """Return the live tensors in a storage, with their values, the largest one last."""
        tensors = [tensor for known in list(self._known.values()) if (tensor := known()) is not None]
        found = [pair for pair in self.live(tensors) if storage_of(pair[0]) == storage]
        return sorted(found, key=lambda pair: pair[0].numel())

    def origin(self, constant: Tensor) -> Origin:
        """Return where a constant comes from."""
        known = self.get(constant)
        if known is not None and known.origin is not None:
            return known.origin
        if constant.requires_grad or isinstance(constant, nn.Parameter):
            return "learned"
        storage = storage_of(constant)
        return "fixed" if storage in self._buffers else "learned" if storage in self._weights else "given"

    def is_weight(self, tensor: Tensor) -> bool:
        """Return whether a tensor lies in the storage of a parameter."""
        return storage_of(tensor) in self._weights

    def is_of_model(self, tensor: Tensor) -> bool:
        """Return whether a tensor lies in a storage that belongs to the model."""
        return self.is_weight(tensor) or storage_of(tensor) in self._buffers


def _frozen(module: torch.jit.ScriptModule) -> Iterator[Tensor]:
    """Yield the weights that `torch.jit.freeze` wrote into the graph of a module."""
    with suppress(RuntimeError):  # the module has no forward
        for node in module.graph.findAllNodes("prim::Constant"):  # type: ignore[attr-defined]
            if node.hasAttribute("value") and node.kindOf("value") == "t":
                yield node.t("value")


@dataclass(eq=False)
class Kept:
    """A tensor that is kept as it was: itself, or a copy from before its storage was written into."""

    tensor: Tensor


class Keeper:
    """A collection of tensors that are safe from the model's later in-place writes."""

    def __init__(self) -> None:
        self._kept: dict[int | None, weakref.WeakSet[Kept]] = defaultdict(weakref.WeakSet)

    def keep(self, tensor: Tensor) -> Kept:
        """Keep a tensor as it is now."""
        kept = Kept(tensor.detach())
        self._kept[storage_of(tensor)].add(kept)
        return kept

    def preserve(self, tensors: Iterable[Tensor]) -> None:
        """Copy the kept tensors that share storage with these, which are about to be written into."""
        for tensor in tensors:
            for kept in self._kept.pop(storage_of(tensor), ()):
                kept.tensor = kept.tensor.clone()

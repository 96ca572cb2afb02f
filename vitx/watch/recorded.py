"""What a recorded step consists of: calls, and the tensors that they pass on."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitx.watch.nested import mapped


@dataclass(eq=False, slots=True)  # slots: without a __dict__, it is a leaf of structures
class Value:
    """A tensor of a step, without its elements."""

    leaves: frozenset[str]  # the paths of the tensors of the batch that it depends on
    shape: torch.Size
    storage: int
    core: "Value | None" = None  # before reshapes and final functions, such as softmax; None: itself
    ends: tuple[str, ...] = ()  # these final functions
    of_model: bool = False  # whether a module computed it
    node: "Node | None" = None  # the call that returns it; None for a tensor of the batch or inside a module
    path: str | None = None  # in the output of the call or in the batch; None inside a module
    ended_by: str = ""  # the final softmax or sigmoid of the module

    @classmethod
    def of(cls, tensor: Tensor, leaves: frozenset[str] = frozenset(), **known: Any) -> "Value":
        """Return the value of a tensor that depends on these leaves."""
        return cls(leaves, tensor.shape, tensor.untyped_storage()._cdata, **known)


@dataclass(frozen=True, eq=False)
class Node:
    """A call in a step, with a `Value` for each tensor that a replay recomputes."""

    called: Any  # the name of a part of the module, another module, an operator, or a getter of a held tensor
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    writes: frozenset[int] = frozenset()  # the storages that it writes into

    @property
    def needs(self) -> set[Value]:
        """The values among its arguments."""
        found: set[Value] = set()
        mapped((self.args, self.kwargs), lambda leaf: found.add(leaf) if isinstance(leaf, Value) else None)
        return found

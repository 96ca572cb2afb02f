"""Origins of the tensors of a step, and the calls that compare an output with what is true."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitx.models.outputs import Kind
from vitx.watch.nested import mapped

# How a call compares an output, its first argument, with what is true, its second.
_LOSSES: dict[str, Kind] = {
    **dict.fromkeys(("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss_forward"), "class"),
    **dict.fromkeys(("nll_loss2d", "nll_loss2d_forward", "multi_margin_loss"), "class"),
    **dict.fromkeys(("binary_cross_entropy", "binary_cross_entropy_with_logits"), "classes"),
    **dict.fromkeys(("soft_margin_loss", "multilabel_soft_margin_loss"), "classes"),
    **dict.fromkeys(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"), "numbers"),
}
# Functions of an output that tell what the output is.
_ENDS = {
    **dict.fromkeys(("_softmax", "softmax", "_safe_softmax"), "softmax"),
    **dict.fromkeys(("_log_softmax", "log_softmax"), "log_softmax"),
    **dict.fromkeys(("log_sigmoid", "log_sigmoid_forward"), "log_sigmoid"),
    **dict.fromkeys(("argmax", "max", "topk", "sort", "argsort"), "argmax"),
    **dict.fromkeys(("gt", "ge", "lt", "le", "round", "sign"), "threshold"),
    **{name: name for name in ("sigmoid", "log", "exp")},
}
# The same values in another form, or those of them that are known.
_SAME = frozenset((
    *("view", "_unsafe_view", "view_as", "reshape", "_reshape_alias", "flatten", "ravel", "squeeze"),
    *("unsqueeze", "permute", "transpose", "t", "expand", "contiguous", "clone", "detach", "alias", "to"),
    *("_to_copy", "type_as", "broadcast_tensors", "clamp", "clamp_min", "clamp_max", "nan_to_num"),
    "masked_select",
))  # fmt: skip
_PARTS = ("select", "slice", "narrow", "split", "chunk")  # which are the same where they take all
FILLED = ("zeros", "ones", "full", "empty")
FACTORIES = (*FILLED, "arange")  # which take no tensor
NEW = tuple(f"new_{one}" for one in FILLED)
_NEW = (*NEW, *(f"{one}_like" for one in FILLED))  # which take nothing of a tensor but its shape
_OF_CLASS = ("softmax", "log_softmax", "log")
_OF_CLASSES = ("sigmoid", "log_sigmoid")


@dataclass(eq=False, slots=True)  # slots: a structure of tensors must take it for a leaf
class Value:
    """A tensor of a step, without its elements."""

    leaves: frozenset[str]  # the paths of the tensors of the batch that it depends on
    shape: torch.Size
    storage: int
    core: "Value | None" = None  # before a change of form or a last function, as a softmax; None: itself
    ends: tuple[str, ...] = ()  # these last functions
    of_model: bool = False  # whether a module made it
    node: "Node | None" = None  # the call that makes it; None for a tensor of the batch, or inside a module
    path: str | None = None  # in what the call puts out, or in the batch; None inside a module
    ended_by: str = ""  # the softmax or sigmoid that a module ended with

    @classmethod
    def of(cls, tensor: Tensor, leaves: frozenset[str], **known: Any) -> "Value":
        """Return the value of a tensor that depends on these leaves."""
        return cls(leaves, tensor.shape, tensor.untyped_storage()._cdata, **known)


@dataclass(frozen=True, eq=False)
class Node:
    """A call of a step."""

    called: Any  # the name of a module within the one that is explained, a module, or an operator
    args: Any  # with a `Value` for each tensor that is made anew
    kwargs: Any
    writes: frozenset[int] = frozenset()  # the storages that it writes into

    @property
    def needs(self) -> set[Value]:
        """The values that it takes."""
        found: set[Value] = set()
        mapped((self.args, self.kwargs), lambda leaf: found.add(leaf) if isinstance(leaf, Value) else None)
        return found

    @property
    def is_module(self) -> bool:
        """True if a module is called."""
        return isinstance(self.called, (str, nn.Module))


@dataclass(frozen=True)
class Comparison:
    """An output beside what is true of it."""

    name: str  # of the operator
    kind: Kind
    rank: int  # 0 for a loss of torch, 1 for one by hand, 2 for a metric
    output: Value  # without its last functions
    ends: tuple[str, ...]  # these
    truth: Value


def derived(name: str, args: Any, given: Sequence[Value], in_model: bool, out: Tensor) -> Value:
    """Return the value of what an operator put out, given the values among its arguments."""
    if not given:
        return Value.of(out, frozenset())
    first, of_model = given[0], in_model or any(one.of_model for one in given)
    same = name in _SAME or (name in _PARTS and out.numel() == first.shape.numel())
    if same or (name == "index" and is_masked(args)):
        core, ends = first.core or first, first.ends
        return Value.of(out, first.leaves, core=core, ends=ends, of_model=of_model)
    leaves = frozenset[str]() if name in _NEW else frozenset[str]().union(*(one.leaves for one in given))
    if name in _ENDS and of_model:
        ends = (*first.ends, _ENDS[name])
        return Value.of(out, leaves, core=first.core or first, ends=ends, of_model=True)
    return Value.of(out, leaves, of_model=of_model)


def compared(
    name: str, first: Value, second: Value, numbers: bool
) -> Iterator[tuple[Value, Value, Kind, int]]:
    """Yield what may be an output, what it may be compared with, and how, with the rank of that."""
    if name in _LOSSES:
        yield first, second, _LOSSES[name], 0
        return
    if name in ("gather", "take_along_dim", "index"):
        if first.of_model:
            yield first, second, "class", 1
        return
    for one, other in ((first, second), (second, first)):
        end = one.ends[-1] if one.ends else ""
        if name in ("eq", "ne") and end in ("argmax", "threshold"):
            yield one, other, "class" if end == "argmax" else "classes", 2
        elif name in ("mul", "sub", "rsub", "xlogy") and end in (*_OF_CLASS, *_OF_CLASSES):
            yield one, other, "class" if end in _OF_CLASS else "classes", 1
        elif name in ("sub", "rsub") and numbers and not end:
            yield one, other, "numbers", 1


def is_masked(args: Any) -> bool:
    """Return whether an index chooses by yes and no."""
    return len(args) > 1 and all(index is None or index.dtype == torch.bool for index in args[1])


def name_of(func: Any) -> str:
    """Return the name of an operator, the same for its form in place."""
    name: str = getattr(func, "overloadpacket", func).__name__
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name

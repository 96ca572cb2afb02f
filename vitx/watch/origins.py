"""Where a tensor of a step comes from, and which calls compare an output with what is true."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vitx.models.outputs import Kind

# How a call compares an output, its first argument, with what is true, its second.
_LOSSES: dict[str, Kind] = {
    **dict.fromkeys(("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss_forward"), "class"),
    **dict.fromkeys(("nll_loss2d", "nll_loss2d_forward", "multi_margin_loss"), "class"),
    **dict.fromkeys(("binary_cross_entropy", "binary_cross_entropy_with_logits"), "classes"),
    **dict.fromkeys(("soft_margin_loss", "multilabel_soft_margin_loss"), "classes"),
    **dict.fromkeys(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"), "numbers"),
}
# What is made of an output on its way there, by which it is known what the output is.
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
# Calls that take nothing but a shape; and those that take no tensor at all.
_NEW = frozenset((
    *("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"),
))  # fmt: skip
FACTORIES = frozenset(("zeros", "ones", "full", "empty", "arange"))
_OF_CLASS = ("softmax", "log_softmax", "log")
_OF_CLASSES = ("sigmoid", "log_sigmoid")


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from.

    Attributes:
        number: of the tensor.
        size: how many elements it has.
        leaves: the paths of the tensors of the batch that it depends on.
        core: the number of what it is, but for its form and a last function such as a softmax.
        ends: these last functions.
        model: whether a module made it.
    """

    number: int
    size: int
    leaves: frozenset[str]
    core: int
    ends: tuple[str, ...] = ()
    model: bool = False


@dataclass(frozen=True)
class Comparison:
    """An output beside what is true of it.

    Attributes:
        name: of the operator.
        kind: what the output is.
        rank: 0 for a loss of torch, 1 for one by hand, 2 for a metric.
        output: the number of the output.
        ends: which functions the output went through before it was compared.
        truth: the number of what it was compared with.
    """

    name: str
    kind: Kind
    rank: int
    output: int
    ends: tuple[str, ...]
    truth: int


def made(
    name: str, args: Any, given: Sequence[Origin], of_model: bool, size: int
) -> tuple[frozenset[str], int | None, tuple[str, ...], bool]:
    """Returns the leaves, the core and the ends of what a call made, and whether it is a model's.

    Args:
        name: of the operator.
        args: its arguments.
        given: where the tensors among them come from.
        of_model: whether it is a model's if nothing that it takes is.
        size: how many elements it has.
    """
    if not given:
        return frozenset(), None, (), False
    first, model = given[0], of_model or any(one.model for one in given)
    if name in _SAME or (name in _PARTS and size == first.size) or (name == "index" and is_masked(args)):
        return first.leaves, first.core, first.ends, model
    leaves = frozenset[str]() if name in _NEW else frozenset[str]().union(*(one.leaves for one in given))
    if name in _ENDS and model:
        return leaves, first.core, (*first.ends, _ENDS[name]), model
    return leaves, None, (), model


def compared(
    name: str, first: Origin, second: Origin, numbers: bool
) -> Iterator[tuple[Origin, Origin, Kind, int]]:
    """Yields what may be an output, what it may be compared with, and how, with the rank of that."""
    if name in _LOSSES:
        yield first, second, _LOSSES[name], 0
        return
    if name in ("gather", "take_along_dim", "index"):
        if first.model:
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
    """Returns whether an index chooses by yes and no."""
    return len(args) > 1 and all(index is None or index.dtype == torch.bool for index in args[1])


def name_of(func: Any) -> str:
    """Returns the name of an operator, the same for its form in place."""
    name: str = getattr(func, "overloadpacket", func).__name__
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name

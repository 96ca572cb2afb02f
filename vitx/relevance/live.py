"""What is known of a tensor that depends on the image, and what a call makes of it."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vitx.relevance import names
from vitx.relevance.lineage import Lineage, derived, joined
from vitx.relevance.names import tensors


class Live(NamedTuple):
    """What is known of a tensor that depends on the image.

    Attributes:
        real: the tensor.
        shape: its shape.
        thin: what stands beside it, with size 1 in dimensions over which only the sum counts.
        lineage: where it stands in the pass.
        inside: of one that was padded with a constant, what of it is real: 1, or 0 for the padding.
        source: the shadow that the last weights put out, and the dimension of its channels, if nothing but
            shape operations came after.
        sums_to_1: the dimension of a softmax, if nothing came after that changes a value.
    """

    real: "weakref.ref[Tensor]"
    shape: torch.Size
    thin: Tensor
    lineage: Lineage
    inside: Tensor | None = None
    source: tuple[Tensor, int] | None = None
    sums_to_1: int | None = None

    @property
    def shadow(self) -> Tensor:
        """What stands beside the tensor, in its shape."""
        if self.thin.shape == self.shape:
            return self.thin
        with torch.enable_grad():
            return self.thin.expand(self.shape)


class Watched(Protocol):
    """What a rule may ask of the pass that is watched.

    Attributes:
        accounts: whether it is kept what constants the pass adds.
    """

    accounts: bool

    def get(self, tensor: Any) -> Live | None:
        """Returns what is known of a tensor; None if it does not depend on the image."""

    def found_in(self, *values: Any) -> list[Live]:
        """Returns the live tensors in arguments, in their order."""

    def of_model(self, shape: Sequence[int]) -> Tensor:
        """Returns the shadow of what the model brings itself."""

    def added(self, constant: Tensor | None) -> Tensor | None:
        """Returns a constant that the pass adds, as a leaf of the graph where that is kept."""


def lineage_of(func: Callable[..., Any], args: Any, live: Sequence[Live]) -> Lineage:
    """Where the output of a call stands in the pass."""
    first = live[0].lineage
    keeps = func in names.KEEP_IDENTITY and all(one.lineage.identity == first.identity for one in live)
    of = [one.lineage for one in live]
    lineage = first if keeps else joined(of) if func in names.JOINED else derived(of)
    if func in names.WEIGHING and lineage.kind == "scores":
        lineage = lineage._replace(kind="weights")
    elif func in names.SOFTMAX and lineage.kind is None:
        lineage = lineage._replace(kind="gate")
    elif func in names.MULTIPLIED and lineage.kind == "gate":
        lineage = lineage._replace(kind=None)
    if func in names.JOINED and any(one.lineage.open for one in live):
        apart = len(live) < len([t for t in tensors(args) if t.is_floating_point()])
        if apart or not all(one.lineage.open for one in live):
            lineage = lineage._replace(partial=True)
    return lineage


def softmax_dim(
    func: Callable[..., Any], args: Any, kwargs: dict[str, Any], out: Tensor, given: Live
) -> int | None:
    """The dimension of a softmax, as long as nothing changes a value, not even by rounding."""
    if out.dtype not in (torch.float32, torch.float64):
        return None
    if func in names.SOFTMAX:
        dim = names.argument(args, kwargs, 1, "dim")
        return dim % out.ndim if isinstance(dim, int) else None
    real, off = given.real(), func is F.dropout and not names.argument(args, kwargs, 2, "training", True)
    same = (off or func in names.SAME) and real is not None and real.dtype == out.dtype
    return given.sums_to_1 if same else None


def holds(tensor: Tensor, func: Callable[..., Any]) -> bool:
    """Whether a tensor holds what the image is made into, and not a mask, an index or an answer."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized:
        return True
    return func in names.CASTS and tensor.dtype != torch.bool

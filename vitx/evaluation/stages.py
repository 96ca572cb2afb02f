"""The stages of a Vision Transformer: the parameters of its patch embedding, blocks and head."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vitx.errors import VitxError
from vitx.models.isolation import untouched
from vitx.models.prediction import predict
from vitx.tracing import Trace, capture


def find_stages(model: nn.Module, images: Tensor) -> dict[str, list[Tensor]]:
    """Find the stages of a model in one pass of the first image, in the order in which they run.

    They are "patch embedding", "block 1" to "block N", and "head", each with its parameters and the running
    statistics of its BatchNorms. A block is the largest module that runs one layer of self-attention. The
    patch embedding runs before the first block, with positions and class token; the head after the last one;
    parts between two blocks belong to the earlier one. Each parameter belongs to the first stage that uses
    it, or to the patch embedding if it is unused (a mask token). Stages without parameters are left out.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
    learned = [*model.parameters(), *statistics]  # no other buffers, such as tables and counters
    tensors = [tensor for tensor in learned if tensor.is_floating_point() and tensor.numel()]
    if not tensors:
        raise VitxError("the model has no parameters: nothing in it was learned")
    with untouched(model), torch.no_grad(), capture(model) as trace:
        clock = _Clock(tensors)
        with _blocks(model, trace, clock) as found, clock:
            predict(model, images[:1].clone())
    if len(found) < len(trace.self_attentions):
        raise VitxError("each attention must run in a module of its own, as these are randomized one by one")
    blocks = [*found.values()]
    starts = [start for start, _ in blocks] + [blocks[-1][1]]
    members: list[list[Tensor]] = [[] for _ in range(len(blocks) + 2)]
    for tensor in tensors:
        members[bisect_right(starts, clock.first_used.get(id(tensor), -1))].append(tensor)
    names = ["patch embedding", *(f"block {number + 1}" for number in range(len(blocks))), "head"]
    return {name: own for name, own in zip(names, members, strict=True) if own}


class _Clock(TorchFunctionMode):
    """A mode that counts the first uses of some tensors, and records the count at each of them."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.first_used: dict[int, int] = {}
        self._watched = {id(tensor) for tensor in tensors}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(one, Tensor) for one in tree_leaves(out)):  # reading a shape is not a use
            for used in map(id, tree_leaves((args, kwargs))):
                if used in self._watched and used not in self.first_used:
                    self.first_used[used] = self.now
                    self.now += 1
        return out


@contextmanager
def _blocks(model: nn.Module, trace: Trace, clock: _Clock) -> Iterator[dict[int, tuple[int, int]]]:
    """Yield a dict from each layer of attention to the start and end of its block, filled during the pass."""
    blocks: dict[int, tuple[int, int]] = {}
    running: list[tuple[int, int]] = []

    def begin(*_: Any) -> None:
        running.append((clock.now, len(trace.self_attentions)))

    def end(*_: Any) -> None:
        start, layer = running.pop()
        if len(trace.self_attentions) == layer + 1:  # enclosing modules end later, and replace this
            blocks[layer] = start, clock.now

    with ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_pre_hook(begin))
            hooks.enter_context(module.register_forward_hook(end))
        yield blocks

"""A recorded step: which parts of a batch it uses, and a replay of its calls on other images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vitx.models.outputs import Kind
from vitx.watch.nested import last, mapped, tensors_of
from vitx.watch.recorded import Node, Value
from vitx.watch.step import COUNTED, FILLED, Comparison, StepRecorder, name_of

AVERAGED = (AveragedModel, ModelEmaV2, ModelEmaV3)
_SHAPED = ("expand", *FILLED)  # operators that make rows; their list arguments are shapes
_VIEWS = ("view", "_unsafe_view", "reshape")  # those that keep all entries


class Replay:
    """The calls that compute a value, or all outputs of its call, from the tensors of another batch."""

    def __init__(self, nodes: Sequence[Node], value: Value, whole: bool = False) -> None:
        self.nodes, self.value, self._whole = list[Node](), value, whole
        needed, count = {value}, 0 if value.node is None else nodes.index(value.node) + 1
        for node in reversed(nodes[:count]):  # including writes into the storage of needed values
            if node.writes & {one.storage for one in needed} or any(one.node is node for one in needed):
                self.nodes.insert(0, node)
                needed |= node.needs
        self.needed = needed
        self.leaves = sorted({one.path or "" for one in needed if one.node is None})  # paths in the batch

    def __call__(self, leaves: Mapping[str, Tensor], model: nn.Module, was: int) -> Any:
        """Compute the value for other images with parts of a model; `was` is the recorded batch size."""
        writes, size = any(node.writes for node in self.nodes), len(next(iter(leaves.values())))
        made: dict[Any, Any] = {(None, p): leaf.clone() if writes else leaf for p, leaf in leaves.items()}
        out = None

        def given(leaf: Any) -> Any:
            return made[leaf.node, leaf.path] if isinstance(leaf, Value) else leaf

        for node in self.nodes:
            called = node.called
            if isinstance(called, attrgetter):
                made[node, ""] = called(model).clone() if writes else called(model)
                continue
            if isinstance(called, str):
                called = model.get_submodule(called)
            args = mapped(node.args, given)
            if not isinstance(called, nn.Module) and size != was:
                args = _resized(node, args, was, size)
            out = called(*args, **mapped(node.kwargs, given))
            made |= {(node, path): tensor for path, tensor in tensors_of(out)}
        return out if self._whole else given(self.value)


def _resized(node: Node, args: Sequence[Any], was: int, size: int) -> Sequence[Any]:
    """Return the arguments of an operator for another number of images than was recorded."""
    name, first = name_of(node.called).removeprefix("new_"), node.args[0] if node.args else None
    then = first.shape if isinstance(first, Value) else torch.Size()

    def scaled(rows: Any) -> Any:
        counts = isinstance(rows, int) and 0 < rows <= then.numel() and rows % was == 0
        return rows // was * size if counts else rows

    if name in _SHAPED and was > 1:  # a 1 is ambiguous
        own = [isinstance(arg, (list, tuple)) and [*arg[:1]] == [was] for arg in args]
        return [[size, *arg[1:]] if known else arg for arg, known in zip(args, own, strict=True)]
    if name in COUNTED:
        return [size if arg == was else arg for arg in args]
    if name in _VIEWS and args[0].numel() != then.numel():
        return [args[0], [*map(scaled, args[1][:1]), *args[1][1:]], *args[2:]]
    dim, at = {"slice": (1, 2), "split": (2, 1)}.get(name, (0, 0))
    if at and args[0].shape[:1] != then[:1] and not any(args[dim : dim + 1]):  # of the rows
        return [*args[:at], *map(scaled, args[at : at + 2]), *args[at + 2 :]]
    return args


@dataclass(frozen=True)
class ObservedStep:
    """A recorded step."""

    where: str
    module: nn.Module  # that ran it
    images: tuple[str, ...]  # the paths of those that the output depends on, in batch order
    size: int  # how many images there were
    output: Replay
    kind: Kind | None = None  # None if no comparison was recorded
    truth: Replay | None = None  # what the output is compared with; None if unknown
    logits: Callable[[Tensor], Tensor] | None = None  # from an output of probabilities
    note: str = ""  # which of several comparisons this is

    def run(self, model: nn.Module, leaves: Mapping[str, Tensor]) -> Any:
        """Return the logits of a model, (B, ...), computed as in the recorded step."""
        found = self.output(leaves, model, self.size)
        return found if self.logits is None else self.logits(found)

    def lacks(self, model: nn.Module, paths: set[str]) -> list[str]:
        """Return what the replay needs besides the parts of a model and the tensors at these paths.

        The averaged weights that a model holds are not its own.
        """
        averaged = {part for one in model.modules() if isinstance(one, AVERAGED) for part in one.modules()}
        names = {name for name, part in model.named_modules() if part not in averaged}
        called = {node.called for node in self.output.nodes if isinstance(node.called, str)}
        return sorted({*self.output.leaves} - paths) + sorted(called - names)

    def labels(self, leaves: Mapping[str, Tensor]) -> Tensor | None:
        """Return the labels, (B, ...); None if they are unknown or not one for each image."""
        if self.truth is None or not all(path in leaves for path in self.truth.leaves):
            return None
        found: Tensor = self.truth(leaves, self.module, self.size)
        found = found.long() if found.dtype == torch.bool else found
        return found if found.ndim and len(found) == len(next(iter(leaves.values()))) else None


def observed(recorder: StepRecorder, where: str) -> ObservedStep | None:
    """Return the step that a recorder followed; None if it failed, or no model ran on images."""
    usable = _usable(recorder)
    best = min(usable, key=partial(_place, recorder), default=None)
    if recorder.error or not (best or recorder.outputs):
        return None
    put_out = [best.output] if best else recorder.outputs[0]
    output = Replay(recorder.nodes, put_out[0], whole=len(put_out) > 1)
    images = tuple(p for p in recorder.leaves if p in recorder.images and p in output.leaves)
    draws = any(
        torch.Tag.nondeterministic_seeded in getattr(node.called, "tags", ()) for node in output.nodes
    )
    if not images or (draws and recorder.module.training):  # augmented, as by a mixup
        return None
    known = where, recorder.module, images, len(recorder.leaves[images[0]]), output
    if best is None:
        return ObservedStep(*known)
    truth = None if best.truth.path is None else Replay(recorder.nodes, best.truth)
    count = len({(one.output, one.truth.leaves) for one in usable if one.rank <= best.rank})
    chosen = "the first" if _place(recorder, best)[0] else "forward's"
    note = f"of {count} comparisons in {where}, {chosen} counts: give forward_fn or labels for another"
    return ObservedStep(*known, _kind(best), truth, _logits(best), note if count > 1 else "")


def _usable(recorder: StepRecorder) -> list[Comparison]:
    """Return the comparisons that can be replayed, but for those with what another output is made of."""
    made_of = [one.output.leaves for one in recorder.comparisons]
    final = (one for one in recorder.comparisons if not any(one.truth.leaves <= held for held in made_of))
    return [one for one in final if one.output.path is not None]


def _place(recorder: StepRecorder, one: Comparison) -> tuple[bool, int, bool]:
    """Return the place of a comparison in the order of preference: first that of what forward puts out."""
    put_out = [values for values in recorder.outputs if values[0].node and values[0].node.called == ""]
    main = [min(values, key=lambda value: last(value.path or "") != "logits") for values in put_out]
    needed = Replay(recorder.nodes, one.output).needed
    own = {(value.node, value.path) for value in main} & {(value.node, value.path) for value in needed}
    return not own, one.rank, one.kind == "numbers"


def _kind(best: Comparison) -> Kind:
    shape = best.output.shape
    if len(shape) not in (1, 2):
        return "features"
    if best.kind == "numbers":
        ended: dict[str, Kind] = {"sigmoid": "shares", "softmax": "class"}
        return ended.get((best.output.ended_by, *best.ends)[-1], "numbers")
    single = len(shape) == 1 or shape[1] == 1
    return "class" if single and best.kind == "classes" else best.kind


def _logits(best: Comparison) -> Callable[[Tensor], Tensor] | None:
    """Return a function from an output that a loss takes as probabilities to logits, or None."""
    if best.output.ended_by:
        return None  # explanations start before a model's final softmax or sigmoid
    if best.name == "binary_cross_entropy" and not best.ends:
        return partial(torch.logit, eps=1e-6)
    return torch.log if best.ends[:1] == ("log",) else None

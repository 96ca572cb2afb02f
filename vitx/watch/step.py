"""A recorder of the user's own step: what the model is given, and what its output is compared with.

A dispatch mode follows the tensors of one batch. It computes nothing, and keeps or changes no elements.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from vitx.models.outputs import Kind
from vitx.watch.nested import mapped, tensors_of
from vitx.watch.recorded import Node, Value

# The kind of output that each loss compares, as its first argument, with the ground truth, its second.
_LOSSES: dict[str, Kind] = {
    **dict.fromkeys(("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss_forward"), "class"),
    **dict.fromkeys(("nll_loss2d", "nll_loss2d_forward", "multi_margin_loss"), "class"),
    **dict.fromkeys(("binary_cross_entropy", "binary_cross_entropy_with_logits"), "classes"),
    **dict.fromkeys(("soft_margin_loss", "multilabel_soft_margin_loss"), "classes"),
    **dict.fromkeys(("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"), "numbers"),
}
# Functions of an output that reveal its kind.
_ENDS = {
    **dict.fromkeys(("_softmax", "softmax", "_safe_softmax"), "softmax"),
    **dict.fromkeys(("_log_softmax", "log_softmax"), "log_softmax"),
    **dict.fromkeys(("log_sigmoid", "log_sigmoid_forward"), "log_sigmoid"),
    **dict.fromkeys(("argmax", "max", "topk", "sort", "argsort"), "argmax"),
    **dict.fromkeys(("gt", "ge", "lt", "le", "round", "sign"), "threshold"),
    **{name: name for name in ("sigmoid", "log", "exp")},
}
# The kind of an output by the first of these functions: in a loss written by hand, and in a metric.
_BY_HAND: dict[str, Kind] = {
    **dict.fromkeys(("softmax", "log_softmax", "log"), "class"),
    **dict.fromkeys(("sigmoid", "log_sigmoid"), "classes"),
}
_METRICS: dict[str, Kind] = {"argmax": "class", "threshold": "classes"}
# Operators that return the same values in another form, or those of them that are known.
_SAME = {
    *("view", "_unsafe_view", "view_as", "reshape", "_reshape_alias", "flatten", "ravel", "squeeze"),
    *("unsqueeze", "permute", "transpose", "t", "expand", "contiguous", "clone", "detach", "alias", "to"),
    *("_to_copy", "type_as", "broadcast_tensors", "clamp", "clamp_min", "clamp_max", "nan_to_num"),
    "masked_select",
}
_TINY = 1e-3  # a summand that keeps a logarithm finite
_PARTS = ("select", "slice", "narrow", "split", "chunk", "unbind")  # the same values if they take all
# Operators that take no tensor, or, like new_zeros, only its dtype; the others take a number of entries.
FILLED = ("zeros", "ones", "full", "empty", "rand", "randn", "randint")
COUNTED = ("arange", "randperm")


@dataclass(frozen=True)
class Comparison:
    """A comparison of an output with the ground truth."""

    name: str  # of the operator
    kind: Kind
    rank: int  # 0 for a loss of torch, 1 for one written by hand, 2 for a metric
    output: Value  # without its final functions
    ends: tuple[str, ...]  # these functions
    truth: Value


class StepRecorder(TorchDispatchMode):
    """A recorder that follows the tensors of a batch through a step of a module."""

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module, batch: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.leaves = dict(tensors_of(batch))  # by path
        self.images = {path for path, leaf in self.leaves.items() if leaf.ndim >= 3}  # possible images
        self.comparisons: list[Comparison] = []  # of outputs with the ground truth, in order
        self.outputs: list[list[Value]] = []  # of each call of a module that depends on images
        self.nodes: list[Node] = []  # of modules, and of operators outside of them, in order
        self.error: Exception | None = None  # why the recording failed
        self.module = module
        self._names = {part: name for name, part in module.named_modules()}
        self._values = WeakTensorKeyDictionary()
        self._calls: list[tuple[bool, Any]] = []  # of running modules: whether they count, and arguments
        self._depth = 0
        self._try(self._hold)
        for path, leaf in self.leaves.items():
            self._values[leaf] = Value.of(leaf, frozenset((path,)), path=path)

    def _hold(self) -> None:
        """Record the tensors that the module and its parts hold, to be read anew by a replay."""
        for name, part in self.module.named_modules():
            for own, held in (vars(part) | part._parameters | part._buffers).items():
                if isinstance(held, Tensor) and held.layout == torch.strided:
                    self.nodes.append(Node(attrgetter(f"{name}.{own}" if name else own)))
                    self._values[held] = Value.of(held, node=self.nodes[-1], path="")

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls in the block."""
        after = register_module_forward_hook(self._leave, with_kwargs=True, always_call=True)
        try:
            with register_module_forward_pre_hook(self._enter), after, self:
                yield
        finally:
            # torch leaves this entry behind, and would treat all modules as hooked from then on.
            torch.nn.modules.module._global_forward_hooks_with_kwargs.pop(after.id, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [] if self.error else self._known((args, kwargs))
        outside = self._depth == 0 and (given or name_of(func) in (*FILLED, *COUNTED))
        if given:
            self._try(self._compare, name_of(func), args)
        taken = self._try(self._taken, args, kwargs) if outside else None
        out = func(*args, **kwargs)
        if given or outside:
            self._try(self._add, func, args, taken, given, out)
        return out

    def _try(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a part of the recording; if it fails, the step goes on without the recording."""
        try:
            return None if self.error else function(*args)
        except Exception as error:
            self.error = error
            return None

    def _known(self, structure: Any) -> list[Value]:
        """Return the values of tensors; inside a module, of those that depend on the batch."""
        known = [self._values[one] for _, one in tensors_of(structure) if one in self._values]
        return [one for one in known if one.leaves or not self._depth]

    def _taken(self, args: Any, kwargs: Any) -> Any:
        """Return arguments with a `Value` for each tensor that a replay recomputes."""

        def taken(leaf: Any) -> Any:
            value = self._values.get(leaf) if isinstance(leaf, Tensor) else None
            if value is not None and value.path is None:
                raise LookupError("a tensor of the inside of a module is used outside of it")
            return leaf if value is None else value

        return mapped((args, dict(kwargs)), taken)

    def _add(self, func: Any, args: Any, taken: Any, given: Sequence[Value], out: Any) -> None:
        node = None if taken is None else Node(func, taken[0], taken[1], _written(func, args))
        self.nodes += [] if node is None else [node]
        for place, (path, tensor) in enumerate(tensors_of(out)):
            # Each output of broadcast_tensors is one of its arguments.
            own = given[place : place + 1] if name_of(func) == "broadcast_tensors" else given
            inside = self._depth > 0 and any(one.leaves & self.images for one in own)
            value = _derived(name_of(func), args, own, inside, tensor)
            value.node, value.path = node, None if node is None else path
            self._values[tensor] = value

    def _enter(self, module: nn.Module, args: Any) -> None:
        counts = not self._is_step(module, args)
        taken = self._try(self._taken, args, {}) if counts and not self._depth else None
        self._calls.append((counts, taken))
        self._depth += counts

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        counts, taken = self._calls.pop()
        self._depth -= counts
        if taken is not None:
            self._try(self._put_out, module, taken[0], args, kwargs, output)

    def _is_step(self, module: nn.Module, args: Any) -> bool:
        """Return whether a call is the step itself, which a distributed wrapper routes through forward."""
        if module is self.module:
            return not self._depth and any(type(arg) is int for arg in args[1:])
        return module not in self._names and any(part is self.module for part in module.modules())

    def _put_out(self, module: nn.Module, taken: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Record the output of a module that the step called."""
        given = frozenset[str]().union(*(value.leaves for value in self._known((args, kwargs))))
        node = Node(self._names.get(module, module), taken, self._taken((), kwargs)[1])
        self.nodes.append(node)
        of_images: list[Value] = []
        for path, tensor in tensors_of(output):
            value = Value.of(tensor, given, of_model=True, node=node, path=path)
            if (inside := self._values.get(tensor)) is not None:
                value.leaves = inside.leaves
                if inside.path is None:
                    inside.node, inside.path = node, path
                if inside.ends[-1:] in (("softmax",), ("sigmoid",)):
                    value.ended_by = inside.ends[-1]
            self._values[tensor] = value
            if tensor.is_floating_point() and value.leaves & self.images:
                of_images.append(value)
        if of_images:
            self.outputs.append(of_images)

    def _compare(self, name: str, args: Any) -> None:
        """Record a call that compares an output with the ground truth."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if name == "index" and not is_masked(args):
            tensors += [index for index in args[1] if index is not None]
        sides = [(self._values[tensor], tensor) for tensor in tensors if tensor in self._values]
        for (first, values), (second, truth) in ((sides[0], other) for other in sides[1:]):
            numbers = values.is_floating_point() and truth.is_floating_point()
            for one, other, kind, rank in _compared(name, first, second, numbers):
                of_images = one.leaves & self.images and not other.leaves & (self.images | one.leaves)
                if of_images and other.leaves and not other.of_model:
                    kind = "class" if kind != "class" and self._of_one_class(other, truth) else kind
                    found = Comparison(name, kind, rank, one.core or one, one.ends, other.core or other)
                    self.comparisons.append(found)

    def _of_one_class(self, truth: Value, values: Tensor) -> bool:
        """Return whether the truth is the one-hot encoding, perhaps smoothed, of classes in the batch."""
        leaves = [self.leaves[path] for path in truth.leaves]
        if len(leaves) != 1 or values.ndim != 2 or values.shape[1] == 1:
            return False
        classes, large = values.argmax(1), values.float() > values.float().mean()
        one_hot = torch.nn.functional.one_hot(classes, values.shape[1]) > 0
        return torch.equal(one_hot, large) and torch.equal(classes, leaves[0])


def _written(func: Any, args: Any) -> frozenset[int]:
    """Return the storages that an operator writes into."""
    arguments = func._schema.arguments if hasattr(func, "_schema") else ()
    written = [arg for arg, one in zip(args, arguments, strict=False) if one.is_write]
    return frozenset(tensor.untyped_storage()._cdata for _, tensor in tensors_of(written))


def _derived(name: str, args: Any, given: Sequence[Value], in_model: bool, out: Tensor) -> Value:
    """Return the value of an operator's output, given the values among its arguments."""
    if not given:
        return Value.of(out)
    first, of_model = given[0], in_model or any(one.of_model for one in given)
    whole = name in _PARTS and out.numel() == first.shape.numel()
    tiny = name in ("add", "sub") and any(type(one) is float and abs(one) < _TINY for one in args[1:])
    same = name in _SAME or whole or tiny or (name == "index" and is_masked(args))
    is_new = name.startswith("new_") or name.endswith("_like")  # takes only the shape or dtype of a tensor
    leaves = first.leaves if same else frozenset[str]().union(*(one.leaves for one in given if not is_new))
    if not same and (name not in _ENDS or not of_model):
        return Value.of(out, leaves, of_model=of_model)
    ends = first.ends if same else (*first.ends, _ENDS[name])
    return Value.of(out, leaves, core=first.core or first, ends=ends, of_model=of_model)


def _compared(
    name: str, first: Value, second: Value, numbers: bool
) -> Iterator[tuple[Value, Value, Kind, int]]:
    """Yield a possible output, its possible ground truth, the kind of output, and the comparison's rank."""
    if name in _LOSSES:
        yield first, second, _LOSSES[name], 0
    elif name in ("gather", "take_along_dim", "index"):
        if first.of_model:
            yield first, second, "class", 1
    else:
        for one, other in ((first, second), (second, first)):
            end = one.ends[-1] if one.ends else ""
            if name in ("eq", "ne") and end in _METRICS:
                yield one, other, _METRICS[end], 2
            elif name in ("mul", "sub", "rsub", "xlogy") and end in _BY_HAND:
                ends = ((one.core or one).ended_by, *one.ends)
                kind = next(_BY_HAND[each] for each in ends if each in _BY_HAND)
                yield one, other, kind, 2 if ends == ("", "log") else 1  # maybe the logarithm of 1 - p
            elif name in ("sub", "rsub") and numbers and not end:
                yield one, other, "numbers", 1


def is_masked(args: Any) -> bool:
    """Return whether an index consists of boolean masks."""
    return len(args) > 1 and all(index is None or index.dtype == torch.bool for index in args[1])


def name_of(func: Any) -> str:
    """Return the name of an operator, the same for its in-place variant."""
    name: str = getattr(func, "overloadpacket", func).__name__
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name

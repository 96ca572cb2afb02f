"""Records in the user's own step what a model is given, and what its output is compared with.

A dispatch mode follows one batch. It computes nothing, keeps no elements, and changes none.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from vitx.watch.nested import mapped, tensors_of
from vitx.watch.provenance import FACTORIES, Comparison, Node, Value, compared, derived, is_masked, name_of


class StepRecorder(TorchDispatchMode):
    """Follow the tensors of a batch through a step of a module."""

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module, batch: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.leaves = dict(tensors_of(batch))  # by their paths
        self.images = {path for path, leaf in self.leaves.items() if leaf.ndim >= 3}  # or may be
        self.comparisons: list[Comparison] = []  # of outputs with what is true, in their order
        self.outputs: list[list[Value]] = []  # of each call of a module that depends on images
        self.nodes: list[Node] = []  # the calls outside of modules, in their order
        self.error: Exception | None = None  # why nothing was recorded
        self._module = module
        self._names = {part: name for name, part in module.named_modules()}
        self._values = WeakTensorKeyDictionary()
        self._calls: list[tuple[bool, Any]] = []  # of modules that run now: whether they count, and arguments
        self._depth = 0
        for path, leaf in self.leaves.items():
            self._values[leaf] = Value.of(leaf, frozenset((path,)), path=path)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what its block runs."""
        before = register_module_forward_pre_hook(self._enter)
        after = register_module_forward_hook(self._leave, with_kwargs=True, always_call=True)
        try:
            with self:
                yield
        finally:
            before.remove()
            after.remove()
            # Which torch leaves there, so that it would take all modules for hooked ever after.
            torch.nn.modules.module._global_forward_hooks_with_kwargs.pop(after.id, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [] if self.error else self._known((args, kwargs))
        outside = self._depth == 0 and (given or name_of(func) in FACTORIES)
        if given:
            self._try(self._compare, name_of(func), args)
        taken = self._try(self._taken, args, kwargs) if outside else None
        out = func(*args, **kwargs)
        if given or outside:
            self._try(self._add, func, args, taken, given, out)
        return out

    def _try(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a part of the recording; if it fails, the step goes on without it."""
        try:
            return None if self.error else function(*args)
        except Exception as error:
            self.error = error
            return None

    def _known(self, structure: Any) -> list[Value]:
        found = (self._values.get(tensor) for _, tensor in tensors_of(structure))
        return [value for value in found if value is not None]

    def _taken(self, args: Any, kwargs: Any) -> Any:
        """Return arguments with values for the tensors that are made anew in a replay."""

        def taken(leaf: Any) -> Any:
            value = self._values.get(leaf) if isinstance(leaf, Tensor) else None
            if value is not None and value.path is None:
                raise LookupError("a tensor of the inside of a module is used outside of it")
            return leaf if value is None else value

        return mapped((args, dict(kwargs)), taken)

    def _add(self, func: Any, args: Any, taken: Any, given: Sequence[Value], out: Any) -> None:
        node = None if taken is None else Node(func, taken[0], taken[1], _written(func, args))
        if node is not None:
            self.nodes.append(node)
        for place, (path, tensor) in enumerate(tensors_of(out)):
            # Of tensors that are brought to one shape, each stays its own.
            own = given[place : place + 1] if name_of(func) == "broadcast_tensors" else given
            inside = self._depth > 0 and any(one.leaves & self.images for one in own)
            value = derived(name_of(func), args, own, inside, tensor)
            if node is not None:
                value.node, value.path = node, path
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
        """Return whether a call is the step itself, as a wrapper for several processes redirects it."""
        if module is self._module:
            return not self._depth and any(type(arg) is int for arg in args[1:])
        return module not in self._names and any(part is self._module for part in module.modules())

    def _put_out(self, module: nn.Module, taken: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Remember what a module put out that the step called."""
        given = frozenset[str]().union(*(value.leaves for value in self._known((args, kwargs))))
        node = Node(self._names.get(module, module), taken, self._taken((), kwargs)[1])
        self.nodes.append(node)
        of_images: list[Value] = []
        for path, tensor in tensors_of(output):
            inside = self._values.get(tensor)
            value = Value.of(tensor, given if inside is None else inside.leaves)
            value.of_model, value.node, value.path = True, node, path
            if inside is not None:
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
        """Remember a call that compares an output with what is true."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if name == "index" and not is_masked(args):
            tensors += [index for index in args[1] if index is not None]
        sides = [(self._values[tensor], tensor) for tensor in tensors if tensor in self._values]
        for (first, values), (second, truth) in ((sides[0], other) for other in sides[1:]):
            numbers = values.is_floating_point() and truth.is_floating_point()
            for one, other, kind, rank in compared(name, first, second, numbers):
                of_images = one.leaves & self.images and not other.leaves & (self.images | one.leaves)
                if of_images and other.leaves and not other.of_model:
                    found = Comparison(name, kind, rank, one.core or one, one.ends, other.core or other)
                    self.comparisons.append(self._of_one_class(found, other, truth))

    def _of_one_class(self, found: Comparison, truth: Value, values: Tensor) -> Comparison:
        """Return a comparison with 0 and 1 for each output as one of classes where all but one are 0."""
        leaves = [self.leaves[path] for path in truth.leaves]
        several = found.kind in ("classes", "numbers") and values.ndim == 2 and values.shape[1] > 1
        if not several or len(leaves) != 1:
            return found
        largest = values.argmax(1)
        one_hot = torch.nn.functional.one_hot(largest, values.shape[1]).to(values.dtype)
        classes = torch.equal(one_hot, values) and torch.equal(largest, leaves[0])
        return replace(found, kind="class") if classes else found


def _written(func: Any, args: Any) -> frozenset[int]:
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return frozenset()
    written = [arg for arg, one in zip(args, schema.arguments, strict=False) if one.is_write]
    return frozenset(tensor.untyped_storage()._cdata for _, tensor in tensors_of(written))


def is_compiled(module: nn.Module) -> bool:
    """Return whether a part of a module is compiled: a recording would change how it runs."""
    return any(
        hasattr(part, "_orig_mod")
        or getattr(part, "_compiled_call_impl", None) is not None
        or any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(part).values())
        for part in module.modules()
    )

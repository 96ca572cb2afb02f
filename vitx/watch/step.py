"""Sees in the user's own step what a model is given, and what its output is compared with.

A dispatch mode stands by while one batch runs. It computes nothing, keeps no values, and changes none.
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
from vitx.watch.origins import FACTORIES, Comparison, Origin, compared, is_masked, made, name_of
from vitx.watch.replay import CallOf, Node, Place, Replay


class StepWatch(TorchDispatchMode):
    """Follows the tensors of a batch through a step.

    Args:
        module: the one whose step it is.
        batch: of the step.

    Attributes:
        leaves: the tensors of the batch, by their paths.
        images: the paths of those that may be images.
        comparisons: of outputs with what is true, in their order.
        outputs: of each call of a module that depends on images, the places of what it put out.
        places: where a replay finds tensors, by their numbers; it finds none that are inside of a module.
        shapes: of these tensors, by their places.
        probable: the places of outputs that a module ended with a softmax or a sigmoid, and with which.
        failed: why the watch saw nothing, or None.
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module, batch: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module = module
        self.leaves = dict(tensors_of(batch))
        self.images = {path for path, leaf in self.leaves.items() if leaf.ndim >= 3}
        self.comparisons: list[Comparison] = []
        self.outputs: list[list[Place]] = []
        self.places: dict[int, Place] = {}
        self.shapes: dict[Place, torch.Size] = {}
        self.probable: dict[Place, str] = {}
        self.failed: Exception | None = None
        self._names = {part: name for name, part in module.named_modules()}
        self._known = WeakTensorKeyDictionary()
        self._nodes: list[Node] = []
        self._storages: dict[Place, int] = {}
        self._calls: list[tuple[bool, Any]] = []  # of modules that run now: whether they count, and arguments
        self._depth = 0
        self._count = 0
        for path, leaf in self.leaves.items():
            self._bind(leaf, frozenset((path,)), place=(None, path))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches what its block runs."""
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

    def replay(self, place: Place) -> Replay:
        """Returns what makes the tensor at a place anew, of other batches."""
        return Replay(self._nodes, self._storages, place)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [] if self.failed else self._origins((args, kwargs))
        outside = self._depth == 0 and (given or name_of(func) in FACTORIES)
        if given:
            self._trying(self._compare, name_of(func), args)
        taken = self._trying(self._taken, args, kwargs) if outside else None
        out = func(*args, **kwargs)
        if given or outside:
            self._trying(self._add, func, args, taken, given, out)
        return out

    def _trying(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a part of the watch; if it fails, the step goes on without it."""
        try:
            return None if self.failed else function(*args)
        except Exception as error:
            self.failed = error
            return None

    def _origins(self, value: Any) -> list[Origin]:
        found = (self._known.get(tensor) for _, tensor in tensors_of(value))
        return [origin for origin in found if origin is not None]

    def _bind(
        self,
        tensor: Tensor,
        leaves: frozenset[str],
        core: int | None = None,
        ends: tuple[str, ...] = (),
        model: bool = False,
        place: Place | None = None,
    ) -> None:
        number, self._count = self._count, self._count + 1
        size = tensor.numel()
        self._known[tensor] = Origin(number, size, leaves, number if core is None else core, ends, model)
        if place is not None:
            self.places[number] = place
            self.shapes[place] = tensor.shape
            self._storages[place] = tensor.untyped_storage()._cdata

    def _taken(self, args: Any, kwargs: Any) -> Any:
        """Returns arguments with places for the tensors that are made anew in a replay."""

        def placed(leaf: Any) -> Any:
            origin = self._known.get(leaf) if isinstance(leaf, Tensor) else None
            return leaf if origin is None else CallOf(self.places[origin.number])

        return mapped((args, dict(kwargs)), placed)

    def _add(self, func: Any, args: Any, taken: Any, given: Sequence[Origin], out: Any) -> None:
        """Remembers where what a call made comes from."""
        number = len(self._nodes)
        if taken is not None:
            self._nodes.append(Node(func, taken[0], taken[1], _written(func, args)))
        for place, (path, tensor) in enumerate(tensors_of(out)):
            # Of tensors that are brought to one shape, each stays its own.
            own = given[place : place + 1] if name_of(func) == "broadcast_tensors" else given
            inside = self._depth > 0 and any(one.leaves & self.images for one in own)
            origin = made(name_of(func), args, own, inside, tensor.numel())
            self._bind(tensor, *origin, None if taken is None else (number, path))

    def _enter(self, module: nn.Module, args: Any) -> None:
        counts = not self._is_step(module, args)
        taken = self._trying(self._taken, args, {}) if counts and not self._depth else None
        self._calls.append((counts, taken))
        self._depth += counts

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        counts, taken = self._calls.pop()
        self._depth -= counts
        if taken is not None:
            self._trying(self._put_out, module, taken[0], args, kwargs, output)

    def _is_step(self, module: nn.Module, args: Any) -> bool:
        """Returns whether a call is the step itself, as a wrapper for several processes redirects it."""
        if module is self.module:
            return not self._depth and any(type(arg) is int for arg in args[1:])
        return module not in self._names and any(part is self.module for part in module.modules())

    def _put_out(self, module: nn.Module, taken: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Remembers what a module put out that the step called."""
        given = frozenset[str]().union(*(origin.leaves for origin in self._origins((args, kwargs))))
        number = len(self._nodes)
        self._nodes.append(
            Node(self._names.get(module, module), taken, self._taken((), kwargs)[1], frozenset())
        )
        of_images: list[Place] = []
        for path, tensor in tensors_of(output):
            inside, place = self._known.get(tensor), (number, path)
            leaves = given if inside is None else inside.leaves
            if inside is not None:
                self.places.setdefault(inside.number, place)
                if inside.ends[-1:] in (("softmax",), ("sigmoid",)):
                    self.probable[place] = inside.ends[-1]
            self._bind(tensor, leaves, model=True, place=place)
            if tensor.is_floating_point() and leaves & self.images:
                of_images.append(place)
        if of_images:
            self.outputs.append(of_images)

    def _compare(self, name: str, args: Any) -> None:
        """Remembers a call that compares an output with what is true."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if name == "index" and not is_masked(args):
            tensors += [index for index in args[1] if index is not None]
        sides = [(self._known[tensor], tensor) for tensor in tensors if tensor in self._known]
        for (first, values), (second, truth) in ((sides[0], other) for other in sides[1:]):
            numbers = values.is_floating_point() and truth.is_floating_point()
            for one, other, kind, rank in compared(name, first, second, numbers):
                of_images = one.leaves & self.images and not other.leaves & (self.images | one.leaves)
                if of_images and other.leaves and not other.model:
                    found = Comparison(name, kind, rank, one.core, one.ends, other.core)
                    self.comparisons.append(self._of_one_class(found, other, truth))

    def _of_one_class(self, found: Comparison, truth: Origin, values: Tensor) -> Comparison:
        """Returns a comparison with 0 and 1 for each output as one of classes where all but one are 0."""
        leaves = [self.leaves[path] for path in truth.leaves]
        if (
            found.kind not in ("classes", "numbers")
            or values.ndim != 2
            or values.shape[1] < 2
            or len(leaves) != 1
        ):
            return found
        largest = values.argmax(1)
        one_hot = torch.nn.functional.one_hot(largest, values.shape[1]).to(values.dtype)
        classes = torch.equal(one_hot, values) and torch.equal(largest, leaves[0])
        return replace(found, kind="class") if classes else found


def _written(func: Any, args: Any) -> frozenset[int]:
    """Returns the storages that an operator writes into."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return frozenset()
    written = [arg for arg, one in zip(args, schema.arguments, strict=False) if one.is_write]
    return frozenset(tensor.untyped_storage()._cdata for _, tensor in tensors_of(written))


def is_compiled(module: nn.Module) -> bool:
    """Returns whether a part of a module is compiled: a watch would change how it runs."""
    return any(
        hasattr(part, "_orig_mod")
        or getattr(part, "_compiled_call_impl", None) is not None
        or any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(part).values())
        for part in module.modules()
    )

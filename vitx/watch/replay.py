"""Runs a part of a step that was watched anew, on other images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitx.watch.nested import mapped, tensors_of
from vitx.watch.origins import name_of

# Of a tensor: the number of a node and the path in what that put out, or None and the path in the batch.
Place = tuple[int | None, str]
WHOLE = "*"  # the path of all that a node put out
# Operators whose lists are shapes.
_SHAPED = frozenset((
    *("view", "_unsafe_view", "reshape", "expand", "zeros", "ones", "full", "empty"),
    *("new_zeros", "new_ones", "new_full", "new_empty"),
))  # fmt: skip


@dataclass(frozen=True, slots=True)  # and no attributes that a structure has
class CallOf:
    """Stands for a tensor among the arguments of a call."""

    place: Place


@dataclass(frozen=True)
class Node:
    """A call of a step.

    Attributes:
        called: the name of a module within the one that is explained, a module, or an operator.
        args: its arguments, with a `CallOf` for each tensor that is made anew.
        kwargs: those by name.
        writes: the storages that it writes into.
    """

    called: Any
    args: Any
    kwargs: Any
    writes: frozenset[int]

    def needs(self) -> set[Place]:
        """Returns the places of what it takes."""
        found: set[Place] = set()
        mapped((self.args, self.kwargs), lambda leaf: found.add(leaf.place) if _is_call(leaf) else None)
        return found

    @property
    def module(self) -> bool:
        """Returns whether a module is called."""
        return isinstance(self.called, (str, nn.Module))


class Replay:
    """The calls that make a tensor of a batch.

    Attributes:
        nodes: by their numbers, in their order.
        place: of what they make.
        leaves: the paths of the tensors of the batch that they take.
    """

    def __init__(self, nodes: Sequence[Node], storages: Mapping[Place, int], place: Place) -> None:
        """Keeps the calls that the tensor at a place needs.

        Args:
            nodes: all calls of the step.
            storages: of the tensors, by their places: what writes into that of one that is needed is, too.
            place: of the tensor.
        """
        found, needed = dict[int, Node](), {place}
        for number in range(-1 if place[0] is None else place[0], -1, -1):
            written = nodes[number].writes & {storages.get(one) for one in needed}
            if written or any(one[0] == number for one in needed):
                found[number] = nodes[number]
                needed |= nodes[number].needs()
        self.nodes, self.place = dict(reversed(found.items())), place
        self.leaves = sorted(path for number, path in needed if number is None)

    def fits(self, model: nn.Module) -> bool:
        """Returns whether a model has the modules that are called."""
        names = {name for name, _ in model.named_modules()}
        return all(node.called in names for node in self.nodes.values() if isinstance(node.called, str))

    def __call__(self, leaves: Mapping[str, Tensor], model: nn.Module, size: int, was: int) -> Any:
        """Makes the tensor.

        Args:
            leaves: the tensors of a batch, by their paths.
            model: the one whose parts are called.
            size: how many images there are.
            was: how many there were in the batch that was watched.
        """
        made: dict[Place, Any] = {(None, path): leaf for path, leaf in leaves.items()}
        if any(node.writes for node in self.nodes.values()):
            made = {place: leaf.clone() for place, leaf in made.items()}

        def given(leaf: Any) -> Any:
            return made[leaf.place] if _is_call(leaf) else leaf

        for number, node in self.nodes.items():
            args = node.args
            called: Callable[..., Any] = node.called
            if node.module:
                called = model.get_submodule(called) if isinstance(called, str) else called
            elif name_of(called) in _SHAPED:
                args = tuple(_resized(arg, size) if _begins_with(arg, was) else arg for arg in args)
            elif name_of(called) == "arange":
                args = tuple(size if arg == was else arg for arg in args)
            out = called(*mapped(args, given), **mapped(node.kwargs, given))
            made |= {(number, path): tensor for path, tensor in tensors_of(out)} | {(number, WHOLE): out}
        return made[self.place]


def _begins_with(arg: Any, size: int) -> bool:
    """Returns whether a shape may begin with the number of images; of one image, that cannot be told."""
    return isinstance(arg, (list, tuple)) and len(arg) > 0 and size > 1 and arg[0] == size


def _resized(shape: Sequence[int], size: int) -> list[int]:
    return [size, *shape[1:]]


def _is_call(leaf: Any) -> bool:
    return isinstance(leaf, CallOf)

"""Attribution methods with their requirements, and the registry of methods by name."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vitx.errors import VitxError
from vitx.functional.fusing import check_options

Find = Callable[..., Any]  # returns an Attribution
Methods = Mapping[str, Mapping[str, Any]]  # name -> options
# The gradient of the score, or of each layer's own score (see `vitx.models.lens`).
Gradient = Literal["score", "layer scores"]
DEFAULT = "rollout"  # works on any model, and costs one forward pass
NETWORKS = ("linearised", "plain")  # the networks to differentiate, see `vitx.tape.rules`


@dataclass(frozen=True)
class Method:
    """A function from a `Backward` and options to an `Attribution`, and its requirements."""

    find: Find
    title: str  # its name in pictures
    gradient: Gradient | None = None  # the gradient with respect to A that it reads
    fused_heads: bool = False  # whether it only reads A after its option `head_fusion` has fused the heads
    slow: bool = False  # whether it takes seconds per image, so that it only runs if it is named
    accounts: bool = False  # whether it needs the contributions of residuals and constants to the score

    @property
    def options(self) -> dict[str, Any]:
        """The options, which are the keyword-only arguments of the function, with their defaults."""
        parameters = inspect.signature(self.find).parameters.values()
        return {one.name: one.default for one in parameters if one.kind == one.KEYWORD_ONLY}

    def head_fusion(self, options: Mapping[str, Any]) -> str | None:
        """Return how the method fuses the heads; None if it needs each head of A."""
        if not self.fused_heads or options.get("without_sinks"):  # rescales the rows of each head
            return None
        fusion: str = {**self.options, **options}["head_fusion"]
        check_options(fusion)
        return fusion

    def network(self, options: Mapping[str, Any]) -> str | None:
        """Return the network that the method differentiates; None if it reads no gradient."""
        if not self.gradient:
            return None
        given = options.get("gradient", NETWORKS[0])
        network = "linearised" if given == "linearized" else given
        if network not in NETWORKS:
            raise VitxError(f"gradient must be one of {', '.join(NETWORKS)}, found {given!r}")
        return str(network)


_METHODS: dict[str, Method] = {}


def register(name: str, *, title: str | None = None, **needs: Any) -> Callable[[Find], Find]:
    """Return a decorator that registers a function as a method.

    `title` is its name in pictures, by default the same; `needs` are further fields of `Method`.
    """

    def add(find: Find) -> Find:
        method = Method(find, title or name, **needs)
        known = (None, *get_args(Gradient))
        if method.gradient not in known:
            raise VitxError(f"the gradient that {name} reads must be in {known}, found {method.gradient!r}")
        if method.fused_heads and (method.gradient or "head_fusion" not in method.options):
            raise VitxError(f"{name} cannot have fused_heads: it reads a gradient, or has no head_fusion")
        _METHODS[name] = method
        return find

    return add


def methods() -> list[str]:
    """Return the names of the methods.

    Example:
        >>> methods()
        ['rollout', 'grad_rollout', 'gae', 'evidence', 'attention', 'legrad', 'flow']
    """
    return list(_METHODS)


def title_of(name: str) -> str:
    """Return the name of a method in pictures; an unknown name is returned unchanged."""
    return _METHODS[name].title if name in _METHODS else name


def telling(names: Iterable[str]) -> str:
    """Return the first method that explains a class, and so can show a shortcut; otherwise the first one."""
    known = [*names]
    return next((name for name in known if name in _METHODS and _METHODS[name].gradient), known[0])


def find_method(name: str) -> Method:
    """Return the method of that name, or raise a VitxError that lists the names."""
    if not isinstance(name, str) or name not in _METHODS:
        raise VitxError(f"there is no method {name!r}: the methods are {', '.join(_METHODS)}")
    return _METHODS[name]


def with_options(methods: Any) -> dict[str, dict[str, Any]]:
    """Return a mapping from method names to options, given such a mapping, several names, or one name."""
    names = [methods] if isinstance(methods, str) else methods
    if not isinstance(names, (Mapping, Sequence)) or not names or not all(isinstance(n, str) for n in names):
        found = f"found {methods!r}: the methods are {', '.join(_METHODS)}"
        raise VitxError(f"methods must be names, or a mapping from names to options, and not empty, {found}")
    given = names if isinstance(names, Mapping) else dict.fromkeys(names)
    asked = {name: dict(options or {}) for name, options in given.items()}
    for name, options in asked.items():
        known = find_method(name).options
        for option in sorted(options.keys() - known.keys()):
            listed = f"its options are {', '.join(known)}" if known else "it takes none"
            raise VitxError(f"{name} has no option {option!r}: {listed}")
    return asked

"""What a tape holds: values, and the steps that made them."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Size, Tensor

from vitx.tape.axes import Axes, Factor, dimension, tokens

if TYPE_CHECKING:
    from vitx.tape.sums import Sum

# "scores": a product of two live values, as q k^T. "weights": a softmax, or what else is made of scores and
# is not linear. "exp": e to the power of something. "log": the logarithm of weights. "normalizer": the
# logarithm of a sum of exponentials. "size": how large something is, as a standard deviation.
Kind = Literal["scores", "weights", "exp", "log", "normalizer", "size"]
LAID_OUT = ("view", "_unsafe_view", "reshape", "_reshape_alias", "clone", "alias", "detach", "_to_copy")
Arrived = Sequence[Tensor | None]
Back = Callable[[list[Tensor]], Arrived]
Via = Callable[[Tensor], Tensor]


class Value:
    """A live tensor at one moment: one that depends on the image; or a constant that the model brings.

    Attributes:
        number: values are counted as they are made.
        shape: of the tensor.
        made_by: the step that made it; None for the image and for constants.
        above: the numbers of all values that it was made from, as a bit set.
        roots: the numbers of the values that it is a mere rearrangement of, as a bit set.
        open: the attentions that it passed since the last residual closed.
        kind: what it is, if that matters.
        dim: the dimension over which weights sum to 1.
        parts: the values that were put together along a dimension, if nothing else was done to them.
        along: which of its dimensions counts the parts: as axes in which it alone has channels.
        fan: how many channels weights added up to make it, if they did, and the roots of what they are of.
        total: of a sum of exponentials, what was summed, and over which dimensions.
        sum: the step of which it is the sum, times constants.
        via: takes its relevance to the shape of that sum; None: it has that shape.
        base: the number of the value that it is a function of, element by element.
        place: the number of a value with the same tokens: weights and constants change their channels alone.
        proportional: whether that function is a product with constants.
        real: what is no padding, 1 or 0, of a shape that broadcasts to its own; None: all of it.
        is_constant: whether the model brings it, and it does not depend on the image.
        rounded: whether it was brought to another precision, so that weights do not sum to 1 exactly.
        mass: makes how much each element counts in a sum, of a shape that broadcasts to its own.
        constant: the tensor, of a constant of which that is kept.
    """

    __slots__ = (
        *("_axes", "above", "along", "base", "constant", "dim", "fan"),
        *("is_constant", "kind"),
        *(
            "made_by",
            "mass",
            "number",
            "open",
            "parts",
            "place",
            "proportional",
            "real",
            "rounded",
            "roots",
            "shape",
            "sum",
            "total",
            "via",
        ),
    )

    def __init__(self, number: int, shape: Size, inputs: Sequence["Value"] = ()) -> None:
        """Describes a value that was made from others."""
        self.number, self.shape = number, shape
        self.above = 0
        self.open: frozenset[Any] = frozenset()
        for value in inputs:
            self.above |= value.above | (1 << value.number)
            if value.open:
                self.open = self.open | value.open
        self.roots = 1 << number
        self.base, self.place, self.proportional = number, number, True
        self.kind: Kind | None = None
        self.dim: int | None = None
        self.parts: list[Value] | None = None
        self.along: Axes | None = None
        self.fan: tuple[int, int] | None = None
        self.total: tuple[Value, list[int]] | None = None
        self.sum: Sum | None = None
        self.via: Via | None = None
        self.real: Tensor | None = None
        self.mass: Callable[[], Tensor] | None = None
        self.is_constant = self.rounded = False
        self.constant: Tensor | None = None
        self.made_by: Step | None = None
        self._axes: Axes | None = None

    def made_from(self, other: "Value") -> bool:
        """Returns whether the other one, or all that it is a rearrangement of, was used to make this one."""
        return bool((self.above >> other.number) & 1) or not other.roots & ~self.above

    @property
    def axes(self) -> Axes:
        """What its dimensions hold; all tokens where that is not known."""
        if self._axes is None:
            step = self.made_by
            found = None
            if step is not None and step.axes is not None:
                found = step.axes([value.axes for value in step.inputs])
            self._axes = tokens(self.shape) if found is None else found
        return self._axes


class Step:
    """One call on live values, and how relevance and a gradient go back through it.

    Attributes:
        name: of the operator.
        inputs: where relevance goes.
        outputs: the values that it made.
        relevance: from the relevance of the outputs to that of the inputs; None: no rule is known.
        sources: where a gradient goes.
        gradient: from the gradient of the outputs to that of the sources; None: it ends here.
        axes: from the axes of the inputs to those of the first output.
        place: the module that ran, and its line of code, where that is known.
        index: its place on the tape.
    """

    __slots__ = ("axes", "gradient", "index", "inputs", "name", "outputs", "place", "relevance", "sources")

    def __init__(
        self,
        name: str,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        relevance: Back | None,
        gradient: Back | None = None,
        sources: Sequence[Value] | None = None,
        axes: Callable[[list[Axes]], Axes | None] | None = None,
    ) -> None:
        """Describes a call, and tells its outputs that it made them."""
        self.name, self.inputs, self.outputs = name, list(inputs), list(outputs)
        self.relevance, self.gradient = relevance, gradient
        self.sources = self.inputs if sources is None else list(sources)
        self.axes = axes
        self.index = 0
        self.place: tuple[str, str] | None = None
        for value in outputs:
            value.made_by = self

    def clear(self) -> None:
        """Parts with its values, and with what was kept for the ways back."""
        self.inputs, self.outputs, self.sources = [], [], []
        self.relevance = self.gradient = self.axes = None


def followed(step: Step, dim: int) -> int | None:
    """Returns where a dimension of the first input lies in the output; None where it was changed."""
    shape = step.inputs[0].shape
    if step.axes is None or shape[dim] == 1:
        return None
    return counting(step.axes([marked(shape, dim)]), shape[dim])


def marked(shape: Sequence[int], dim: int, parts: int | None = None) -> Axes:
    """Returns axes in which one dimension, or the parts that were put together along it, has channels."""
    found = list(tokens(shape))
    found[dim] = dimension(shape[dim], True) if parts is None else (
        Factor(parts, True), *dimension(shape[dim] // parts, False)
    )  # fmt: skip
    return tuple(found)


def counting(axes: Axes | None, size: int) -> int | None:
    """Returns the dimension that has as many channels and nothing else."""
    whole = (Factor(size, True),)
    return next((place for place, part in enumerate(axes or ()) if part == whole), None)


def after(first: Via | None, second: Via | None) -> Via | None:
    """Returns one after the other; None where there is neither."""
    if first is None or second is None:
        return first or second
    return lambda r: second(first(r))

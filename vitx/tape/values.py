"""What a tape holds: values, and the steps that made them."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Size, Tensor

from vitx.tape.axes import Axes, Factor, dimension, resized, tokens

if TYPE_CHECKING:
    from vitx.tape.sums import Sum

# "scores": a product of two live values, as q k^T. "weights": a softmax, or what else is made of scores and
# is not linear. "exp": e to the power of something. "log": the logarithm of weights. "normalizer": the
# logarithm of a sum of exponentials. "size": how large something is, as a standard deviation.
Kind = Literal["scores", "weights", "exp", "log", "normalizer", "size"]
Arrived = Sequence[Tensor | None]
Back = Callable[[list[Tensor]], Arrived]
Via = Callable[[Tensor], Tensor]
AxesOf = Callable[[list[Axes]], Axes | None]


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
        over: over which of its dimensions weights sum to 1, or did before they were rounded or mixed: as axes
            in which these alone have channels.
        parts: the values that were put together along a dimension, if nothing else was done to them.
        along: which of its dimensions counts the parts: as axes in which it alone has channels.
        fan: how many channels weights added up to make it, if they did, and the roots of what they are of.
        total: of a sum of exponentials, what was summed.
        sum: the step of which it is the sum, times constants.
        via: takes its relevance to the shape of that sum; None: it has that shape.
        base: the number of the value that it is a function of, element by element.
        proportional: whether that function is a product with constants.
        place: the number of a value with the same tokens: weights and constants change their channels alone.
        mass: makes how much each element counts in a sum, in its own shape or one that broadcasts to it: a
            constant that weighs it, or 0 for padding; None: all count the same.
        rounded: whether it was brought to another precision, or mixed, so that weights do not sum to 1.
        is_constant: whether the model brings it, and it does not depend on the image.
        constant: the tensor, of a constant of which that is kept.
    """

    made_by: "Step | None" = None
    kind: Kind | None = None
    over: Axes | None = None
    parts: list["Value"] | None = None
    along: Axes | None = None
    fan: tuple[int, int] | None = None
    total: "Value | None" = None
    sum: "Sum | None" = None
    via: Via | None = None
    proportional: bool = True
    mass: Callable[[], Tensor] | None = None
    rounded: bool = False
    is_constant: bool = False
    constant: Tensor | None = None
    _axes: Axes | None = None

    def __init__(self, number: int, shape: Size, inputs: Sequence["Value"] = ()) -> None:
        """Describes a value that was made from others."""
        self.number, self.shape, self.base, self.place = number, shape, number, number
        self.roots, self.above = 1 << number, 0
        self.open: frozenset[Any] = frozenset()
        for value in inputs:
            self.above |= value.above | (1 << value.number)
            if value.open:
                self.open = self.open | value.open

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
            self._axes = tokens(self.shape) if found is None else resized(found, self.shape)
        return self._axes

    @property
    def dim(self) -> int | None:
        """The dimension over which weights sum to 1; None where it is not known, or not one alone."""
        own = [place for place, part in enumerate(self.over or ()) if any(f.channels for f in part)]
        whole = len(own) == 1 and self.over is not None and all(f.channels for f in self.over[own[0]])
        return own[0] if whole else None

    @dim.setter
    def dim(self, dim: int | None) -> None:
        self.over = None if dim is None else marked(self.shape, dim, self.shape[dim])

    def counts(self, dim: int) -> bool:
        """Returns whether a dimension counts the parts that were put together, its outermost factor."""
        if self.parts is None or self.along is None:
            return False
        return self.along[dim][:1] == (Factor(len(self.parts), True),)

    def stacks(self, dim: int) -> bool:
        """Returns whether a dimension counts the parts that were put together, and nothing else."""
        return self.counts(dim) and self.shape[dim] == len(self.parts or ())


class Step:
    """One call on live values, and how relevance and a gradient go back through it.

    Attributes:
        name: of the operator.
        inputs: where relevance goes.
        outputs: the values that it made.
        relevance: from the relevance of the outputs to that of the inputs; None: no rule is known.
        gradient: from the gradient of the outputs to that of the sources; None: it ends here.
        sources: where a gradient goes; the inputs by default.
        axes: from the axes of the inputs to those of the first output.
        place: the module that ran, and its line of code, where that is known.
        index: its place on the tape.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        relevance: Back | None,
        gradient: Back | None = None,
        sources: Sequence[Value] | None = None,
        axes: AxesOf | None = None,
    ) -> None:
        """Describes a call, and tells its outputs that it made them."""
        self.name, self.inputs, self.outputs = name, list(inputs), list(outputs)
        self.relevance, self.gradient, self.axes = relevance, gradient, axes
        self.sources = self.inputs if sources is None else list(sources)
        self.index = 0
        self.place: tuple[str, str] | None = None
        for value in outputs:
            value.made_by = self


def followed(step: Step, axes: Axes | None) -> Axes | None:
    """Returns what becomes of some axes of the first input."""
    return None if axes is None or step.axes is None else step.axes([axes])


def marked(shape: Sequence[int], dim: int, parts: int) -> Axes:
    """Returns axes in which the parts along a dimension, and nothing else, have channels."""
    found = list(tokens(shape))
    found[dim] = (*dimension(parts, True), *dimension(shape[dim] // parts, False))
    return tuple(found)


def reduced(shape: Sequence[int], by: Sequence[int]) -> int | None:
    """Returns the one dimension in which something that broadcasts to this shape has size 1."""
    sizes = (1,) * (len(shape) - len(by)) + tuple(by)
    dims = [dim for dim, (size, one) in enumerate(zip(shape, sizes, strict=True)) if one == 1 < size]
    return dims[0] if len(dims) == 1 else None


def after(first: Via | None, second: Via | None) -> Via | None:
    """Returns one after the other; None where there is neither."""
    if first is None or second is None:
        return first or second
    return lambda r: second(first(r))

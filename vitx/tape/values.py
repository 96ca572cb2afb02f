"""The contents of a tape: values, and the steps that made them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Size, Tensor

from vitx.tape.axes import Axes, Factor, channel_dims, dimension, resized, tokens

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
    """

    made_by: "Step | None" = None
    above: int  # the numbers of all values that it was made from, as a bit set
    roots: int  # the numbers of the values that it is a mere rearrangement of, as a bit set
    open: frozenset[Any]  # the attentions that it passed since the last residual closed
    base: int  # the number of the value that it is a function of, element by element
    proportional: bool = True  # whether that function is a product with constants
    place: int  # the number of a value of the same tokens: weights and constants change their channels alone
    kind: Kind | None = None
    # Over which of its dimensions weights sum to 1, or did before they were rounded or mixed: as axes in
    # which these alone have channels.
    over: Axes | None = None
    rounded: bool = False  # whether it was brought to another precision, or mixed, so that they do not
    parts: list["Value"] | None = None  # what was put together along a dimension, if nothing else was done
    along: Axes | None = None  # which dimension counts the parts: as axes in which it alone has channels
    fan: tuple[int, int] | None = None  # how many channels weights added up, and the roots of these
    total: "Value | None" = None  # of a sum of exponentials: what was summed
    sum: Any = None  # the step of which it is the sum, times constants
    via: Via | None = None  # takes its relevance to the shape of that sum; None: it has that shape
    # Makes how much each element counts in a sum, in its own shape or one that broadcasts to it: a constant
    # that weighs it, or 0 for padding; None: all count the same.
    mass: Callable[[], Tensor] | None = None
    is_constant: bool = False  # whether the model brings it, and it does not depend on the image
    constant: Tensor | None = None  # the tensor, of a constant of which that is kept
    _axes: Axes | None = None

    def __init__(self, number: int, shape: Size, inputs: Sequence["Value"] = ()) -> None:
        self.number, self.shape, self.base, self.place = number, shape, number, number
        self.roots, self.above = 1 << number, 0
        self.open = frozenset()
        for value in inputs:
            self.above |= value.above | (1 << value.number)
            if value.open:
                self.open = self.open | value.open

    def made_from(self, other: "Value") -> bool:
        """Return whether the other one, or all that it is a rearrangement of, was used to make this one."""
        return bool((self.above >> other.number) & 1) or not other.roots & ~self.above

    @property
    def axes(self) -> Axes:
        """The contents of its dimensions; all tokens where they are not known."""
        if self._axes is None:
            step = self.made_by
            found = step.axes([v.axes for v in step.inputs]) if step is not None and step.axes else None
            self._axes = tokens(self.shape) if found is None else resized(found, self.shape)
        return self._axes

    @property
    def dim(self) -> int | None:
        """The dimension over which weights sum to 1; None where it is not known, or not one alone."""
        over = self.over or ()
        own = [dim for dim, part in enumerate(over) if any(factor.channels for factor in part)]
        return own[0] if len(own) == 1 and own == channel_dims(over) else None

    @dim.setter
    def dim(self, dim: int | None) -> None:
        self.over = None if dim is None else marked(self.shape, dim, self.shape[dim])

    def counts(self, dim: int) -> bool:
        """Return whether a dimension counts the parts that were put together, its outermost factor."""
        parts, along = self.parts, self.along
        return parts is not None and along is not None and along[dim][:1] == (Factor(len(parts), True),)

    def stacks(self, dim: int) -> bool:
        """Return whether a dimension counts the parts that were put together, and nothing else."""
        return self.counts(dim) and self.shape[dim] == len(self.parts or ())


@dataclass(eq=False)
class Step:
    """One call on live values, and how relevance and a gradient go back through it."""

    name: str  # of the operator
    inputs: list[Value]  # where relevance goes
    outputs: list[Value]  # what it made
    relevance: Back | None  # from that of the outputs to that of the inputs; None: no rule is known
    gradient: Back | None = None  # from that of the outputs to that of the sources; None: it ends here
    sources: Any = None  # the values to which a gradient goes; by default, the inputs
    axes: AxesOf | None = None  # from the axes of the inputs to those of the first output
    chooses: bool = False  # whether it takes elements at places that depend on the image
    index: int = 0  # its place on the tape
    place: tuple[str, str] | None = None  # the module that ran, and its line of code, where that is known

    def __post_init__(self) -> None:
        if self.sources is None:
            self.sources = self.inputs
        for value in self.outputs:
            value.made_by = self

    def __str__(self) -> str:
        """Name it as a user knows it."""
        module, line = self.place or ("", "")
        return self.name + (f", in {module}" if module else "") + (f" (`{line}`)" if line else "")


def followed(found: Value, axes: Axes | None) -> Axes | None:
    """Return what the step that made a value makes of some axes of its first input."""
    step = found.made_by
    return None if axes is None or step is None or step.axes is None else step.axes([axes])


def marked(shape: Sequence[int], dim: int, parts: int) -> Axes:
    """Return axes in which the parts along a dimension, and nothing else, have channels."""
    found = list(tokens(shape))
    found[dim] = (*dimension(parts, True), *dimension(shape[dim] // parts, False))
    return tuple(found)


def reduced(shape: Sequence[int], by: Sequence[int]) -> int | None:
    """Return the one dimension in which something that broadcasts to this shape has size 1."""
    sizes = (1,) * (len(shape) - len(by)) + tuple(by)
    dims = [dim for dim, (size, one) in enumerate(zip(shape, sizes, strict=True)) if one == 1 < size]
    return dims[0] if len(dims) == 1 else None


def after(first: Via | None, second: Via | None) -> Via | None:
    """Return one after the other; None where there is neither."""
    if first is None or second is None:
        return first or second
    return lambda r: second(first(r))

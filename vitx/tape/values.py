"""The contents of a tape: values, and the steps that made them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Size, Tensor

from vitx.tape.axes import Axes, Factor, channel_dims, dimension, resized, tokens

# "scores": a product of two live values, such as q k^T. "weights": a softmax, or another nonlinear function
# of scores. "exp": an exponential. "size": a magnitude, such as a standard deviation or a sum of "exp".
Kind = Literal["scores", "weights", "exp", "size"]
Arrived = Sequence[Tensor | None]
Back = Callable[[list[Tensor]], Arrived]
Via = Callable[[Tensor], Tensor]
AxesOf = Callable[[list[Axes]], Axes | None]


class Value:
    """A live tensor, which depends on the image, at one moment; or a constant of the model.

    It knows how it came about. Take y = x + (softmax(q @ k.T) @ v) @ w, where q, k and v come from x:
    `q @ k.T` has the kind "scores", and its softmax "weights", so its product with v is an attention. This
    stays open until y: there, the stream x, from which the other term was made, meets a term with an open
    attention that x has not, and the sum is a residual. The product with w has the tokens of the attention.

    Attributes:
        number: values are numbered as they are created.
        shape: of the tensor.
        made_by: the step that made it; None for the image and for constants.
    """

    made_by: "Step | None" = None
    ancestors: int  # the numbers of all values that it was computed from, as a bit set
    rearranges: (
        int  # the numbers of the values that it merely rearranges, as a bit set: x.T, 2 * x, cat(x, y)
    )
    open: frozenset[Any]  # the attentions that it went through since the last residual closed
    base: int  # the number of the value that it is an elementwise function of: relu(x), x * x
    proportional: bool = True  # whether that function is a multiplication by constants
    times: float = 1.0  # the constant; NaN if it is not a single number
    reads: int  # the number of the value whose elements it selects or adds up, up to constant factors
    adds: float = 1.0  # how many of these it adds up
    tokens: int  # the number of the first value with the same tokens: x @ w, norm(x), x + constant
    kind: Kind | None = None
    # The dimensions over which a softmax was taken, or is in the making, as axes in which only these have
    # channels.
    softmax_over: Axes | None = None
    parts: list["Value"] | None = None  # the values joined along a dimension, if nothing else was done
    along: Axes | None = None  # the dimension that counts the parts, as axes in which only it has channels
    fan: tuple[int, int] | None = None  # how many channels weights added up, and what those rearranged
    sum: Any = None  # the step whose sum it is, up to constant factors
    via: Via | None = None  # takes its relevance to the shape of that sum; None if it has that shape
    # Returns how much each element counts in a sum, in its own shape or one that broadcasts to it: a constant
    # weight, or 0 for padding. None if all count the same.
    mass: Callable[[], Tensor] | None = None
    is_constant: bool = False  # whether it belongs to the model and does not depend on the image
    constant: Any = None  # a constant's tensor, a `vitx.tape.tensors.Kept`, if it is kept
    _axes: Axes | None = None

    def __init__(self, number: int, shape: Size, inputs: Sequence["Value"] = ()) -> None:
        self.number, self.shape, self.base, self.tokens, self.reads = number, shape, number, number, number
        self.rearranges, self.ancestors = 1 << number, 0
        self.open = frozenset()
        for value in inputs:
            self.ancestors |= value.ancestors | (1 << value.number)
            if value.open:
                self.open = self.open | value.open

    def made_from(self, other: "Value") -> bool:
        """Return whether this was computed from the other value, or from all values that it rearranges."""
        return bool((self.ancestors >> other.number) & 1) or not other.rearranges & ~self.ancestors

    @property
    def axes(self) -> Axes:
        """The contents of its dimensions; all tokens if they are unknown."""
        if self._axes is None:
            step = self.made_by
            found = step.axes([v.axes for v in step.inputs]) if step is not None and step.axes else None
            self._axes = tokens(self.shape) if found is None else resized(found, self.shape)
        return self._axes

    @property
    def dim(self) -> int | None:
        """The dimension of the softmax; None if unknown, or not a single whole dimension."""
        over = self.softmax_over or ()
        own = [dim for dim, part in enumerate(over) if any(factor.channels for factor in part)]
        return own[0] if len(own) == 1 and own == channel_dims(over) else None

    @dim.setter
    def dim(self, dim: int | None) -> None:
        self.softmax_over = None if dim is None else marked(self.shape, dim, self.shape[dim])

    def counts(self, dim: int) -> bool:
        """Return whether the outermost factor of a dimension counts the parts that were joined."""
        parts, along = self.parts, self.along
        return parts is not None and along is not None and along[dim][:1] == (Factor(len(parts), True),)

    def stacks(self, dim: int) -> bool:
        """Return whether a dimension counts the parts that were joined, and nothing else."""
        return self.counts(dim) and self.shape[dim] == len(self.parts or ())


@dataclass(eq=False)
class Step:
    """One call on live values, with its backward rules for relevance and for a gradient."""

    name: str  # of the operator
    inputs: list[Value]  # the values that relevance goes to
    outputs: list[Value]  # the values that it made
    relevance: Back | None  # from that of the outputs to that of the inputs; None if no rule is known
    gradient: Back | None = None  # from that of the outputs to that of the sources; None if there is none
    sources: Any = None  # the values that a gradient goes to; by default, the inputs
    axes: AxesOf | None = None  # from the axes of the inputs to those of the first output
    chooses: bool = False  # whether it selects elements at positions that depend on the image
    index: int = 0  # its place on the tape
    location: tuple[str, str] | None = None  # the module that ran and its line of code, if known

    def __post_init__(self) -> None:
        if self.sources is None:
            self.sources = self.inputs
        for value in self.outputs:
            value.made_by = self

    def __str__(self) -> str:
        """Return the operator, the module and the line of code, as messages show them."""
        module, line = self.location or ("", "")
        return self.name + (f", in {module}" if module else "") + (f" (`{line}`)" if line else "")


def followed(found: Value, axes: Axes | None) -> Axes | None:
    """Return the axes of a value, given axes of its step's first input; None if they are unknown."""
    step = found.made_by
    return None if axes is None or step is None or step.axes is None else step.axes([axes])


def marked(shape: Sequence[int], dim: int, parts: int) -> Axes:
    """Return axes in which only the parts along one dimension have channels."""
    found = list(tokens(shape))
    found[dim] = (*dimension(parts, True), *dimension(shape[dim] // parts, False))
    return tuple(found)


def repeated(sizes: Sequence[int], shape: Sequence[int]) -> list[int] | None:
    """Return the dimensions along which a tensor of these sizes is repeated in a shape; None if it is not."""
    sizes = (1,) * (len(shape) - len(sizes)) + tuple(sizes)
    if len(sizes) > len(shape) or any(own not in (1, n) for own, n in zip(sizes, shape, strict=True)):
        return None
    return [dim for dim, (own, n) in enumerate(zip(sizes, shape, strict=True)) if own == 1 < n]


def reduced(shape: Sequence[int], by: Sequence[int]) -> int | None:
    """Return the dimension that was reduced to size 1 in a broadcastable shape; None if not exactly one."""
    dims = repeated(by, shape) or ()
    return dims[0] if len(dims) == 1 else None


def after(first: Via | None, second: Via | None) -> Via | None:
    """Return the composition of two functions, either of which may be missing; None if both are."""
    if first is None or second is None:
        return first or second
    return lambda r: second(first(r))

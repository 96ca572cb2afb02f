"""The tape of one pass: the calls that ran, step by step, and the values that each one read and made."""

import linecache
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from vitx.functional.tiles import Memory
from vitx.tape.attention import Attention
from vitx.tape.sums import Layer, Sum, layers_of
from vitx.tape.tensors import Keeper, Kept
from vitx.tape.values import Step, Value

_INSIDE = tuple(str(Path(file).resolve().parent) for file in (__file__, torch.__file__))


@dataclass(eq=False)
class Tape:
    """The steps of one pass."""

    model: nn.Module
    network: str | None = None  # whose gradient is recorded: "linearised" or "plain"; None: no gradient
    accounts: bool = False  # whether to keep what constants and residuals add to a score
    head_fusion: str | None = None  # how to fuse the heads of a small A as it is computed; None: not at all
    named: bool = False  # whether to keep the place of each step in the model
    together: bool = False  # whether the images are parts of one question; they may differ in size
    steps: list[Step] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    images: list[Value] = field(default_factory=list)  # the inputs of the pass; walks end at the first
    constants: list[Value] = field(default_factory=list)  # the model's own, such as class tokens and biases
    attentions: list[Attention] = field(default_factory=list)  # the attentions among the steps, in order
    # If `accounts`: the output of each residual, with the number of layers up to it (at least 1 after any
    # attention); and for each value to which a constant was added, the result.
    streams: dict[Value, tuple[Kept, int]] = field(default_factory=dict)
    shifted: dict[Value, tuple[Value, Kept]] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    keeper: Keeper = field(default_factory=Keeper)
    # If one token is explained: for each number of elements, the output of the last residual, after its norm.
    ends: dict[int, tuple[Value, Kept]] | None = None
    # How many channels a join of unlike ones has, by what it rearranges.
    unlike: dict[int, int] = field(default_factory=dict)
    opened: set[Sum] = field(default_factory=set)  # the sums whose terms are those of one that is no residual
    residuals: int = 0  # the numbers of the residuals' output values, as a bit set
    _first: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def value(self, shape: Sequence[int], inputs: Sequence[Value] = ()) -> Value:
        """Create a value of this shape, computed from others."""
        found = Value(len(self.values), torch.Size(shape), inputs)
        self.values.append(found)
        return found

    def constant(self, tensor: Tensor | None, shape: Sequence[int] = ()) -> Value:
        """Create the value of a constant of the model; without a tensor, it is 0 and has this shape."""
        found = self.value(shape if tensor is None else tensor.shape)
        found.is_constant = True
        if self.accounts and tensor is not None:
            found.constant = self.keeper.keep(tensor)
        self.constants.append(found)
        return found

    def append(self, step: Step) -> None:
        """Append a step."""
        if self.named or step.relevance is None:
            step.location = location_of(self.model)
        step.index = len(self.steps)
        self.steps.append(step)
        if isinstance(step, Attention):
            self.attentions.append(step)

    def source_of(self, value: Value) -> Value:
        """Return the last of the values that a value rearranges: itself if it rearranges no other."""
        return self.values[value.rearranges.bit_length() - 1]

    def same(self, found: Value, *key: Any) -> int:
        """Return the number of the first value with this key: an equal rearrangement of the same values."""
        return self._first.setdefault(key, found.number)

    def combined(self, found: Value, values: Iterable[Value], *how: Any) -> int:
        """Return the tokens of a combination of values, all with the same tokens or else in the same way."""
        tokens = {value.tokens for value in values}
        return tokens.pop() if len(tokens) == 1 and not how else self.same(found, *how, *sorted(tokens))

    def end(self, found: Value, tensor: Tensor, made_of: Value | None = None) -> None:
        """Store the output of a residual, or of the norm after it, as the last one of that many elements."""
        if self.ends is None:
            return
        count = tensor.numel()
        if made_of is None or (count in self.ends and self.ends[count][0] is made_of):
            self.ends[count] = found, self.keeper.keep(tensor)

    def settle(self) -> None:
        """Drop opened sums from the residuals, unless another step reads them, too.

        A residual that closes an attention again, after another one with the same stream, is refused.
        """
        read: set[Value] = set()
        for step in reversed(self.steps if self.opened else ()):
            if any(value in read or value.sum not in self.opened for value in step.outputs):
                read.update(step.inputs)
        self.drop(one for one in self.opened if read.isdisjoint(one.outputs))
        pairs = {pair for attention in self.attentions for pair in permutations(attention.residuals, 2)}
        again = {later for later, before in pairs if later.repeats(before)}
        self.drop(again)
        for residual in again:
            residual.refuse()
        self._find_unknown()

    def _find_unknown(self) -> None:
        """Note the terms whose relevance would reach an operator without a rule: no sum leaves them out."""
        unknown = {value for step in self.steps if step.relevance is None for value in step.outputs}
        for step in self.steps if unknown else ():
            if isinstance(step, Sum):
                step.unknown = [term for term in step.inputs if term in unknown]
            if not unknown.isdisjoint(step.inputs[:1] if isinstance(step, Attention) else step.inputs):
                unknown.update(step.outputs)

    def drop(self, sums: Iterable[Sum]) -> None:
        """Drop sums from the residuals."""
        for one in sums:
            for attention in one.closes:
                attention.residuals.discard(one)
            for value in one.outputs:
                self.streams.pop(value, None)

    def last_residuals(self) -> Iterator[Value]:
        """Yield the outputs of the residuals so far, the last one first."""
        left = self.residuals
        while left:
            number = left.bit_length() - 1
            left ^= 1 << number
            yield self.values[number]

    def clear(self) -> None:
        """Empty the tape: values and steps refer to each other, and keep the tensors of the pass alive."""
        for step in self.steps:
            vars(step).clear()
        vars(self).update(vars(Tape(self.model)))

    @property
    def image(self) -> Value:
        """The value of the image."""
        return self.images[0]

    @property
    def layers(self) -> list[Layer]:
        """The layers, in the order in which they ran: each holds all attentions that one residual closes."""
        return layers_of(self.attentions)

    def layers_from(self, first: int) -> list[Layer]:
        """Return the layers from a number on."""
        return [layer for layer in self.layers if layer.number >= first]


def location_of(model: nn.Module) -> tuple[str, str] | None:
    """Return the module that is running and its line of code; None if unknown."""
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    frame: FrameType | None = sys._getframe(1)
    line = ""
    while frame:
        path = frame.f_code.co_filename
        if not line and not path.startswith(_INSIDE):
            line = linecache.getline(path, frame.f_lineno).strip()
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module in names:
            return names[module], line
        frame = frame.f_back
    return None

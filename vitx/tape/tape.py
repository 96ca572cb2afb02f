"""The tape of one pass: what ran, step by step, and what each step made of which values."""

import linecache
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from vitx.functional.tiles import Memory
from vitx.tape.attention import Attention
from vitx.tape.sums import Layer, layers_of
from vitx.tape.tensors import Keeper, Kept
from vitx.tape.values import Step, Value

_INSIDE = tuple(str(Path(file).resolve().parent) for file in (__file__, torch.__file__))


@dataclass(eq=False)
class Tape:
    """The steps of one pass."""

    model: nn.Module
    network: str | None = None  # of which a gradient is recorded: "linearised" or "plain"; None: of none
    accounts: bool = False  # whether it is kept what constants and residuals add to a score
    head_fusion: str | None = None  # how heads of a small A are fused as it is computed; None: they are not
    named: bool = False  # whether the place of each step in the model is kept
    together: bool = False  # whether the images are parts of one question, and may be of several sizes
    steps: list[Step] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    images: list[Value] = field(default_factory=list)  # what the pass began with; ways back end at the first
    constants: list[Value] = field(default_factory=list)  # what the model brings, as class tokens and biases
    attentions: list[Attention] = field(default_factory=list)  # the steps that are some, in their order
    # Where `accounts`: what each residual put out, with the number of layers up to it (behind any
    # attention, at least 1); and of a value to which a constant was added, what came out.
    streams: dict[Value, tuple[Kept, int]] = field(default_factory=dict)
    shifted: dict[Value, tuple[Value, Kept]] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    keeper: Keeper = field(default_factory=Keeper)
    # Where it is asked for one token: what the last residual of as many elements put out, behind its norm.
    ends: dict[int, tuple[Value, Kept]] | None = None
    residuals: int = 0  # the numbers of the values that residuals put out, as a bit set
    _first: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def value(self, shape: Sequence[int], inputs: Sequence[Value] = ()) -> Value:
        """Make a value of this shape from others."""
        found = Value(len(self.values), torch.Size(shape), inputs)
        self.values.append(found)
        return found

    def constant(self, tensor: Tensor | None, shape: Sequence[int] = ()) -> Value:
        """Make the value of what the model brings itself; without a tensor, it is 0 and has this shape."""
        found = self.value(shape if tensor is None else tensor.shape)
        found.is_constant = True
        if self.accounts and tensor is not None:
            found.constant = tensor.detach()
        self.constants.append(found)
        return found

    def append(self, step: Step) -> None:
        """Add a step."""
        if self.named or step.relevance is None:
            step.place = place_of(self.model)
        step.index = len(self.steps)
        self.steps.append(step)
        if isinstance(step, Attention):
            self.attentions.append(step)

    def same(self, found: Value, *key: Any) -> int:
        """Return the number of the first value with this key: the same rearrangement of the same values."""
        return self._first.setdefault(key, found.number)

    def end(self, found: Value, tensor: Tensor, made_of: Value | None = None) -> None:
        """Note what a residual put out, or what a norm made of that, as the last of as many elements."""
        if self.ends is None:
            return
        count = tensor.numel()
        if made_of is None or (count in self.ends and self.ends[count][0] is made_of):
            self.ends[count] = found, self.keeper.keep(tensor)

    def clear(self) -> None:
        """Empty the tape: values and steps hold one another, and with them what was kept of the pass."""
        for step in self.steps:
            vars(step).clear()
        vars(self).update(vars(Tape(self.model)))

    @property
    def image(self) -> Value:
        """The value of the image."""
        return self.images[0]

    @property
    def layers(self) -> list[Layer]:
        """The layers: all attentions that one residual closes, in the order in which they ran."""
        return layers_of(self.attentions)


def place_of(model: nn.Module) -> tuple[str, str] | None:
    """Return the module that runs now, and its line of code; None where none is known."""
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

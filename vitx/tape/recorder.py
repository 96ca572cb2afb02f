"""Records one pass of a model: a step on the tape for each ATen call on a live value.

A `TorchDispatchMode` sees each call below autograd, autocast, composite functions, `torch.jit` and
`torch.export`, and runs it as it is. A value is *live* if it depends on the image.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitx.errors import VitxError
from vitx.tape import kernels
from vitx.tape.call import Call
from vitx.tape.leaving import Leaving
from vitx.tape.overload import overload, tensors_in
from vitx.tape.rules import rule_of
from vitx.tape.tape import Tape
from vitx.tape.tensors import Tensors
from vitx.tape.values import Step, Value
from vitx.tape.versions import Versions

UNSEEN = "code that torch does not show"
FACTORIES = frozenset((  # which take nothing but a shape and a type
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "zeros_like", "ones_like"),
    *("full_like", "empty_like", "rand_like", "randn_like", "randint_like", "empty_permuted"),
))  # fmt: skip


class Recorder(TorchDispatchMode):
    """Writes a pass onto a tape."""

    def __init__(self, tape: Tape) -> None:
        """Begins with an empty tape."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = tape
        self._tensors = Tensors(tape.model)
        self._versions = Versions(tape, self._tensors)
        self._left = False  # whether a live value was handed to other code

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records what its block runs."""
        compiles = "torch._dynamo" in sys.modules  # else nothing can be compiled
        eager = torch.compiler.set_stance("force_eager") if compiles else nullcontext()
        try:
            with eager, Leaving(self._let_go), self:
                yield
        except NotImplementedError as error:
            name = re.search(r"(?:HigherOrderOperator|HOP) (\w+)", str(error))
            if name is None:
                raise
            raise VitxError(
                f"the model calls {name[1]}, which runs as one piece that cannot be followed: let it "
                "attend by scaled_dot_product_attention for the explanation"
            ) from error

    def begin(self, image: Tensor) -> None:
        """Makes a tensor live."""
        value = self.tape.value(image.shape)
        self.tape.images.append(value)
        self._tensors.bind(image, value)

    def get(self, tensor: Any) -> Value | None:
        """Returns the value of a tensor; None if it does not depend on the image."""
        if self._versions and (value := self._versions.read(tensor)) is not None:
            return value
        known = self._tensors.get(tensor)
        return None if known is None else known.value

    def made_last(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Returns the one of several tensors that was made of all others; None where there is none."""
        values = [self.get(tensor) for tensor in tensors]
        for tensor, value in zip(tensors, values, strict=True):
            others = [other for other in values if other is not value]
            if value is not None and all(o is not None and value.made_from(o) for o in others):
                return tensor
        return None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operator = overload(func)
        if operator.composite:
            with self:
                return func.decompose(*args, **kwargs)
        given = operator.tensors(args, kwargs)
        if self._left:
            self._look_for_strangers(given)
        if self._versions and operator.views and self._versions.is_stale(args[0]):
            out = func(*args, **kwargs)
            for view in tensors_in(out):
                self._versions.read(view)  # what the storage holds now
            return out
        live = [(tensor, value) for tensor in given if (value := self.get(tensor)) is not None]
        if not live or operator.name in FACTORIES:
            out = func(*args, **kwargs)
            self._made(tensors_in(out), given, new=bool(live) or operator.name.startswith("lift_fresh"))
            return out
        call = Call(self.tape, self._tensors, operator, args, kwargs, live)
        if operator.written:
            return self._write(call)
        out = kernels.run(call)
        made = tensors_in(out)
        for tensor in made:
            if not tensor.is_floating_point():
                self._tensors.answers(tensor, live[0][1])
        call.outs = [tensor for tensor in made if _holds(call, tensor)]
        if operator.name == "as_strided":
            self._tensors.bind(out, self._versions.laid(out))
        elif call.outs:
            for tensor, value in zip(call.outs, rule_of(call)(call), strict=False):
                self._tensors.bind(tensor, value, call.factors)
        return out

    def _let_go(self, tensor: Any) -> None:
        """Notes that a tensor is handed to other code."""
        self._left = self._left or self.get(tensor) is not None

    def _look_for_strangers(self, given: Sequence[Tensor]) -> None:
        """Takes what no call made, and the model does not hold, for made of what has left torch."""
        for tensor in given:
            known = self._tensors.get(tensor)
            if known is not None and known.fixed is not None:
                continue
            if self.get(tensor) is None and tensor.is_floating_point() and not self._tensors.is_of_model(tensor):
                value = self.tape.value(tensor.shape, self.tape.images)
                self.tape.append(Step(UNSEEN, self.tape.images, [value], None))
                self._tensors.bind(tensor, value)

    def _made(self, outs: Sequence[Tensor], given: Sequence[Tensor], *, new: bool) -> None:
        """Keeps of what constants were made: of nothing that was given, if they are new."""
        fixed = new or self._tensors.are_fixed(given)
        known = [self._tensors.get(tensor) for tensor in given]
        source = next((one.source for one in known if one is not None and one.source is not None), None)
        for tensor in outs:
            self._tensors.made(tensor, fixed)
            if source is not None and not tensor.is_floating_point():
                self._tensors.answers(tensor, source)

    def _write(self, call: Call) -> Any:
        """Runs what writes into tensors, and follows the operator that does the same without."""
        into = [tensor for name in call.overload.written for tensor in tensors_in(call[name])]
        args = call.args
        if call.overload.in_place:
            self._as_it_was(call, into[0])
        self.tape.keeper.preserve(into)
        out = call.overload.function(*args, **call.kwargs)
        call.outs = [tensor for tensor in into if _holds(call, tensor)]
        if call.outs:
            for tensor, value in zip(call.outs, rule_of(call)(call), strict=False):
                self._versions.write(tensor, value)
        return out

    def _as_it_was(self, call: Call, target: Tensor) -> None:
        """Puts a stand-in for what is written into among the arguments of a call."""
        before = target.clone() if self.tape.network is not None else target.detach()
        if call.value(target) is None:
            self._tensors.made(before, self._tensors.is_fixed(target))
        call.live = [(before if tensor is target else tensor, value) for tensor, value in call.live]
        call.args = [before if argument is target else argument for argument in call.args]


def _holds(call: Call, out: Tensor) -> bool:
    """Returns whether an output holds what the image was made into, and is no mask, index or answer."""
    if out.is_floating_point() or out.is_complex() or out.is_quantized:
        return True
    return call.name == "_to_copy" and out.dtype != torch.bool  # rounded

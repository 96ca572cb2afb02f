"""The recorder of one pass of a model: it adds a step to the tape for each ATen call on a live value.

A `TorchDispatchMode` sees each call below autograd, autocast, composite functions, `torch.jit` and
`torch.export`, and runs it unchanged. A value is *live* if it depends on the image.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitx.errors import VitxError
from vitx.models.isolation import Copied
from vitx.tape import kernels
from vitx.tape.call import FLASH, Call
from vitx.tape.overload import WRAPPED, overload, tensors_in
from vitx.tape.registry import unknown
from vitx.tape.rules import decomposition_of, rule_of
from vitx.tape.tape import Tape
from vitx.tape.tensors import ORIGINS, Tensors, flat_view, geometry, storage_of
from vitx.tape.values import Step, Value
from vitx.tape.versions import Versions

SQUASHING = frozenset(("_softmax", "softmax", "sigmoid"))  # turn logits into probabilities
EXPORTS = frozenset((  # hand values to code outside torch
    *(Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr),
    Tensor.untyped_storage,
))  # fmt: skip


LINEAR = torch.nn.functional.linear


class FunctionMode(TorchFunctionMode):
    """A mode that notes if live values leave torch: tensors made from them elsewhere are not constants.

    It also keeps a linear layer in one call, and `nn.MultiheadAttention` to operators that have a rule, and
    asks for the values of tensors that a subclass wraps while what it wraps is there.
    """

    def __init__(self, get: Callable[[Any], Value | None]) -> None:
        super().__init__()
        self.exported, self._get = False, get

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is LINEAR and not types and not torch.is_grad_enabled() and args and args[0].is_contiguous():
            # Otherwise it arrives as four calls. Torch 2.6 would round non-contiguous inputs differently.
            with torch._C._AutoDispatchBelowAutograd():
                return func(*args, **(kwargs or {}))
        if func in EXPORTS and self._get(args[0]) is not None:
            self.exported = True
        for tensor in tensors_in(args) if types else ():
            self._get(tensor)
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out) if types else ():
            self._get(tensor)
        return out


class Recorder(TorchDispatchMode):
    """A dispatch mode that records a pass on a tape."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = tape
        self._tensors = Tensors(tape.model)
        self._versions = Versions(tape, self._tensors)
        # The input of the last softmax or sigmoid of rows.
        self.squashed: tuple[Tensor, Value] | None = None
        self._overwritten: dict[int | None, Copied] = {}  # parameters, as they were before the pass
        self._made: Sequence[Tensor] = ()  # by the last call that was recorded: a subclass may wrap them
        self._functions = FunctionMode(self.get)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled while it records

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls inside the block."""
        compiles = "torch._dynamo" in sys.modules  # otherwise nothing can be compiled
        eager = torch.compiler.set_stance("force_eager") if compiles else nullcontext()
        try:
            with eager, self._functions, self:
                yield
            self.tape.settle()
        except NotImplementedError as error:
            if not (name := re.search(r"(?:HigherOrderOperator|HOP) (\w+)", str(error))):
                raise
            instead = " by scaled_dot_product_attention" if "flex" in name[1] else ""
            raise VitxError(
                f"the model calls {name[1]}, whose inner steps cannot be recorded: replace it{instead} for "
                "the explanation"
            ) from error
        finally:
            for copy in self._overwritten.values():
                self.tape.keeper.preserve([copy.tensor])
                copy.restore()
            self._overwritten, self._made = {}, ()

    def begin(self, image: Tensor) -> None:
        """Make a tensor live: record whatever depends on it from here on."""
        self.tape.images.append(self.tape.value(image.shape))
        self._tensors.bind(image, self.tape.images[-1])

    def get(self, tensor: Any) -> Value | None:
        """Return the value of a tensor, or of the memory that it wraps; None if that is a constant."""
        self._versions.read([tensor])
        known = self._tensors.get(tensor)
        if known is not None or not isinstance(tensor, Tensor) or storage_of(tensor) is None:
            return None if known is None else known.value
        for other, value in self._tensors.live_in(storage_of(tensor)):
            if geometry(other) == geometry(tensor):
                self._tensors.bind(tensor, value)
                return value
        return None

    def made_last(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Return the tensor that was computed from all the others; None if there is none."""
        values = [self.get(tensor) for tensor in tensors]
        for tensor, value in zip(tensors, values, strict=True):
            if value and all(one is value or (one and value.made_from(one)) for one in values):
                return tensor
        return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # the function mode is still on for calls of TorchScript
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run a call, and record it if an argument is live."""
        operator = overload(func)
        if args and type(args[0]) in WRAPPED:
            args = operator.wrapped(args)
        if operator.composite and not (operator.name == "linear" and self._is_layer(args)):
            with self:
                return func.decompose(*args, **kwargs)
        given, versions = tensors_in(*args, *kwargs.values()), self._versions
        if self._functions.exported:
            self._look_for_strangers(given)
        of_storage = operator.name == "as_strided" and self._tensors.live(given)
        if operator.views and (of_storage or (versions and versions.is_stale(args[0]))):
            out = func(*args, **kwargs)
            for tensor in tensors_in(out):
                self._tensors.bind(tensor, versions.seen(tensor))
            return out
        if versions:
            versions.read(given)
        live = self._tensors.live(given)
        into: list[Tensor] = []
        if operator.written:
            into = tensors_in(args[:1] if operator.in_place else [kwargs.get(n) for n in operator.written])
            self._copy_weights(into)
            self.tape.keeper.preserve(into)
        if not live or operator.makes_new:
            out = func(*args, **kwargs)
            new = bool(live) or operator.name.startswith("lift_fresh")  # not from the given tensors
            self._note_constants(tensors_in(out), given, new)
            return out
        named = {name: one for name, one in kwargs.items() if name not in operator.written} if kwargs else {}
        call = Call(self.tape, self._tensors, operator, args, named, live)
        if operator.in_place and into:
            self._stand_in(call, into[0])
        out = kernels.run(call) if operator.name == FLASH else func(*args, **kwargs)
        if operator.name in SQUASHING and call.live[0][0].ndim <= 2:
            self.squashed = call.live[0]
        self._made, call.outs = into or tensors_in(out), []
        for tensor in self._made:
            if tensor.is_nested:
                raise VitxError(
                    "the model computes with nested tensors, which cannot be followed: explain a version "
                    "of it that pads them"
                )
            if _holds(call, tensor):
                call.outs.append(tensor)
            if not tensor.is_floating_point():
                self._tensors.of(tensor).source = live[0][1]
        for tensor, value in zip(call.outs, self._follow(call) if call.outs else (), strict=False):
            if into:
                versions.write(tensor, value)
            else:
                self._tensors.bind(tensor, value, call.factors)
        return out

    def _follow(self, call: Call) -> list[Value]:
        """Return the values of the outputs of a call, by its rule or by those of its decomposition."""
        rule = rule_of(call)
        decomposition = decomposition_of(call) if rule is unknown else None
        if decomposition is None:
            return rule(call)
        if call.overload.in_place:
            for tensor, value in call.live:
                self._tensors.bind(tensor, value)
        try:
            with self:
                made = tensors_in(decomposition(*call.args, **call.kwargs))
        except Exception:  # it does not support this dtype
            return unknown(call)
        outs = [tensor for tensor in made if _holds(call, tensor)]
        if len(outs) != len(call.outs):
            return unknown(call)
        return [self.get(tensor) or self.tape.constant(tensor) for tensor in outs]

    def _is_layer(self, args: Sequence[Any]) -> bool:
        """Return whether weight and bias are those of a linear layer, and do not depend on the image."""
        if self._versions:
            self._versions.read([one for one in args[1:] if one is not None])
        return args[1].ndim == 2 and not self._tensors.live(args[1:])

    def _note_constants(self, outs: Sequence[Tensor], given: Sequence[Tensor], new: bool) -> None:
        """Note the origin of constants, and the live value that masks and indices were computed from."""
        known = [self._tensors.get(tensor) for tensor in given]
        source = next((one.source for one in known if one and one.source), None)
        origins = [self._tensors.origin(one) for one in given if one.is_floating_point() and not new]
        origin = max(origins, key=ORIGINS.index, default=ORIGINS[0])
        for tensor in outs:
            self._tensors.of(tensor).origin = origin
            if source and not tensor.is_floating_point():
                self._tensors.of(tensor).source = source

    def _stand_in(self, call: Call, target: Tensor) -> None:
        """Let the rule of an in-place operator see a stand-in for its target."""
        # Rules may read a constant target later, as the offset of a linear operator.
        constant = call.value(target) is None
        copied = self.tape.network is not None or (constant and call.name != "copy")
        before = target.clone() if copied else target.detach()
        if constant:
            self._tensors.of(before).origin = self._tensors.origin(target)
        call.live = [(before if tensor is target else tensor, value) for tensor, value in call.live]
        call.args = [before if argument is target else argument for argument in call.args]

    def _copy_weights(self, into: Sequence[Tensor]) -> None:
        """Copy the parameters that are about to be written into."""
        for tensor in into:
            if self._tensors.is_weight(tensor):
                self._overwritten.setdefault(storage_of(tensor), Copied(flat_view(tensor)))

    def _look_for_strangers(self, given: Sequence[Tensor]) -> None:
        """Treat tensors from neither a call nor the model as computed from the values that left torch."""
        for tensor in given:
            known = self._tensors.get(tensor)
            ours = (known and known.origin) or self._tensors.is_of_model(tensor)
            if not ours and tensor.is_floating_point() and self.get(tensor) is None:
                images = [*self.tape.images]
                value = self.tape.value(tensor.shape, images)
                self.tape.append(Step("code that torch does not show", images, [value], None))
                self._tensors.bind(tensor, value)


def _holds(call: Call, out: Tensor) -> bool:
    """Return whether an output carries image content, unlike a mask, an index or the result of a test."""
    if out.is_floating_point() or out.is_complex() or out.is_quantized:
        return True
    return call.name == "_to_copy" and out.dtype != torch.bool  # rounded

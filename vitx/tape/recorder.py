"""Records one pass of a model: a step on the tape for each ATen call on a live value.

A `TorchDispatchMode` sees each call below autograd, autocast, composite functions, `torch.jit` and
`torch.export`, and runs it as it is. A value is *live* if it depends on the image. Values are versions:
where a storage is written into, its other views are stale, and reading one is a step of its own.
"""

import re
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from vitx.errors import VitxError
from vitx.tape import axes as ax
from vitx.tape import kernels
from vitx.tape.call import Call, Overload, overload, tensors_in
from vitx.tape.expanded import reshaped
from vitx.tape.leaving import Leaving
from vitx.tape.rules import rule_of
from vitx.tape.storages import Geometry, geometry, in_order, lay, moved, overlap, pick, storage_of
from vitx.tape.tape import Tape
from vitx.tape.values import Step, Value, after

UNSEEN = "code that torch does not show"
FACTORIES = (  # which take nothing but a shape and a type
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "zeros_like", "ones_like"),
    *("full_like", "empty_like", "rand_like", "randn_like", "randint_like", "empty_permuted"),
)


class Live(NamedTuple):
    """What is known of a live tensor as long as there is one.

    Attributes:
        tensor: a reference to it.
        value: its value.
        stamp: how many values there were when it got this one.
        factors: what it is the product of, with their values; None for constants.
    """

    tensor: "weakref.ref[Tensor]"
    value: Value
    stamp: int
    factors: Sequence[tuple[Tensor, Value | None]] | None = None


class Version(NamedTuple):
    """What a storage holds since it was written into.

    Attributes:
        storage: a reference to it.
        value: of the tensor that lies in it.
        geometry: how that lies in it.
        stamp: as for `Live`.
        part: what was written last, and where; None if that is all.
        before: what it held before that.
    """

    storage: StorageWeakRef
    value: Value
    geometry: Geometry
    stamp: int
    part: tuple[Value, Geometry] | None = None
    before: "Version | None" = None


class Recorder(TorchDispatchMode):
    """Writes a pass onto a tape."""

    def __init__(self, tape: Tape) -> None:
        """Begins with an empty tape."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = tape
        self._live: dict[int, Live] = {}
        self._made: dict[int, tuple[weakref.ref[Tensor], bool]] = {}  # constants, and whether any was learned
        self._answers: dict[int, tuple[weakref.ref[Tensor], Value]] = {}
        self._versions: dict[int, Version] = {}
        self._stamp = 0
        self._left = False  # whether a live value was handed to other code
        self._buffers = {storage_of(buffer) for buffer in tape.model.buffers()}
        self._own: set[int | None] = self._buffers | {
            storage_of(parameter) for parameter in tape.model.parameters()
        }

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records what its block runs."""
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # else nothing can be compiled
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(Leaving(self._let_go))
            stack.enter_context(self)
            try:
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
        self._bind(image, value)

    def get(self, tensor: Any) -> Value | None:
        """Returns the value of a tensor; None if it does not depend on the image."""
        found = self._live.get(id(tensor))
        live = found if found is not None and found.tensor() is tensor else None
        if self._versions and isinstance(tensor, Tensor):
            version = self._version(tensor) if self._is_stale(tensor) else None
            if version is not None:
                return self._read(tensor, version)
        return None if live is None else live.value

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
        known = overload(func)
        if known.composite:
            with self:
                return func.decompose(*args, **kwargs)
        given = list(tensors_in(args, kwargs))
        if self._left:
            self._look_for_strangers(given)
        if self._versions and known.views and self._is_stale(args[0]):
            out = func(*args, **kwargs)
            for view in tensors_in(out):
                self.get(view)  # read from what the storage holds now
            return out
        live = [(tensor, value) for tensor in given if (value := self.get(tensor)) is not None]
        if not live or known.name in FACTORIES:
            out = func(*args, **kwargs)
            self._remember(out, given if not live and not known.name.startswith("lift_fresh") else [])
            self._answered(out, next((a for t in given if (a := self._answer_of(t)) is not None), None))
            return out
        call = Call(
            self.tape,
            known,
            args,
            kwargs,
            live,
            self._is_fixed,
            self._factors_of,
            self._answer_of,
            self._is_passing,
        )
        if known.written:
            return self._write(call)
        out = kernels.run(call)
        self._answered(out, live[0][1])
        call.outs = [t for t in tensors_in(out) if _holds(known, t)]
        if known.name == "as_strided":
            self._bind(out, self._from_storage(out, self._flat(out)))
        elif call.outs:
            for tensor, value in zip(call.outs, rule_of(call)(call), strict=False):
                self._bind(tensor, value, call.factors)
        return out

    def _let_go(self, tensor: Any) -> None:
        """Notes that a tensor is handed to other code."""
        self._left = self._left or self.get(tensor) is not None

    def _bind(
        self, tensor: Tensor, value: Value, factors: Sequence[tuple[Tensor, Value | None]] | None = None
    ) -> None:
        """Says which value a tensor has from now on."""
        key, live = id(tensor), self._live
        self._stamp += 1

        def forget(reference: Any) -> None:
            if key in live and live[key].tensor is reference:
                del live[key]

        live[key] = Live(weakref.ref(tensor, forget), value, self._stamp, factors)

    def _factors_of(self, tensor: Tensor) -> Any:
        found = self._live.get(id(tensor))
        return found.factors if found is not None and found.tensor() is tensor else None

    def _is_passing(self, tensor: Tensor) -> bool:
        """Returns whether a weight does not lie where the model keeps its own."""
        return storage_of(tensor) not in self._own

    def _answered(self, out: Any, value: Value | None) -> None:
        """Keeps of which value masks and indices were made."""
        if value is not None:
            for tensor in tensors_in(out):
                if not tensor.is_floating_point():
                    self._answers[id(tensor)] = weakref.ref(tensor), value

    def _answer_of(self, tensor: Tensor) -> Value | None:
        found = self._answers.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def _remember(self, out: Any, given: Sequence[Tensor]) -> None:
        """Keeps which constants were made in the pass, and whether of anything that was learned."""
        fixed = all(self._is_fixed(t) for t in given if t.is_floating_point())
        for tensor in tensors_in(out):
            self._made[id(tensor)] = weakref.ref(tensor), fixed

    def _is_fixed(self, tensor: Tensor) -> bool:
        """Returns whether a constant was not learned: made of nothing that was, or a buffer."""
        found = self._made.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        return bool(self._buffers) and storage_of(tensor) in self._buffers

    def _look_for_strangers(self, given: Sequence[Tensor]) -> None:
        """Takes what no call made, and the model does not hold, for made of what has left torch."""
        for tensor in given:
            made = self._made.get(id(tensor))
            known = (made is not None and made[0]() is tensor) or self.get(tensor) is not None
            if known or not tensor.is_floating_point() or storage_of(tensor) in self._own:
                continue
            value = self.tape.value(tensor.shape, self.tape.images)
            self.tape.append(Step(UNSEEN, self.tape.images, [value], None))
            self._bind(tensor, value)

    # ---- what writes in place

    def _write(self, call: Call) -> Any:
        """Runs what writes into tensors, and follows the operator that does the same without."""
        into = [t for name in call.overload.written for t in tensors_in(call[name])]
        args = call.args
        if call.overload.name == call.overload.function._schema.name[6:-1] and into:  # in place
            call.args, call.live = self._as_it_was(call, into[0])
        self.tape.keeper.preserve(into)
        out = call.overload.function(*args, **call.kwargs)
        call.outs = [t for t in into if _holds(call.overload, t)]
        if call.outs:
            values = rule_of(call)(call)
            for tensor, value in zip(call.outs, values, strict=False):
                self._store(tensor, value)
        return out

    def _as_it_was(self, call: Call, target: Tensor) -> tuple[Sequence[Any], list[tuple[Tensor, Value]]]:
        """Returns the arguments with a stand-in for the one that is written into."""
        before = target.clone() if self.tape.network is not None else target.detach()
        live = [(before if tensor is target else tensor, value) for tensor, value in call.live]
        if not any(tensor is before for tensor, _ in live):
            self._made[id(before)] = weakref.ref(before), self._is_fixed(target)
        args = [before if argument is target else argument for argument in call.args]
        return args, live

    def _store(self, tensor: Tensor, value: Value) -> None:
        """Notes that a tensor was written into: all that shares its storage is stale."""
        storage, where = tensor.untyped_storage(), geometry(tensor)
        reference = StorageWeakRef(storage)
        version = Version(reference, value, where, self._stamp)
        if tensor.numel() * tensor.element_size() < storage.nbytes():
            flat = self._flat(tensor)
            everywhere: Geometry = (tuple(flat.shape), (1,), 0)
            before = self._version(tensor) or Version(reference, flat, everywhere, self._stamp)
            held = self._placed(flat, value, where)
            version = Version(reference, held, everywhere, self._stamp, (value, where), before)
        self._versions[storage._cdata] = version
        self._bind(tensor, value)

    def _version(self, tensor: Tensor) -> Version | None:
        key = storage_of(tensor)
        version = None if key is None else self._versions.get(key)
        if version is not None and version.storage.expired():
            del self._versions[key]  # type: ignore[arg-type]
            return None
        return version

    def _is_stale(self, tensor: Any) -> bool:
        """Returns whether the storage of a tensor was written into since it got its value."""
        version = self._version(tensor) if isinstance(tensor, Tensor) else None
        live = self._live.get(id(tensor))
        known = live is not None and live.tensor() is tensor
        return version is not None and (not known or live.stamp < version.stamp)  # type: ignore[union-attr]

    def _flat(self, tensor: Tensor) -> Value:
        """Returns the value of all that lies in a tensor's storage, (n,), before it is written into."""
        storage = tensor.untyped_storage()
        shape = (storage.nbytes() // tensor.element_size(),)
        version = self._version(tensor)
        if version is not None:
            return self._flattened(version.value, version.geometry, shape)
        inside = [
            (one, live.value)
            for live in list(self._live.values())
            if (one := live.tensor()) is not None and storage_of(one) == storage._cdata
        ]
        whole = next((v for one, v in inside if one.numel() == shape[0]), None)
        if whole is not None:
            holder = next(one for one, v in inside if v is whole)
            return self._flattened(whole, geometry(holder), shape)
        base = self.tape.constant(
            tensor.as_strided(shape, (1,), 0).clone() if self.tape.accounts else None, shape
        )
        for one, value in sorted(inside, key=lambda pair: pair[0].numel()):
            base = self._placed(base, value, geometry(one))
        return base

    def _placed(self, base: Value, value: Value, where: Geometry) -> Value:
        """Returns the value of a storage, (n,), with something written into it."""
        whole = self.tape.value(base.shape, [base, value])

        def back(arrived: list[Tensor]) -> list[Tensor]:
            rest = arrived[0].clone()
            part = pick(rest, where).clone()
            pick(rest, where).zero_()
            return [rest, part]

        self.tape.append(Step("write", [base, value], [whole], back, back))
        return whole

    def _flattened(self, value: Value, where: Geometry, shape: tuple[int, ...]) -> Value:
        """Returns a value that fills its storage as that, (n,)."""
        if tuple(value.shape) == shape and where[2] == 0:
            return value
        flat = self.tape.value(shape, [value])
        flat.roots, flat.open = value.roots, value.open

        def back(arrived: list[Tensor]) -> list[Tensor]:
            return [pick(arrived[0].contiguous(), where)]

        straight = tuple(value.shape) == tuple(where[0]) and in_order(where)
        axes = (lambda of: ax.reshaped(of[0], shape)) if straight else None
        self.tape.append(Step("view", [value], [flat], back, back, axes=axes))
        return flat

    def _read(self, tensor: Tensor, version: Version) -> Value:
        """Returns the value of a tensor whose storage was written into since."""
        where = geometry(tensor)
        size = (tensor.untyped_storage().nbytes() // tensor.element_size(),)
        while version.part is not None and version.before is not None:
            if where == version.part[1]:
                self._bind(tensor, version.part[0])
                return version.part[0]
            if overlap(where, version.part[1], size[0]):
                break
            version = version.before  # what was written lies elsewhere
        value = version.value
        if (
            where != version.geometry
            and in_order(where)
            and in_order(version.geometry)
            and value.shape.numel() == size[0]
        ):
            value = self._reshaped(tensor, value)
        elif where != version.geometry:
            value = self._from_storage(tensor, self._flattened(value, version.geometry, size))
        self._bind(tensor, value)
        return value

    def _reshaped(self, tensor: Tensor, value: Value) -> Value:
        """Returns the value of a tensor that holds the same elements in the same order."""
        found, before, shape = self.tape.value(tensor.shape, [value]), value.shape, tuple(tensor.shape)

        def back(r: Tensor) -> Tensor:
            return reshaped(r, before)

        def into(arrived: list[Tensor]) -> list[Tensor]:
            return [back(arrived[0])]

        self.tape.append(
            Step("view", [value], [found], into, into, axes=lambda of: ax.reshaped(of[0], shape))
        )
        found.roots, found.open, found.fan, found.place = value.roots, value.open, value.fan, value.place
        found.sum, found.via = value.sum, after(back, value.via)
        return found

    def _from_storage(self, tensor: Tensor, flat: Value) -> Value:
        """Returns the value of a tensor from that of all that lies in its storage."""
        where, size = geometry(tensor), flat.shape
        if flat.is_constant:
            return self.tape.constant(tensor.clone() if self.tape.accounts else None, tensor.shape)
        value = self.tape.value(tensor.shape, [flat])
        value.roots = flat.roots

        def back(arrived: list[Tensor]) -> list[Tensor]:
            return [lay(arrived[0], where, size)]

        self.tape.append(Step("read", [flat], [value], back, back, axes=lambda of: moved(of[0], where)))
        return value


def _holds(known: Overload, out: Tensor) -> bool:
    """Returns whether an output holds what the image was made into, and is no mask, index or answer."""
    rounded = known.name == "_to_copy" and out.dtype != torch.bool
    return out.is_floating_point() or out.is_complex() or out.is_quantized or rounded

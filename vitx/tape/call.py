"""One ATen call: its arguments by name, their values, and its transpose."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.tape.axes import Axes
from vitx.tape.overload import Overload, overload, tensors_in
from vitx.tape.tape import Tape
from vitx.tape.tensors import Factors, Kept, Tensors
from vitx.tape.values import AxesOf, Back, Step, Value


@dataclass(eq=False)
class Call:
    """A call that ran with at least one live argument."""

    tape: Tape
    tensors: Tensors
    overload: Overload
    args: Sequence[Any]
    kwargs: Mapping[str, Any]  # without those that it only writes into
    live: Sequence[tuple[Tensor, Value]]  # the live tensors among the arguments, in order
    outs: list[Tensor] = field(default_factory=list)  # the tensors that it returned or wrote into
    factors: Factors = None  # the factors of the output, if a rule recorded them
    fused: Tensor | None = None  # A with its heads fused, if it was kept when the call ran

    def __post_init__(self) -> None:
        self.name = self.overload.name
        self.values = [value for _, value in self.live]

    def __getitem__(self, name: str) -> Any:
        """Return an argument by its name in the schema; if it was not given, its default or None."""
        place = self.overload.places.get(name)
        if place is not None and place < len(self.args):
            return self.args[place]
        return self.kwargs.get(name, self.overload.defaults.get(name))

    def value(self, tensor: Any) -> Value | None:
        """Return the value of an argument; None if it is not live."""
        for one, value in self.live:
            if one is tensor:
                return value
        return None

    @property
    def out(self) -> Tensor:
        """The first output."""
        return self.outs[0]

    @property
    def linearized(self) -> bool:
        """True if the gradient of the linearized network is recorded."""
        return self.tape.network == "linearised"

    def factors_of(self, tensor: Tensor) -> Factors:
        """Return the factors of a tensor that is an elementwise product; None if they are unknown."""
        known = self.tensors.get(tensor)
        return None if known is None else known.factors

    def kept(self, constant: Tensor) -> Kept:
        """Keep an argument as it is now, copied if the model may free it after the call."""
        if self.tensors.origin(constant) != "fixed" and not self.tensors.is_of_model(constant):
            constant = constant.detach().clone()
        return self.tape.keeper.keep(constant)

    def learned(self, weight: Tensor) -> Kept:
        """Do the same for a weight that only the gradient needs."""
        return Kept(weight.detach()) if self.tape.network is None else self.kept(weight)

    def weighs(
        self,
        constant: Tensor,
        axes: Callable[[], Axes],
        dims: Iterable[int],
        *,
        contracts: bool = False,
        widens: bool = False,
    ) -> bool:
        """Return whether a constant sets how much the elements along some dimensions count.

        A learned one does not. A given one counts as learned along channels, or if it `contracts` any, as the
        layer that merges patches does; or if it adds dimensions to a value that has no channels yet, as the
        first layer does.
        """
        origin = self.tensors.origin(constant)
        if origin != "given":
            return origin == "fixed"
        known = axes()
        begins = widens and not any(factor.channels for part in known for factor in part)
        of_channels = (factor.channels for dim in dims for factor in known[dim])
        return not begins and not (any(of_channels) if contracts else all(of_channels))

    def inner(self, function: Any, *args: Any, out: Tensor | None = None) -> "Call":
        """Return a call that is part of this one, such as the product inside an addmm."""
        live = [(tensor, value) for tensor, value in self.live if any(tensor is one for one in args)]
        return Call(
            self.tape, self.tensors, overload(function), args, {}, live, self.outs if out is None else [out]
        )

    def mask_sources(self) -> list[Value]:
        """Return the live values that masks and indices among the arguments were computed from."""
        known = map(self.tensors.get, tensors_in(*self.args, self.kwargs))
        return [one.source for one in known if one and one.source]

    def constants(self) -> list[Tensor]:
        """Return the floating-point tensors among the arguments that are not live."""
        given = tensors_in(*self.args, self.kwargs)
        return [one for one in given if one.is_floating_point() and self.value(one) is None]

    def make(
        self,
        inputs: Sequence[Value],
        relevance: Back | None,
        gradient: Back | None = None,
        *,
        sources: Sequence[Value] | None = None,
        axes: AxesOf | None = None,
        name: str | None = None,
        kind: Callable[..., Step] = Step,
        exact: bool = False,
        outs: Sequence[Tensor] = (),
    ) -> Value:
        """Add the step of this call, and return the value of its first output.

        The arguments are those of `Step`, but the gradient is that of the linearized network; if `exact`, it
        is also that of the original network. `outs` are the outputs that get a value: by default, the first.
        """
        tape, given = self.tape, self.values
        if inputs != given:
            given = [*given, *inputs]
        made = [tape.value(out.shape, given) for out in outs or self.outs[:1]]
        if tape.network is None:
            gradient = None
        elif tape.network == "plain" and not exact:
            tensors = [tensor for tensor, _ in self.live]
            sources, gradient = self.values, Transpose(self, tensors, tensors)
        tape.append(kind(name or self.name, inputs, made, relevance, gradient, sources, axes))
        return made[0]

    def make_all(
        self, inputs: Sequence[Value], relevance: Back | None, gradient: Back | None = None, **options: Any
    ) -> list[Value]:
        """Add the step of a call with several outputs, and return the values of all of them."""
        step = self.make(inputs, relevance, gradient, outs=self.outs, **options).made_by
        assert step is not None
        return step.outputs


class _Hole(int):
    """A placeholder for a tensor among the kept arguments: its number."""


class Transpose:
    """The transpose of an operator at some point: its own backward pass, run for this one call.

    It computes in float32 or float64, whatever the precision of the model.
    """

    def __init__(self, call: Call, holes: Sequence[Tensor], points: Sequence[Tensor | None]) -> None:
        """Keep the call with holes for the variables, and the point of each; None if any point will do."""
        keep, self._name = call.tape.keeper.keep, call.name
        self._holes = [(tensor.shape, tensor.is_complex()) for tensor in holes]
        self._points = [None if point is None else keep(point) for point in points]
        numbers = {id(tensor): _Hole(number) for number, tensor in enumerate(holes)}

        def emptied(value: Any) -> Any:
            if id(value) in numbers:
                return numbers[id(value)]
            return call.kept(value) if isinstance(value, Tensor) else value

        self._given = _replaced((call.args, call.kwargs), emptied)
        plain = getattr(torch.ops.aten, call.name) if call.overload.written else call.overload.function
        self._function: Callable[..., Any] = _INSTEAD.get(call.name, plain)
        if call.name == FLASH and any(tensor is call["attn_mask"] for tensor in holes):
            self._function = _attention

    def run(self, points: Sequence[Tensor]) -> list[Tensor]:
        """Run the operator again and return its floating-point outputs."""

        def filled(value: Any) -> Any:
            if isinstance(value, _Hole):
                return points[value]
            if not isinstance(value, Kept):
                return value
            given = value.tensor.clone() if value.tensor.is_inference() else value.tensor
            given = given.to(points[0].device)
            return given.to(points[0].real.dtype) if given.is_floating_point() else given

        args, kwargs = _replaced(self._given, filled)
        found = tensors_in(self._function(*args, **kwargs))
        return [one for one in found if one.is_floating_point() or one.is_complex()]

    def linear(self, points: Sequence[Tensor]) -> Tensor:
        """Run the operator and subtract the offset that the constants among its arguments add."""
        return self.at(points) - self.at_0(points)

    def at_0(self, like: Sequence[Tensor]) -> Tensor:
        """Run the operator on zeros, which leaves the offset that the constants among its arguments add."""
        return self.at([torch.zeros_like(tensor) for tensor in like])

    def at(self, points: Sequence[Tensor]) -> Tensor:
        """Run the operator without gradients and return its first output."""
        with torch.no_grad():
            return self.run(points)[0]

    def __call__(self, gradients: list[Tensor]) -> list[Tensor | None]:
        """Take gradients of the outputs to gradients of the variables.

        Raises:
            VitxError: Torch has no derivative of the operator.
        """
        try:
            return self._differentiate(gradients)
        except (NotImplementedError, RuntimeError) as error:
            if not re.search("(?i)derivative|autograd", str(error)):
                raise
            raise self._refusal() from error

    def _refusal(self) -> VitxError:
        said = f"the gradient reached {self._name}, which torch cannot differentiate"
        return VitxError(f"{said}: take a method without a gradient, such as rollout")

    def _differentiate(self, gradients: list[Tensor]) -> list[Tensor | None]:
        like = next(g for g in gradients if g is not None)
        differentiable = torch.is_grad_enabled() and any(g.requires_grad for g in gradients)
        real = like.real.dtype
        with torch.enable_grad():
            leaves = []
            for (shape, is_complex), point in zip(self._holes, self._points, strict=True):
                whole = like.new_zeros(()).expand(shape) if point is None else point.tensor.to(like.device)
                leaves.append(whole.to(real.to_complex() if is_complex else real, copy=True))
            outs = self.run([leaf.requires_grad_() for leaf in leaves])
            pairs = [(o, g) for o, g in zip(outs, gradients, strict=False) if o.requires_grad]
            if outs and not pairs:
                raise self._refusal()
            if not pairs:
                return [None] * len(leaves)
            outs, given = [out for out, _ in pairs], [g.to(o.dtype).expand(o.shape) for o, g in pairs]
            found = torch.autograd.grad(outs, leaves, given, create_graph=differentiable, allow_unused=True)
            return list(found)


def _copied(target: Tensor, source: Tensor, *_: Any, **__: Any) -> Tensor:
    return source.expand_as(target).to(target.dtype)


def _scattered(whole: Tensor, part: Tensor, *where: Any, **named: Any) -> Tensor:
    whole = whole.clone()
    whole.as_strided(*where, **named).copy_(part)
    return whole


def _attention(*operands: Any, attn_mask: Tensor, scale: float | None = None) -> Any:
    return torch.ops.aten._scaled_dot_product_attention_math(*operands[:3], attn_mask, scale=scale)


FLASH = "_scaled_dot_product_flash_attention_for_cpu"  # has no gradient of its mask
# A copy that does not write in place; a scatter with the right gradient, unlike torch's (up to 2.14).
_INSTEAD = {"copy": _copied, "as_strided_scatter": _scattered}


def _replaced(values: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(values, dict):
        return {name: _replaced(value, change) for name, value in values.items()}
    if isinstance(values, (list, tuple)) and not isinstance(values, torch.Size):
        return [_replaced(value, change) for value in values]
    return change(values)

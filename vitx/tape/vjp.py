"""The transpose of one operator: where each element of its output came from.

It is had from the operator's own backward pass, run for this one call; the model has no graph.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vitx.tape.call import Call


class _Hole(int):
    """Stands for a tensor among the arguments that are kept, by its number."""


class Transpose:
    """The transpose of an operator at some point, in float32 or float64, whatever the model computed in."""

    def __init__(self, call: "Call", holes: Sequence[Tensor], points: Sequence[Tensor | None]) -> None:
        """Keeps the call, with holes for the arguments that count: their points; None where any will do."""
        keep = call.tape.keeper.keep
        self._shapes = [tensor.shape for tensor in holes]
        self._points = [None if point is None else keep(point) for point in points]
        numbers = {id(tensor): _Hole(number) for number, tensor in enumerate(holes)}
        written = call.overload.written
        self._function: Callable[..., Any] = call.overload.function
        if written:  # the same without writing
            self._function = _copied if call.name == "copy" else getattr(torch.ops.aten, call.name)
        kwargs = {name: value for name, value in call.kwargs.items() if name not in written}
        self._given = _replaced((call.args, kwargs), lambda value: numbers.get(id(value), value))

    def run(self, points: Sequence[Tensor]) -> list[Tensor]:
        """Runs the operator anew; returns its floating-point outputs."""

        def filled(value: Any) -> Any:
            if isinstance(value, _Hole):
                return points[value]
            if isinstance(value, Tensor):
                value = value.clone() if value.is_inference() else value
                return value.to(points[0].dtype) if value.is_floating_point() else value
            return value

        args, kwargs = _replaced(self._given, filled)
        out = self._function(*args, **kwargs)
        outs = out if isinstance(out, (list, tuple)) else [out]
        return [one for one in outs if isinstance(one, Tensor) and one.is_floating_point()]

    def linear(self, points: Sequence[Tensor]) -> Tensor:
        """Runs it, and takes away what the constants among its arguments make of nothing."""
        with torch.no_grad():
            return self.run(points)[0] - self.at_0(points)

    def at_0(self, like: Sequence[Tensor]) -> Tensor:
        """Runs it on zeros: what the constants among its arguments make of nothing."""
        with torch.no_grad():
            return self.run([torch.zeros_like(tensor) for tensor in like])[0]

    def reached(self, like: Tensor) -> Tensor:
        """Returns which elements of the output depend on the arguments that count, as of a rearrangement."""
        zeros = [like.new_zeros(shape) for shape in self._shapes]
        with torch.no_grad():
            return self.run([zero + 1 for zero in zeros])[0] != self.run(zeros)[0]

    def __call__(self, gradients: list[Tensor]) -> list[Tensor | None]:
        """Takes gradients of the outputs to those of the arguments that count."""
        like = next(g for g in gradients if g is not None)
        differentiable = torch.is_grad_enabled() and any(g.requires_grad for g in gradients)
        with torch.enable_grad():
            leaves = [
                like.new_zeros(shape) if point is None else point.tensor.to(like.dtype, copy=True)
                for shape, point in zip(self._shapes, self._points, strict=True)
            ]
            outs = self.run([leaf.requires_grad_() for leaf in leaves])
            pairs = [(o, g) for o, g in zip(outs, gradients, strict=False) if o.requires_grad]
            if not pairs:
                return [None] * len(leaves)
            outs, given = [out for out, _ in pairs], [g.to(o.dtype).expand(o.shape) for o, g in pairs]
            found = torch.autograd.grad(outs, leaves, given, create_graph=differentiable, allow_unused=True)
            return list(found)


def _copied(target: Tensor, source: Tensor, *_: Any, **__: Any) -> Tensor:
    return source.expand_as(target).to(target.dtype)


def _replaced(values: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(values, dict):
        return {name: _replaced(value, change) for name, value in values.items()}
    if isinstance(values, (list, tuple)) and not isinstance(values, torch.Size):
        return [_replaced(value, change) for value in values]
    return change(values)

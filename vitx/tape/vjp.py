"""The transpose of one operator: where each element of its output came from.

It is had from the operator's own backward pass, run for this one call; the model has no graph.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vitx.tape.call import Call


class _Hole:
    """Stands for a tensor among the arguments that are kept."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class Transpose:
    """The transpose of an operator at some point, as a function of the output's gradient.

    Args of `__call__` may be float32 or float64, whatever the model computed in.
    """

    def __init__(self, call: "Call", holes: Sequence[Tensor], points: Sequence[Tensor | None]) -> None:
        """Keeps what the call needs to run again.

        Args:
            call: the call.
            holes: the arguments that count.
            points: what they are; None: any, so that the shape is enough.
        """
        self._function = _pure(call)
        self._shapes = [tensor.shape for tensor in holes]
        keep = call.tape.keeper.keep
        self._points = [None if point is None else keep(point) for point in points]
        numbers = {id(tensor): _Hole(number) for number, tensor in enumerate(holes)}
        self._args = _replaced(call.args, lambda t: numbers.get(id(t), t))
        self._kwargs = {
            name: _replaced(value, lambda t: numbers.get(id(t), t))
            for name, value in call.kwargs.items()
            if name not in call.overload.written
        }
        self._count = len(call.outs)

    @classmethod
    def plain(cls, call: "Call") -> "Transpose":
        """Returns that of a call where the model ran it, for its live arguments."""
        holes = [tensor for tensor, _ in call.live]
        return cls(call, holes, holes)

    def run(self, points: Sequence[Tensor]) -> list[Tensor]:
        """Runs the operator anew; returns its floating-point outputs."""
        out = self._function(*self._filled(self._args, points), **self._filled(self._kwargs, points))
        outs = out if isinstance(out, (list, tuple)) else [out]
        return [one for one in outs if isinstance(one, Tensor) and one.is_floating_point()]

    def linear(self, points: Sequence[Tensor]) -> Tensor:
        """Runs it, and takes away what the constants among its arguments make of nothing."""
        with torch.no_grad():
            return self.run(points)[0] - self.run([torch.zeros_like(point) for point in points])[0]

    def at_0(self, like: Sequence[Tensor]) -> Tensor:
        """Runs it on zeros: what the constants among its arguments make of nothing."""
        with torch.no_grad():
            return self.run([torch.zeros_like(tensor) for tensor in like])[0]

    def reached(self, like: Tensor) -> Tensor:
        """Returns which elements of the output depend on the arguments that count, as of a rearrangement."""
        zeros = [torch.zeros(s, dtype=like.dtype, device=like.device) for s in self._shapes]
        with torch.no_grad():
            return self.run([zero + 1 for zero in zeros])[0] != self.run(zeros)[0]

    def __call__(self, gradients: list[Tensor]) -> list[Tensor | None]:
        """Takes gradients of the outputs to those of the arguments that count."""
        like = next(g for g in gradients if g is not None)
        differentiable = torch.is_grad_enabled() and any(g.requires_grad for g in gradients)
        with torch.enable_grad():
            leaves = [self._leaf(number, like) for number in range(len(self._shapes))]
            outs = self.run(leaves)
            pairs = [(o, g) for o, g in zip(outs, gradients, strict=False) if o.requires_grad]
            if not pairs:
                return [None] * len(leaves)
            return list(
                torch.autograd.grad(
                    [out for out, _ in pairs],
                    leaves,
                    [g.to(out.dtype).expand(out.shape) for out, g in pairs],
                    allow_unused=True,
                    create_graph=differentiable,
                )
            )

    def _leaf(self, number: int, like: Tensor) -> Tensor:
        point = self._points[number]
        if point is None:
            leaf = torch.zeros(self._shapes[number], dtype=like.dtype, device=like.device)
        else:
            leaf = point.tensor.to(like.dtype, copy=True)
        return leaf.requires_grad_()

    def _filled(self, values: Any, points: Sequence[Tensor]) -> Any:
        def fill(value: Any) -> Any:
            if isinstance(value, _Hole):
                return points[value.number]
            if isinstance(value, Tensor):
                value = value.clone() if value.is_inference() else value
                return value.to(points[0].dtype) if value.is_floating_point() else value
            return value

        return _replaced(values, fill)


def _pure(call: "Call") -> Callable[..., Any]:
    """Returns what does the same without writing."""
    if not call.overload.written:
        return call.overload.function  # type: ignore[no-any-return]
    if call.name == "copy":
        return lambda target, source, *_, **__: source.expand_as(target).to(target.dtype)
    function: Callable[..., Any] = getattr(torch.ops.aten, call.name)
    return function


def _replaced(values: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(values, dict):
        return {name: _replaced(value, change) for name, value in values.items()}
    if isinstance(values, (list, tuple)) and not isinstance(values, torch.Size):
        return [_replaced(value, change) for value in values]
    return change(values)

"""Products with weights: relevance goes evenly to the input channels of the token, or to what lies under."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.call import Call
from vitx.tape.contraction import of_matmul
from vitx.tape.expanded import fitted, scaled, summed
from vitx.tape.registry import rule, unknown
from vitx.tape.rules.products import contracted
from vitx.tape.rules.sums import total_of
from vitx.tape.values import Value, counting


@rule(
    "mm", "bmm", "matmul", "mv", "dot", "addmm", "baddbmm", "addmv", "_addmm_activation", "addbmm", "linear"
)
def matmul(call: Call) -> list[Value]:
    """Follows a matrix product, and what is added to it."""
    operands = {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"), "addmv": ("mat", "vec")}
    names = operands.get(call.name) or ("self", _second(call))
    if call.name in ("addbmm", "_addmm_activation", "linear", "dot"):
        return unknown(call)
    left, right = call[names[0]], call[names[1]]
    added = call["self"] if call.name in operands else None
    alpha, beta = (1 if call[name] is None else call[name] for name in ("alpha", "beta"))
    first, second = call.value(left), call.value(right)
    if first is None and second is None:
        return [total_of(call, [(call.value(added), beta)])]  # type: ignore[list-item]
    bias = None if added is None or not beta else added
    product = (
        torch.ops.aten.mv if right.ndim == 1 else torch.ops.aten.bmm if right.ndim == 3 else torch.ops.aten.mm
    )
    part = call if added is None else call.inner(product.default, left, right)
    if first is None or second is None:
        apart = call.value(bias) is not None
        found = _weighted(
            *(part if apart else call, left, right, 1 if apart else alpha), None if apart else bias, beta
        )
    else:
        if right.ndim == 1:
            return unknown(call)
        made = contracted(part, of_matmul((left, first), (right, second), call.out.shape))
        assert made is not None
        found = made
    if bias is None and alpha == 1:
        return [found]
    of_bias = call.value(bias)
    if of_bias is not None:
        return [total_of(call, [(of_bias, beta), (found, alpha)])]
    if first is None or second is None:
        return [found]
    return [total_of(call, [(found, alpha)], [] if bias is None else [(bias, beta)])]


def _second(call: Call) -> str:
    return next(name for name in ("mat2", "other", "vec", "tensor", "weight") if name in call.overload.places)


def _weighted(call: Call, left: Tensor, right: Tensor, alpha: Any, bias: Tensor | None, beta: Any) -> Value:
    """A live value times constants: evenly where these were learned, else in proportion to them."""
    value, on_left = call.value(left), True
    if value is None:
        value, on_left = call.value(right), False
    assert value is not None
    constant = right if on_left else left
    weight = call.learned(constant)
    assert weight is not None
    weight = weight.detach()
    if call.is_fixed(constant) and weight.ndim > 1 and right.ndim != 1:
        return _mixed(call, value, weight, on_left, alpha, bias, beta)
    vector = right.ndim == 1
    dim = -1 if on_left else (-1 if vector else -2)
    size, shape = value.shape[dim], value.shape

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        r = arrived[0].unsqueeze(-1) if vector and on_left else arrived[0]
        if vector and not on_left:
            return [scaled(r.sum(-1, keepdim=True), 1 / size).expand(shape)]
        return [scaled(summed(r, [dim], keepdim=True), 1 / size).expand(shape)]

    own = [call.tape.constant(bias * beta)] if call.tape.accounts and bias is not None else []

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0]
        w = weight.to(g.dtype)
        if vector:
            found = g.unsqueeze(-1) * w if on_left else w.mT @ g
        else:
            found = g @ w.mT if on_left else w.mT @ g
        found = found if alpha == 1 else found * alpha
        return [found, *(fitted(g, o.shape) for o in own)]

    def axes(of: list[ax.Axes]) -> ax.Axes | None:
        if vector:
            return of[0][:-1] if on_left else ax.channels_at(of[0], out_shape, -1)
        return ax.channels_at(of[0], out_shape, dim)

    out_shape = tuple(call.out.shape)
    found = call.make([value], relevance, gradient, sources=[value, *own], axes=axes)
    found.fan, found.place = (size, value.roots), value.place
    _mix_heads(found, value, dim % len(shape))
    return found


def _mix_heads(found: Value, value: Value, dim: int) -> None:
    """Says that weights over any dimension but that of the softmax leave scores and A what they are."""
    if value.kind == "scores":
        found.kind = "scores"
    elif (
        value.kind == "weights" and value.along is not None and not any(f.channels for f in value.along[dim])
    ):
        found.kind, found.along = (
            "weights",
            _with_part(value.along, dim, ax.dimension(found.shape[dim], False)),
        )


def _with_part(axes: ax.Axes, dim: int, part: ax.Dimension) -> ax.Axes:
    """Returns axes with another dimension in one place."""
    return (*axes[:dim], part, *axes[dim + 1 :])


def _mixed(
    call: Call, value: Value, weight: Tensor, on_left: bool, alpha: Any, bias: Tensor | None, beta: Any
) -> Value:
    """A product with constants that no training made, as a mask, a selection or a weighted mean."""
    if value.parts is not None and counting(value.along, len(value.parts)) == len(value.shape) - (
        1 if on_left else 2
    ):
        return unknown(call)[0]  # it may add up a residual
    blind = call.tape.constant(None)
    own = [call.tape.constant(bias * beta)] if call.tape.accounts and bias is not None else []
    size = weight.abs()

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        r = arrived[0]
        over, w = (-2, size.to(r.dtype)) if on_left else (-1, size.to(r.dtype))
        whole = w.sum(over, keepdim=True)
        seen = whole > 0
        share = torch.where(seen, r / torch.where(seen, whole, 1), 0)
        return [share @ w.mT if on_left else w.mT @ share, (r * ~seen).sum()]

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g, w = arrived[0], weight.to(arrived[0].dtype) * alpha
        return [g @ w.mT if on_left else w.mT @ g, *(fitted(g, o.shape) for o in own)]

    shape = tuple(call.out.shape)
    found = call.make(
        [value, blind], relevance, gradient, sources=[value, *own], axes=lambda of: ax.resized(of[0], shape)
    )
    if value.kind in ("scores", "weights"):
        found.kind = value.kind
    return found


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "convolution_overrideable")
def convolved(call: Call) -> list[Value]:
    """Follows a convolution: evenly to the group's channels and the real pixels under each window."""
    tensor, weight = call["input"] if call["input"] is not None else call["self"], call["weight"]
    value = call.value(tensor)
    if value is None or call.value(weight) is not None:
        return unknown(call)
    groups, transposed = call["groups"], bool(call["transposed"])
    dims = weight.ndim - 2
    options = (
        call["stride"],
        call["padding"],
        call["dilation"],
        transposed,
        call["output_padding"] or [0] * dims,
    )
    blind = call.tape.constant(None)
    bias = call.learned(call["bias"])
    own = [call.tape.constant(bias.view(-1, *[1] * dims))] if call.tape.accounts and bias is not None else []
    shape, real = value.shape, value.real
    size = list(weight.shape[2:])
    tiles = (
        not transposed and real is None and list(call["stride"]) == size and not any(call["padding"])
        and all(n % k == 0 for n, k in zip(shape[2:], size, strict=True)) and set(call["dilation"]) == {1}
    )  # fmt: skip

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        r = _of_groups(arrived[0], groups)
        share, rest = (_tiled(r, size), r.new_zeros(())) if tiles else _slid(r, size, shape, real, options)
        return [_to_channels(share, shape, groups), rest]

    kept = call.learned(weight)
    assert kept is not None

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0].contiguous()
        x = torch.empty(shape, dtype=g.dtype, device=g.device)
        (found, _, _) = torch.ops.aten.convolution_backward(
            *(g, x, kept.to(g.dtype), None, *options, groups, [True, False, False])
        )
        return [found, *(fitted(g, o.shape) for o in own)]

    out_shape = tuple(call.out.shape)
    found = call.make(
        [value, blind],
        relevance,
        gradient,
        sources=[value, *own],
        axes=lambda of: ax.channels_at(ax.resized(of[0], out_shape), out_shape, 1),
    )
    if set(size) == {1}:
        _mix_heads(found, value, 1)
    return [found]


def _of_groups(r: Tensor, groups: int) -> Tensor:
    """Sums over the channels of each group, (B, groups, *size)."""
    return summed(r, [1], keepdim=True) if groups == 1 else summed(r.unflatten(1, (groups, -1)), [2])


def _to_channels(share: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """Shares out what groups have, (B, groups, *size), among their channels."""
    each = shape[1] // groups
    whole = scaled(share, 1 / each)[:, :, None].expand(-1, -1, each, *share.shape[2:])
    return (
        whole.expand(shape[0], -1, -1, *shape[2:]).flatten(1, 2) if groups > 1 else whole[:, 0].expand(shape)
    )


def _tiled(r: Tensor, size: Sequence[int]) -> Tensor:
    """Shares out what windows have that do not overlap, as in the first layer of a ViT."""
    count = 1
    for dim, length in enumerate(size):
        count *= length
        r = r.unsqueeze(3 + 2 * dim)
    shape = list(r.shape[:2])
    for dim, length in enumerate(size):
        shape += [r.shape[2 + 2 * dim], length]
    spread = scaled(r, 1 / count).expand(shape)
    return spread.reshape(*shape[:2], *(shape[2 + 2 * d] * k for d, k in enumerate(size)))


def _slid(
    r: Tensor, size: Sequence[int], shape: torch.Size, real: Tensor | None, options: Any
) -> tuple[Tensor, Tensor]:
    """Shares out what windows have evenly among the real pixels under them; some may see none."""
    one = r.new_ones(1, 1, *size)

    def slide(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten.convolution(x, one, None, *options, 1)
        return out

    inside = r.new_ones(1, 1, *shape[2:])
    if real is not None:
        inside = inside * _places(real, shape).to(r)
    under = slide(inside)
    seen = under > 0.5
    share = torch.where(seen, r / under.clamp(min=1), 0).flatten(0, 1)[:, None]
    spread = _transposed(slide, inside.expand(len(share), 1, *shape[2:]), share)
    spread = (spread * inside).unflatten(0, r.shape[:2])[:, :, 0]
    return spread, torch.where(seen, 0, r).sum()


def _places(real: Tensor, shape: torch.Size) -> Tensor:
    return real.expand(real.shape[0], real.shape[1], *shape[2:])[:1, :1]


def _transposed(function: Callable[[Tensor], Tensor], like: Tensor, r: Tensor) -> Tensor:
    with torch.enable_grad():
        x = like.detach().clone().requires_grad_()
        (found,) = torch.autograd.grad(function(x), x, r, create_graph=r.requires_grad)
    return found


@rule("quantized::linear_dynamic", "quantized::linear_dynamic_fp16", "quantized::linear_relu_dynamic")
def quantized(call: Call) -> list[Value]:
    """Follows a linear layer whose weights are whole numbers."""
    tensor, packed = call["X"], call["W_prepack"]
    value, tape = call.value(tensor), call.tape
    assert value is not None
    shape, out = value.shape, tuple(call.out.shape)
    unpack = (
        torch.ops.quantized.linear_unpack_fp16 if "fp16" in call.name else torch.ops.quantized.linear_unpack
    )
    gradient, own = None, []
    if call.linearised:
        weight = unpack(packed)[0]
        weight = weight.dequantize() if weight.is_quantized else weight.float()
        if tape.accounts:
            own = [tape.constant(call.out - tensor @ weight.mT)]  # its bias, and rounding

        def gradient_of(arrived: list[Tensor]) -> list[Tensor]:
            g = arrived[0]
            return [g @ weight.to(g.dtype), *([g] if own else [])]

        gradient = gradient_of

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        return [scaled(summed(arrived[0], [-1], keepdim=True), 1 / shape[-1]).expand(shape)]

    return [
        call.make(
            [value],
            relevance,
            gradient,
            sources=[value, *own],
            axes=lambda of: ax.channels_at(of[0], out, -1),
        )
    ]

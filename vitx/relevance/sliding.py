"""Rules of the functions that slide over a picture: convolution, pooling, padding, folding."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitx.relevance import rules
from vitx.relevance.kernels import Kernel, convolved, transposed
from vitx.relevance.live import Live, Watched
from vitx.relevance.names import Function, argument, named
from vitx.relevance.shapes import Rule


def _sizes(value: Any, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value) * (dims // len(value))


def _of_places(live: Live) -> Tensor:
    """The shadow of a feature map, thin in its channels alone."""
    return live.thin if live.thin.shape[2:] == live.shape[2:] else live.shadow


def _convolved(dims: int) -> Rule:
    def rule(watched: Watched, out: Tensor, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
        option = partial(argument, args, kwargs)
        weight, padding = option(1, "weight"), option(4, "padding", 0)
        live = watched.get(args[0])
        if live is None or len(live.shape) != dims + 2:
            return None
        kernel = list(weight.shape[2:])
        dilation = _sizes(option(5, "dilation", 1), dims)
        if padding == "valid":
            padding = 0
        elif padding == "same":
            if any((k - 1) * d % 2 for k, d in zip(kernel, dilation, strict=True)):
                return None
            padding = [(k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True)]
        stride, padding = _sizes(option(3, "stride", 1), dims), _sizes(padding, dims)
        slides = Kernel(kernel, stride, padding, dilation, option(6, "groups", 1))
        return convolved(slides, _of_places(live), out.shape, live.inside, watched.of_model(live.shape[:1]))

    return rule


def _transposed(dims: int) -> Rule:
    def rule(watched: Watched, out: Tensor, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
        def sizes(place: int, name: str, default: int) -> list[int]:
            return _sizes(argument(args, kwargs, place, name, default), dims)

        live = watched.get(args[0])
        weight = argument(args, kwargs, 1, "weight")
        if live is None or len(live.shape) != dims + 2:
            return None
        slides = Kernel(
            *(list(weight.shape[2:]), sizes(3, "stride", 1), sizes(4, "padding", 0), sizes(7, "dilation", 1)),
            groups=argument(args, kwargs, 6, "groups", 1),
        )
        end, own = sizes(5, "output_padding", 0), watched.of_model(live.shape[:1])
        return transposed(slides, _of_places(live), out.shape, end, own)

    return rule


def _pooled(dims: int) -> Rule:
    def rule(watched: Watched, out: Tensor, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
        option = partial(argument, args, kwargs)
        live = watched.get(args[0])
        if live is None or len(live.shape) != dims + 2:
            return None
        kernel = _sizes(option(1, "kernel_size", 1), dims)
        stride = _sizes(option(2, "stride") or kernel, dims)
        padding = _sizes(option(3, "padding", 0), dims)
        slides = Kernel(kernel, stride, padding, [1] * dims, groups=live.shape[1])
        return convolved(slides, _of_places(live), out.shape, live.inside, watched.of_model(live.shape[:1]))

    return rule


def _padded(watched: Watched, out: Tensor, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
    live = watched.get(args[0])
    if live is None:
        return None
    thin = _where_padded(live, args, kwargs)
    padded = F.pad(thin, *args[1:], **kwargs)
    mode = argument(args, kwargs, 2, "mode", "constant")
    if mode != "constant":
        return padded
    kwargs = {name: value for name, value in kwargs.items() if name != "value"}
    real = torch.ones(thin.shape, device=padded.device, dtype=padded.dtype)
    inside = F.pad(real, *args[1:3], **kwargs)
    return rules.filled(padded, watched.of_model(padded.shape), inside), inside[:1, :1]


def _where_padded(live: Live, args: Any, kwargs: Any) -> Tensor:
    """The shadow, thin if no dimension is padded along which it is so."""
    sides = argument(args, kwargs, 1, "pad")
    count = len(sides) // 2
    padded = [len(live.shape) - 1 - place for place in range(count) if any(sides[2 * place : 2 * place + 2])]
    return live.thin if all(live.thin.shape[dim] == live.shape[dim] for dim in padded) else live.shadow


def _folded(watched: Watched, out: Tensor, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
    """Overlapping patches are added: each has its share of what lies under it."""
    live = watched.get(args[0])
    if live is None:
        return None
    natural = F.fold(live.shadow, *args[1:], **kwargs)
    count = F.fold(torch.ones_like(live.shadow), *args[1:], **kwargs).clamp(min=1)
    return rules.follow(out.shape, lambda relevance: [relevance / count], natural)


def _unfolded(watched: Watched, out: Tensor, args: Any, kwargs: Any, inputs: list[Live]) -> Any:
    """Patches that overlap; what falls on their padding is the model's own."""
    live = watched.get(args[0])
    if live is None:
        return None
    inside = F.unfold(torch.ones_like(live.shadow), *args[1:], **kwargs)
    return rules.filled(F.unfold(live.shadow, *args[1:], **kwargs), watched.of_model(out.shape), inside)


RULES: dict[Function, Rule] = {
    **{func: _convolved(dims) for dims in (1, 2, 3) for func in named(f"conv{dims}d")},
    **{func: _transposed(dims) for dims in (1, 2, 3) for func in named(f"conv_transpose{dims}d")},
    **{func: _pooled(dims) for dims in (1, 2, 3) for func in named(f"avg_pool{dims}d")},
    **dict.fromkeys(named("pad"), _padded),
    **dict.fromkeys(named("fold"), _folded),
    F.unfold: _unfolded,
}

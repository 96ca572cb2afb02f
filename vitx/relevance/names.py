"""The torch functions by name, as far as the rules tell them apart."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[..., Any]


def named(*names: str) -> frozenset[Function]:
    """The functions of these names in torch, of a tensor, and in torch.nn.functional."""
    owners = (torch, Tensor, F, torch._C._nn, torch.special, torch.linalg)
    return frozenset(
        getattr(owner, name) for name in names for owner in owners if callable(getattr(owner, name, None))
    )


def _attributes(*names: str) -> frozenset[Function]:
    return frozenset(getattr(Tensor, name).__get__ for name in names)


SOFTMAX = named("softmax")
PRODUCTS = named("matmul", "__matmul__", "bmm", "einsum", "baddbmm")
ADDED = named("add", "add_", "__add__", "__radd__", "__iadd__", "lerp", "lerp_", "addcmul", "addcmul_")
CONVOLUTIONS = named("conv1d", "conv2d", "conv3d")
WEIGHTED = CONVOLUTIONS | PRODUCTS | named("linear", "addmm")
CASTS = named(
    *(
        "to",
        "float",
        "double",
        "half",
        "bfloat16",
        "int",
        "long",
        "short",
        "char",
        "byte",
        "type_as",
        "contiguous",
        "clone",
        "cpu",
        "cuda",
    ),
    *(
        "dropout",
        "dropout_",
        "alpha_dropout",
        "feature_dropout",
        "dropout2d",
        "as_subclass",
        "requires_grad_",
    ),
    *("nan_to_num", "positive", "__pos__", "resolve_conj", "resolve_neg", "alias"),
)
SAME = named("to", "float", "double", "type_as", "contiguous", "clone")  # values, but for their precision
POINTWISE = CASTS | named(
    *("relu", "relu_", "gelu", "silu", "silu_", "mish", "hardswish", "hardswish_", "hardsigmoid", "sigmoid"),
    *("sigmoid_", "tanh", "tanh_", "softplus", "softsign", "elu", "selu", "celu", "leaky_relu", "prelu"),
    *(
        "relu6",
        "hardtanh",
        "hardtanh_",
        "logsigmoid",
        "log_softmax",
        "erf",
        "exp",
        "exp_",
        "log",
        "log1p",
        "sqrt",
    ),
    *(
        "rsqrt",
        "square",
        "pow",
        "pow_",
        "__pow__",
        "neg",
        "__neg__",
        "abs",
        "__abs__",
        "clamp",
        "clamp_",
        "clip",
    ),
    *("clamp_min", "clamp_max", "sign", "sin", "cos", "reciprocal", "softmax", "masked_fill", "masked_fill_"),
    *(
        "layer_norm",
        "group_norm",
        "batch_norm",
        "instance_norm",
        "rms_norm",
        "normalize",
        "local_response_norm",
    ),
    *("l1_loss", "logit", "sigmoid", "threshold", "rrelu", "hardshrink", "tanhshrink", "expm1"),
)
# What turns scores into weights as a softmax does, though rows need not sum to 1.
WEIGHING = SOFTMAX | named(
    "exp", "exp_", "sigmoid", "sigmoid_", "relu", "relu_", "softplus", "elu", "hardsigmoid"
)
DIVIDED = named("div", "div_", "__div__", "__truediv__", "__itruediv__", "true_divide", "divide")
SUBTRACTED = named("sub", "sub_", "__sub__", "__isub__", "subtract")
# What takes no value from its input, and what takes from the second one nothing but its form.
CONSTANT = named(
    *(
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
    ),
    *("new_empty", "new_full", "new_tensor", "size", "bernoulli"),
)
LEAVING = named("numpy", "__array__", "tolist", "data_ptr", "__dlpack__")
REFERRING = named("to", "type_as", "view_as", "reshape_as", "expand_as")
MULTIPLIED = named("mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply")
REVERSED = named("rsub", "__rsub__", "__rdiv__", "__rtruediv__", "__rpow__")
SHAPES = named(
    *("reshape", "view", "flatten", "unflatten", "permute", "transpose", "swapaxes", "swapdims", "movedim"),
    *(
        "moveaxis",
        "t",
        "unsqueeze",
        "squeeze",
        "expand",
        "expand_as",
        "broadcast_to",
        "view_as",
        "reshape_as",
    ),
    *("repeat", "repeat_interleave", "tile", "unbind", "chunk", "split", "split_with_sizes", "tensor_split"),
    *(
        "select",
        "narrow",
        "index_select",
        "gather",
        "take_along_dim",
        "take",
        "roll",
        "flip",
        "fliplr",
        "flipud",
    ),
    *(
        "rot90",
        "unfold",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "diagonal",
        "ravel",
        "adjoint",
    ),
    *("interpolate", "upsample", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("atleast_1d", "atleast_2d", "atleast_3d", "masked_select", "hsplit", "vsplit", "unsafe_chunk"),
    *("squeeze_", "unsqueeze_", "transpose_", "permute_copy", "as_strided"),
) | _attributes("T", "mT", "H", "mH")
SHAPES = SHAPES | {Tensor.__getitem__}
JOINED = named(
    *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "where", "scatter"),
    *("index_copy", "masked_scatter", "index_put", "broadcast_tensors", "meshgrid"),
    "pad_sequence",
)
SELECTED = named(
    *("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "amax", "amin"),
    *("maximum", "minimum", "max", "min", "topk", "sort", "fmax", "fmin", "median"),
)
# What leaves a tensor the same one: the stream is still the stream.
KEEP_IDENTITY = ((SHAPES | CASTS | ADDED | SUBTRACTED | MULTIPLIED | DIVIDED) | {Tensor.__setitem__}) | named(
    "pad", "masked_fill", "masked_fill_"
)


TURNED = named("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis") | _attributes("mT")
LAID_OUT = named("reshape", "view", "flatten", "unflatten", "view_as", "reshape_as")
_OPERANDS = ("condition", "tensors", "input", "mat1", "mat2", "batch1", "batch2", "other")  # in their order
UNBOUND = named("unbind")
DIVIDED_UP = UNBOUND | named("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk")
CONCATENATED = named("cat", "concat", "concatenate")
BADDBMM = named("baddbmm")


def name_of(func: Function) -> str:
    """Returns what people call a function."""
    name = str(getattr(func, "__name__", func))
    return str(getattr(getattr(func, "__self__", None), "__name__", name)) if name == "__get__" else name


def by_place(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Brings operands that are given by name to their places.

    Example:
        >>> by_place((1,), {"other": 2, "alpha": 3})
        ((1, 2), {'alpha': 3})
    """
    named = [name for name in _OPERANDS if name in kwargs]
    rest = {name: value for name, value in kwargs.items() if name not in named}
    return (*args, *(kwargs[name] for name in named)), rest


def argument(args: Any, kwargs: Any, place: int, name: str, default: Any = None) -> Any:
    """Returns what was given for a parameter, by its place or by its name."""
    return kwargs.get(name, args[place] if len(args) > place else default)


def tensors(values: Any) -> list[Tensor]:
    """The tensors in arguments or results, in their order."""
    if isinstance(values, Tensor):
        return [values]
    found: list[Tensor] = []
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return found
    for part in values:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (list, tuple, dict)):
            found += tensors(part)
    return found


def replaced(value: Any, by: Callable[[Tensor], Any]) -> Any:
    """Arguments with other tensors in place of these."""
    if isinstance(value, Tensor):
        return by(value)
    if type(value) in (list, tuple):
        return type(value)(replaced(part, by) for part in value)
    if type(value) is dict:
        return {name: replaced(part, by) for name, part in value.items()}
    return value

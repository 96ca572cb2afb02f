"""Sees where values leave torch: what comes back is no constant of the model, though no call made it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_LEAVING = {
    *(Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr),
    Tensor.untyped_storage,
}


class Leaving(TorchFunctionMode):
    """Tells what is given to functions that hand values to other code.

    Where any function mode is on, `nn.MultiheadAttention` also keeps to operators that the tape knows.
    """

    def __init__(self, let_go: Callable[[Any], None]) -> None:
        super().__init__()
        self._let_go = let_go

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _LEAVING:
            self._let_go(args[0])
        return func(*args, **(kwargs or {}))

"""What attention did in one forward pass, seen from outside.

A `TorchFunctionMode` sees every torch function that the model calls, so no module is hooked or changed and
fused kernels stay on. Three calls make attention: `scaled_dot_product_attention`,
`multi_head_attention_forward`, and a softmax whose result multiplies the values.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vitx.attention.fused import attend
from vitx.attention.fusing import check_options
from vitx.attention.layer import Attention, DotProductAttention, StoredAttention
from vitx.attention.multihead import MultiHead
from vitx.attention.tiles import Memory
from vitx.attention.trace import Trace
from vitx.errors import VitxError
from vitx.models.prediction import check_model


@contextmanager
def capture(model: nn.Module, *, gradients: bool = False, head_fusion: str | None = None) -> Iterator[Trace]:
    """Watches the attention of one forward pass of the model.

    The model is not touched: no hooks, no flags. Its output is the same to the last bit, unless
    `head_fusion` is given: then up to rounding. So are its gradients; with `gradients=True`, they
    are so up to rounding, and cannot be differentiated again.

    Args:
        model: the model that runs inside the context.
        gradients: keep what `Trace.gradients` needs. The pass must then run with gradients enabled;
            attention that needs none (a frozen backbone) gets them.
        head_fusion: how the heads will be fused, "mean", "max" or "min", if nothing else is made of A.
            Without gradients, attention small enough is then computed by way of A, and the A that the
            trace tells may be that of the fused heads, (B, 1, N, N).

    Yields:
        The trace, to be read after the pass.

    Example:
        >>> from torch import nn
        >>> layer = nn.TransformerEncoderLayer(d_model=8, nhead=2, batch_first=True).eval()
        >>> with capture(layer) as trace:
        ...     _ = layer(torch.rand(1, 5, 8))
        >>> trace.attentions()[0].shape
        torch.Size([1, 2, 5, 5])
    """
    check_model(model)
    if head_fusion is not None:
        check_options(head_fusion)
    trace = Trace()
    watcher = _Watcher(trace, gradients, head_fusion)
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(watcher)
        yield trace


class _Watcher(TorchFunctionMode):
    """Writes what it sees into a trace."""

    def __init__(self, trace: Trace, gradients: bool, head_fusion: str | None) -> None:
        super().__init__()
        self.head_fusion = head_fusion
        self.memory = Memory()
        self.trace = trace
        self.gradients = gradients
        self._first_weight: Tensor | None = None
        self._last_value: Callable[[], Tensor | None] = lambda: None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:  # the same, and its log-sum-exp
            return self.fused(*args, **kwargs)
        out = func(*args, **kwargs)
        handle = _HANDLERS.get(func)
        if handle is not None:
            handle(self, out, *args, **kwargs)
        return out

    def fused(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`scaled_dot_product_attention`: A is recomputed from queries and keys when it is needed."""
        out, attention = attend(
            *(query, key, value, *args),
            **kwargs,
            gradients=self.gradients,
            head_fusion=self.head_fusion,
            memory=self.memory,
        )
        self._record(out, attention, value)
        return out

    def multi_head(self, out: tuple[Tensor, Tensor | None], *args: Any, **kwargs: Any) -> None:
        """`multi_head_attention_forward`: only the outer call is seen, so heads are projected anew."""
        with torch.no_grad():
            given = MultiHead(*args, **kwargs)
        projection = given.option["out_proj_weight"].detach()
        attention = DotProductAttention(
            *given.heads,
            gradients=self.gradients,
            mask=given.mask,
            # The output projection is linear: its transpose takes the gradient back to the heads.
            to_heads=lambda gradient: given.to_heads(gradient @ projection.to(gradient.dtype)),
        )
        self._record(out[0], attention, given.heads[2])

    def softmax(self, out: Tensor, input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> None:
        if out.ndim == 4 and dim in (-1, 3):
            self.trace.pending[id(out)] = out  # kept, so that ids stay unique

    def same_weights(self, out: Tensor, input: Tensor, *_: Any, **__: Any) -> None:
        """A change of type, a copy, dropout in eval mode: still the same attention."""
        if self.trace.pending.pop(id(input), None) is not None:
            self.trace.pending[id(out)] = out

    def product(self, out: Tensor, input: Any, other: Any, *operands: Any, **_: Any) -> None:
        """A matrix product; if its left side is a pending softmax, the right side is the values."""
        weights, value = (other, operands[0]) if isinstance(input, str) and operands else (input, other)
        if self.trace.pending.get(id(weights)) is None:
            return
        batch_heads_queries, keys = weights.shape[:-1], weights.shape[-1]
        if value.shape[-2] != keys or out.shape != (*batch_heads_queries, value.shape[-1]):
            return
        del self.trace.pending[id(weights)]
        attention = StoredAttention(weights.detach(), value.detach(), gradients=self.gradients)
        self._record(out, attention, value)

    def weighted(self, out: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> None:
        """A convolution or linear map: tells the patch grid, and one forward pass from the next."""
        if self._first_weight is None:
            self._first_weight = weight
        elif weight is self._first_weight and self.trace.layers:
            self.trace.passes += 1
        if out.ndim == 4 and not self.trace.layers and weight.ndim == 4:
            self.trace.grid_shape = tuple(out.shape)

    def _record(self, output: Tensor, attention: Attention, value: Tensor) -> None:
        if self.gradients:
            if not torch.is_grad_enabled():
                raise VitxError(
                    "attention ran with gradients disabled (torch.no_grad or reentrant checkpointing inside "
                    "the model): gradient methods need them"
                )
            if not output.requires_grad:
                output.requires_grad_()
        shape = attention.shape
        if len(shape) == 4 and shape[2] == 1 < shape[3]:
            self.trace.pooling.append(attention)
            return
        last = self._last_value()
        if last is not None and last.data_ptr() == value.data_ptr():
            self.trace.shared_values = True
        self._last_value = weakref.ref(value)  # kept alive, it would cost the next layer a warm cache
        self.trace.layers.append(attention)
        if self.gradients:
            self.trace.outputs.append(output)


_COPIES = (F.dropout, torch.dropout, Tensor.contiguous, Tensor.clone, torch.clone)
_CONVERSIONS = (
    *(Tensor.to, Tensor.type, Tensor.type_as),
    *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
)
_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: _Watcher.multi_head,
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _Watcher.softmax),
    **dict.fromkeys((*_COPIES, *_CONVERSIONS), _Watcher.same_weights),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.einsum), _Watcher.product),
    **dict.fromkeys((F.conv2d, F.linear), _Watcher.weighted),
}

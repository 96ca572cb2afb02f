"""A recorded forward pass: its attention, and the steps on its tape."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.isolation import without_autocast
from vitx.models.prediction import check_model
from vitx.tape.attention import Attention
from vitx.tape.overload import tensors_in
from vitx.tape.recorder import Recorder
from vitx.tape.score import NO_ATTENTION
from vitx.tape.tape import Tape
from vitx.tape.values import Value
from vitx.tape.walk import gradients


@dataclass(eq=False, repr=False)
class Trace:
    """The record of one forward pass.

    `print(trace)` lists the steps: the module that ran, the operator, the shape of its output, and the
    relevance that flowed through it, if known.
    """

    tape: Tape  # the steps of the pass and their values
    _recorder: Recorder
    relevance: dict[Value, Tensor] = field(default_factory=dict)  # empty unless a map was computed
    passes: int = 0  # that were recorded
    _outputs: list[Tensor] = field(default_factory=list)

    @property
    def self_attentions(self) -> list[Attention]:
        """The attentions between tokens, first layer first, without pooling by a single query."""
        return [one for one in self.tape.attentions if not one.weights.shape[2] == 1 < one.weights.shape[3]]

    def attentions(self) -> list[Tensor]:
        """Return A of every attention between tokens, (B, heads, N, N), first layer first."""
        self.check()
        return [layer.weights.matrix() for layer in self.self_attentions]

    def gradients(self, score: Tensor) -> list[Tensor]:
        """Return d(score) / dA of every attention between tokens, (B, heads, N, N), first layer first.

        The score is a scalar computed from the model's output, such as `logits[:, 3].sum()`, within a context
        `capture(model, gradients=True)`, or after it if autograd recorded the output.
        """
        self.check()
        if self.tape.network is None:
            raise VitxError("this pass was captured without gradients: use capture(model, gradients=True)")
        layers = self.self_attentions
        found = gradients(self.tape, self._starts(score), [layer.value for layer in layers])
        return [layer.weights.gradient(found.at(layer)) for layer in layers]

    def _starts(self, score: Tensor) -> dict[Value, Tensor]:
        """Return the gradients to start from: 1 at the score if it was seen, else those at the outputs."""
        dtype = torch.promote_types(score.dtype, torch.float32)
        if (value := self._recorder.get(score)) is not None:
            return {value: torch.ones(score.shape, dtype=dtype, device=score.device)}
        outputs = {v: t for t in self._outputs if t.requires_grad and (v := self._recorder.get(t))}
        if not score.requires_grad or not outputs:
            said = "the score does not depend on any attention that was recorded"
            raise VitxError(f"{said}: compute it from the output in the context, or with gradients enabled")
        with without_autocast(score.device):
            found = torch.autograd.grad(score, [*outputs.values()], allow_unused=True, retain_graph=True)
        return {value: g.to(dtype) for value, g in zip(outputs, found, strict=True) if g is not None}

    def check(self) -> None:
        """Raise a VitxError unless the trace is of one pass of a plain Vision Transformer."""
        if self.passes > 1:
            raise VitxError(f"the model ran {self.passes} forward passes: capture one, on a batch of images")
        shapes = [layer.weights.shape for layer in self.self_attentions]
        if not shapes:
            raise VitxError(NO_ATTENTION)
        sizes = {size for shape in shapes for size in shape[2:]}
        if len(sizes) > 1 or any(shape[0] not in self.tape.image.shape[:2] for shape in shapes):
            found = sorted({(shape[0], *shape[2:]) for shape in shapes})
            raise VitxError(
                "attention is not one N x N matrix for each image, head and layer, as it runs within windows "
                "or on several crops, or its tokens are not the same everywhere (images, queries and keys "
                f"of its layers: {found}): use vitx.explain"
            )

    def __str__(self) -> str:
        """Return a table of the steps."""
        rows = [("step", "module", "operator", "output", "relevance")]
        batch = self.tape.image.shape[0] if self.tape.images else 1
        for step in self.tape.steps:
            found = [self.relevance[v] for v in step.outputs if v in self.relevance]
            share = f"{sum(float(r.sum()) for r in found) / batch:.4f}" if found else ""
            shape = " x ".join(map(str, step.outputs[0].shape))
            rows.append((str(step.index), step.location[0] if step.location else "", step.name, shape, share))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)


@contextmanager
def capture(model: nn.Module, *, gradients: bool = False) -> Iterator[Trace]:
    """Record one forward pass of the model inside the context, and yield its trace, to be read after it.

    Its output and gradients are bit-identical to those of a pass that is not recorded. With `gradients`, the
    trace holds what `Trace.gradients` needs.

    Raises:
        VitxError: The model takes no hooks.

    Example:
        >>> from torch import nn
        >>> layer = nn.TransformerEncoderLayer(d_model=8, nhead=2, batch_first=True).eval()
        >>> with capture(layer) as trace:
        ...     _ = layer(torch.rand(1, 5, 8))
        >>> trace.attentions()[0].shape
        torch.Size([1, 2, 5, 5])
    """
    check_model(model)
    tape = Tape(model, network="plain" if gradients else None)
    recorder = Recorder(tape)
    trace = Trace(tape, recorder)

    def begin(module: nn.Module, inputs: Any, named: Any) -> None:
        trace.passes += 1
        given, by_name = ([t for t in tensors_in(one) if t.is_floating_point()] for one in (inputs, named))
        for tensor in given or by_name[:1]:  # the first keyword argument is the image: others may be masks
            if recorder.get(tensor) is None:
                recorder.begin(tensor)

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        trace._outputs += tensors_in(output.to_tuple() if hasattr(output, "to_tuple") else output)

    try:
        handles = [model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end)]
    except RuntimeError as error:
        raise VitxError("scripted code takes no hooks: call it in the forward of an nn.Module") from error
    try:
        with recorder.recording():
            yield trace
    finally:
        for handle in handles:
            handle.remove()

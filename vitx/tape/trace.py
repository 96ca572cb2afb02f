"""What a pass did, to be read: its attention, and the steps of its tape."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.isolation import without_autocast
from vitx.models.prediction import check_model
from vitx.tape.attention import NONE_FOUND, Attention
from vitx.tape.call import tensors_in
from vitx.tape.recorder import Recorder
from vitx.tape.tape import Tape
from vitx.tape.values import Value
from vitx.tape.walk import gradients


class Trace:
    """The tape of one pass, and what can be read off it.

    `print(trace)` lists the steps: the module that ran, the operator, the shape of its output, and how much
    of the relevance went through it, where that is known.

    Attributes:
        tape: the tape.
        passes: how many passes of the model were seen.
        relevance: what passed each value, if a map was made.
    """

    def __init__(self, tape: Tape, recorder: Recorder, relevance: dict[Value, Tensor] | None = None) -> None:
        self.tape, self.passes, self.relevance = tape, 0, relevance or {}
        self._recorder = recorder
        self._outputs: list[Tensor] = []

    @property
    def self_attentions(self) -> list[Attention]:
        """The attentions between tokens, first one first; no pooling by a single query."""
        return [one for one in self.tape.attentions if not one.weights.shape[2] == 1 < one.weights.shape[3]]

    def attentions(self) -> list[Tensor]:
        """Returns A of every attention between tokens, (B, heads, N, N), first layer first.

        Raises:
            VitxError: There was no attention, more than one pass, or attention that is not one N x N matrix
                for each image, head and layer.
        """
        self.check()
        return [layer.weights.matrix() for layer in self.self_attentions]

    def gradients(self, score: Tensor) -> list[Tensor]:
        """Returns d(score) / dA of every attention between tokens, (B, heads, N, N), first layer first.

        Args:
            score: a scalar computed from the model's output, as `logits[:, 3].sum()`: within the context, or
                behind it where autograd recorded the model's output.

        Raises:
            VitxError: As for `attentions`; or the pass was captured without `gradients=True`.
        """
        self.check()
        if self.tape.network is None:
            raise VitxError("this pass was captured without gradients: use capture(model, gradients=True)")
        layers = self.self_attentions
        found = gradients(self.tape, self._starts(score), [layer.value for layer in layers])
        return [layer.weights.gradient(found.at(layer)) for layer in layers]

    def _starts(self, score: Tensor) -> dict[Value, Tensor]:
        value = self._recorder.get(score)
        dtype = torch.promote_types(score.dtype, torch.float32)
        if value is not None:
            return {value: torch.ones(score.shape, dtype=dtype, device=score.device)}
        known = {v: t for t in self._outputs if (v := self._recorder.get(t)) is not None and t.requires_grad}
        if not score.requires_grad or not known:
            raise VitxError(
                "the score does not depend on any attention in a way that was seen: compute it from the "
                "model's output within the context, or with gradients enabled"
            )
        last_first = sorted(known, key=lambda value: value.number, reverse=True)
        with without_autocast(score.device):
            direct = _directly([score, *(known[value] for value in last_first)])
        return {value: g.to(dtype) for value, g in zip(last_first, direct, strict=True) if g is not None}

    def check(self) -> None:
        """Raises a VitxError unless the trace is of one pass of a plain Vision Transformer."""
        if self.passes > 1:
            raise VitxError(
                f"the model ran {self.passes} forward passes: capture one pass, on one batch of images"
            )
        if not self.self_attentions:
            raise VitxError(NONE_FOUND)
        shapes = [layer.weights.shape for layer in self.self_attentions]
        unlike = next((s for s in shapes if s[2] != s[3]), None)
        if unlike is not None:
            raise VitxError(f"{unlike[2]} queries attend to {unlike[3]} keys: there is no N x N matrix")
        if any(shape[0] not in self.tape.image.shape[:2] for shape in shapes):
            raise VitxError(
                f"attention runs within windows, or on several crops of an image (found {shapes[0]} for "
                f"images of shape {tuple(self.tape.image.shape)}): only where every token attends to every "
                "token is there one matrix for each image, head and layer"
            )
        tokens = sorted({shape[2] for shape in shapes})
        if len(tokens) > 1:
            raise VitxError(
                f"the number of tokens changes between layers (found {tokens}), as in pyramid, windowed or "
                "two-tower models: there is no one matrix size"
            )

    def __str__(self) -> str:
        """Lists the steps."""
        rows = [("step", "module", "operator", "output", "relevance")]
        batch = self.tape.image.shape[0] if self.tape.images else 1
        for step in self.tape.steps:
            value = step.outputs[0]
            found = [self.relevance[v] for v in step.outputs if v in self.relevance]
            share = f"{sum(float(r.sum()) for r in found) / batch:.4f}" if found else ""
            module = step.place[0] if step.place else ""
            shape = " x ".join(map(str, value.shape))
            rows.append((str(step.index), module, step.name, shape, share))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def _directly(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Differentiates a score by outputs of which one may be made of others: not by way of those in between.

    Args:
        tensors: the score, then the outputs, last one first.
    """
    score, *outputs = tensors
    whole = torch.autograd.grad(score, outputs, allow_unused=True, retain_graph=True)
    found: list[Tensor | None] = []
    for number, total in enumerate(whole):
        for output, g in zip(outputs[:number], found, strict=True):
            if g is not None and total is not None and output.grad_fn is not None:
                (by_way,) = torch.autograd.grad(
                    output, outputs[number], g, allow_unused=True, retain_graph=True
                )
                total = total if by_way is None else total - by_way
        found.append(total)
    return found


@contextmanager
def capture(model: nn.Module, *, gradients: bool = False) -> Iterator[Trace]:
    """Records one forward pass of the model, to read its attention.

    Its output is the same to the last bit, and so are its gradients.

    Args:
        model: the model that runs inside the context.
        gradients: keep what `Trace.gradients` needs.

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
    tape = Tape(model, network="plain" if gradients else None)
    recorder = Recorder(tape)
    trace = Trace(tape, recorder)

    def begin(module: nn.Module, inputs: Any, named: Any) -> None:
        trace.passes += 1
        given = [t for t in tensors_in(inputs) if t.is_floating_point()]
        if not given:  # by name: the first one is the image, others may be masks
            given = [t for t in tensors_in(named) if t.is_floating_point()][:1]
        for tensor in dict.fromkeys(given):
            if recorder.get(tensor) is None:
                recorder.begin(tensor)

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        parts = output.to_tuple() if hasattr(output, "to_tuple") else output
        trace._outputs += tensors_in(parts)

    handles = [model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end)]
    try:
        with recorder.recording():
            yield trace
    finally:
        for handle in handles:
            handle.remove()

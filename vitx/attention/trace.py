"""What attention did in one forward pass: the record that `vitx.attention.capture` fills."""

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from vitx.attention.layer import Attention
from vitx.errors import VitxError
from vitx.models.isolation import without_autocast


class Trace:
    """The attention calls of one forward pass, in the order in which they ran.

    Attributes:
        layers: self-attention, every token attending to every token; first layer first.
        outputs: what each layer put out, as autograd knows it; empty unless gradients were asked for.
        pooling: attention of one query over the tokens, as attention-pooling heads do.
        grid_shape: (B, channels, h, w), what the patch embedding's convolution put out, or None.
        passes: number of forward passes seen.
        pending: softmaxes over keys that have not multiplied any values.
        shared_values: whether two attentions in a row multiplied the same values.
    """

    def __init__(self) -> None:
        self.layers: list[Attention] = []
        self.outputs: list[Tensor] = []
        self.pooling: list[Attention] = []
        self.grid_shape: tuple[int, ...] | None = None
        self.passes = 1
        self.pending: dict[int, Tensor] = {}
        self.shared_values = False

    def attentions(self) -> list[Tensor]:
        """Returns A of every layer, (B, heads, N, N), first layer first; rows sum to 1.

        Raises:
            VitxError: There was no attention, more than one forward pass, or attention that is not
                one N x N matrix per image, head and layer.
        """
        self.check()
        return [layer.weights() for layer in self.layers]

    def gradients(self, score: Tensor) -> list[Tensor]:
        """Returns d(score) / dA of every layer, (B, heads, N, N), first layer first.

        Args:
            score: a scalar computed from the model's output, as `logits[:, 3].sum()`.

        Raises:
            VitxError: As for `attentions`; or the pass was captured without `gradients=True`.
        """
        self.check()
        gradients = self._output_gradients(score, self.outputs)
        pairs = zip(self.layers, gradients, self.outputs, strict=True)
        return [
            layer.weights_gradient(torch.zeros_like(output) if gradient is None else gradient)
            for layer, gradient, output in pairs
        ]

    def _output_gradients(self, score: Tensor, outputs: list[Tensor]) -> tuple[Tensor | None, ...]:
        if len(self.outputs) < len(self.layers):
            raise VitxError("this pass was captured without gradients: use capture(model, gradients=True)")
        if not score.requires_grad:
            raise VitxError(
                "the score does not depend on any attention in a differentiable way: compute it from the "
                "model's output, with gradients enabled"
            )
        # Autocast is for forward passes: left on, it would round the backward pass to half precision.
        try:
            with without_autocast(score.device):
                return torch.autograd.grad(score, outputs, allow_unused=True)
        except CheckpointError:
            raise VitxError(
                "activation checkpointing ran a block again, and differently than before: turn it off "
                "for the explanation"
            ) from None

    def check(self, batch: int | None = None) -> None:
        """Raises a VitxError unless the trace is of one pass of a plain Vision Transformer.

        Args:
            batch: the number of images; by default that of the patch embedding.
        """
        if self.passes > 1:
            raise VitxError(
                f"the model ran {self.passes} forward passes: capture one pass, on one batch of images"
            )
        if any(tensor.shape[-2] == tensor.shape[-1] for tensor in self.pending.values()):
            raise VitxError(
                "a softmax over tokens was changed before it met the values (talking heads, masks after "
                "the softmax): such attention is not supported"
            )
        if not self.layers:
            raise VitxError(
                "no attention between tokens was found: vitx explains Vision Transformers whose attention "
                "is scaled_dot_product_attention, nn.MultiheadAttention or a softmax times the values"
            )
        shapes = [layer.shape for layer in self.layers]
        if batch is None:
            batch = self.grid_shape[0] if self.grid_shape else shapes[0][0]
        if any(len(shape) != 4 or shape[0] != batch for shape in shapes):
            raise VitxError(
                f"attention runs within windows, or on several crops of an image (found shape {shapes[0]} "
                f"for {batch} images): only models in which every token attends to every token can be "
                "explained"
            )
        tokens = sorted({shape[2] for shape in shapes})
        if len(tokens) > 1:
            raise VitxError(
                f"the number of tokens changes between layers (found {tokens}), as in pyramid, windowed or "
                "two-tower models: only models with one token count can be explained"
            )
        if self.shared_values:
            raise VitxError(
                "two attention maps share the same values (differential attention): such attention is not "
                "supported"
            )

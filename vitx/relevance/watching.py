"""Watches one forward pass of a model."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from vitx.errors import VitxError, in_words
from vitx.relevance.shadow import Shadow


@contextmanager
def shadowed(
    model: nn.Module,
    image: Tensor,
    *,
    gradients: bool,
    linearised: bool,
    accounts: bool,
    head_fusion: str | None,
) -> Iterator[Shadow]:
    """Yields a shadow for the pass that begins with this image; it is to be entered for that pass alone."""

    def brought() -> Iterator[Tensor]:
        yield from model.parameters()
        yield from model.buffers()

    watched = Shadow(
        *(image, brought),
        gradients=gradients,
        linearised=linearised,
        accounts=accounts,
        head_fusion=head_fusion,
    )
    with ExitStack() as stack:
        stack.callback(watched.close)
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield watched
        except Exception as error:
            if type(error).__module__ == "torch._dynamo.exc":
                raise VitxError(
                    "the model compiles a part of itself as it runs, where nothing can be seen, as flex "
                    "attention does: let it attend by scaled_dot_product_attention for the explanation"
                ) from error
            if gradients and isinstance(error, NotImplementedError) and "backward" in str(error):
                said = in_words(error).splitlines()[0]
                raise VitxError(
                    f"the model cannot run with gradients, which this method needs ({said}): let it attend "
                    "by scaled_dot_product_attention for the explanation"
                ) from error
            raise

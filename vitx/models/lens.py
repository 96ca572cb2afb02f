"""The logit lens: what a model's own head makes of the tokens that each block puts out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from vitx.errors import VitxError

_PARTS = ("blocks", "norm", "forward_head", "num_prefix_tokens")


class LogitLens:
    """The logits of each layer: the head on the mean of its tokens, behind the final norm.

    For models laid out as timm's Vision Transformers are: `blocks`, `norm` and `forward_head`. All tokens
    take the place of the mean, so it does not matter which of them the head pools.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the parts of the model.

        Raises:
            VitxError: It has none such.
        """
        self._owners: list[Any] = [one for one in model.modules() if all(hasattr(one, p) for p in _PARTS)]
        if not self._owners:
            raise VitxError(
                f"the layers of {type(model).__name__} cannot be scored one by one, as legrad does: it takes "
                "the blocks, norm and forward_head of timm's Vision Transformers"
            )
        self._seen: list[tuple[Any, Tensor]] = []  # whose block, and what it put out

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Keep the tokens that each block puts out in the pass inside the context."""
        owner_of = {block: owner for owner in self._owners for block in owner.blocks}

        def keep(module: nn.Module, _: Any, output: Tensor) -> None:
            if module in owner_of:
                self._seen.append((owner_of[module], output))

        handle = register_module_forward_hook(keep)  # of all modules, so that the model itself gets none
        try:
            yield
        finally:
            handle.remove()

    def logits(self) -> list[Tensor]:
        """Return the logits of each layer, (B, classes), first layer first."""
        means = [(owner, tokens.mean(1, keepdim=True)) for owner, tokens in self._seen]
        return [
            owner.forward_head(owner.norm(mean.expand(-1, owner.num_prefix_tokens + 1, -1)))
            for owner, mean in means
        ]

"""The logit lens: the model's own head, applied to the output tokens of each block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from vitx.errors import VitxError

_PARTS = ("blocks", "norm", "forward_head", "num_prefix_tokens")


@contextmanager
def watched(model: nn.Module) -> Iterator[list[tuple[Any, Tensor]]]:
    """Record the output tokens of each block, with the model that owns the block, inside the context."""
    owners: list[Any] = [one for one in model.modules() if all(hasattr(one, part) for part in _PARTS)]
    refusal = VitxError(
        f"the layers of {type(model).__name__} cannot be scored one by one, as legrad does: it takes the "
        "blocks, norm and forward_head of timm's Vision Transformers"
    )
    if not owners:
        raise refusal
    owner_of = {block: owner for owner in owners for block in owner.blocks}
    seen: list[tuple[Any, Tensor]] = []
    held: dict[Any, list[int]] = {}  # the parameters of each owner during the pass

    def keep(module: nn.Module, _: Any, output: Tensor) -> None:
        if module in owner_of:
            if not isinstance(output, Tensor):
                raise refusal
            seen.append((owner_of[module], output))
            if owner_of[module] not in held:
                held[owner_of[module]] = [*map(id, owner_of[module].parameters())]

    handle = register_module_forward_hook(keep)  # a global hook, so that the model itself gets none
    try:
        yield seen
    finally:
        handle.remove()
    if any([*map(id, owner.parameters())] != weights for owner, weights in held.items()):
        raise VitxError(
            f"{type(model).__name__} has other weights during a pass than after it, when legrad reads its "
            "head: take another method"
        )


def layer_logits(owner: Any, tokens: Tensor) -> Tensor:
    """Return the logits of a layer, (B, classes): the final norm and the head on the mean of its tokens."""
    # The mean takes the place of every token, so it does not matter which of them the head pools.
    mean = tokens.mean(1, keepdim=True).expand(-1, owner.num_prefix_tokens + 1, -1)
    logits: Tensor = owner.forward_head(owner.norm(mean))
    return logits

"""What the tokens of a model are: prefix, patch grid, and what the classifier reads.

Each library says it in its own way; this is the only place that knows them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.relevance.fusing import fuse_heads
from vitx.trace import Trace

# timm's blocks whose attentions read the same tokens; a forward pass does not show that.
_PARALLEL_BLOCKS = ("ParallelThingsBlock",)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a Vision Transformer: first the prefix, then the patches row by row.

    Attributes:
        prefix: number of tokens that are no patches (class, distillation, registers).
        grid: rows and columns of patches.
        readout: head fusion -> (N,) or (B, N), how much the classifier reads from each token.
    """

    prefix: int
    grid: tuple[int, int]
    readout: Callable[[str], Tensor]

    def patches(self, relevance: Tensor) -> Tensor:
        """Cuts the map of the patches, (B, h, w), out of the relevance of all tokens, (B, N)."""
        return relevance[:, self.prefix :].reshape(-1, *self.grid)


@dataclass(frozen=True)
class _Reading:
    """What a library's model declares: its prefix (None: not said) and what it reads out."""

    prefix: int | None
    pool: str  # "token", "distilled", "patches", "all", "token+patches", "attention"


def find_tokens(model: nn.Module, trace: Trace, images: Tensor) -> Tokens:
    """Finds the tokens of the model from what it declares and what its forward pass showed.

    Raises:
        VitxError: The token count does not fit the patches, or the pooling has no fixed read-out.
    """
    if any(type(module).__name__ in _PARALLEL_BLOCKS for module in model.modules()):
        raise VitxError(
            "the model runs several attentions side by side in each block: only models whose attentions "
            "follow one another can be explained"
        )
    count = trace.layers[0].shape[2]
    grid = _grid(model, trace, images)
    patches = grid[0] * grid[1]
    reading = next(_readings(model), None) or _Reading(None, "")
    prefix = reading.prefix
    if prefix is None and count - patches in (0, 1):
        prefix = count - patches
    if prefix is None or prefix + patches != count:
        declared = "" if prefix is None else f" and {prefix} prefix tokens"
        raise VitxError(
            f"{count} tokens do not fit a grid of {grid[0]} x {grid[1]} patches{declared}: tokens that are "
            "dropped, merged or added on the way cannot be put back into a picture"
        )
    # A declared pooling counts for more: some models also run an attention pooling that nothing reads.
    if trace.pooling and reading.pool in ("", "attention"):
        return Tokens(prefix, grid, lambda fusion: _pooled_row(trace, fusion, prefix, patches))
    row = _fixed_row(reading.pool or ("token" if prefix else "patches"), prefix, patches)
    return Tokens(prefix, grid, lambda _: row)


def _grid(model: nn.Module, trace: Trace, images: Tensor) -> tuple[int, int]:
    """The last feature map before the first attention; else the image divided by the patch size."""
    if trace.grid_shape is not None:
        return trace.grid_shape[2], trace.grid_shape[3]
    for module in model.modules():
        size = getattr(module, "patch_size", None)
        if size is not None:
            rows, columns = (size, size) if isinstance(size, int) else size
            return images.shape[2] // rows, images.shape[3] // columns
    raise VitxError(
        "no patch embedding was found (a convolution before the first attention, or a module with "
        "patch_size): the tokens cannot be put back into a picture"
    )


def _readings(model: nn.Module) -> Iterator[_Reading]:
    """Yields what each module declares, outermost first."""
    for module in model.modules():
        for declared in (_timm(module), _open_clip(module), _hugging_face(module)):
            if declared is not None:
                yield declared


def _timm(module: Any) -> _Reading | None:
    if not isinstance(getattr(module, "num_prefix_tokens", None), int) or not hasattr(module, "global_pool"):
        return None
    prefix, pool = module.num_prefix_tokens, module.global_pool
    if hasattr(module, "head_dist"):
        return _Reading(prefix, "distilled")
    if pool == "avg":
        return _Reading(prefix, "all" if getattr(module, "pool_include_prefix", False) else "patches")
    if pool in ("", None):
        return _Reading(prefix, "token" if prefix else "patches")
    return _Reading(prefix, {"token": "token", "map": "attention"}.get(pool, pool))


def _open_clip(module: Any) -> _Reading | None:
    pool = getattr(module, "pool_type", None)
    if pool is None or not hasattr(module, "class_embedding"):
        return None
    if getattr(module, "attn_pool", None) is not None:
        return _Reading(1, "attention")
    return _Reading(1, {"tok": "token", "avg": "patches", "none": "token"}.get(pool, pool))


def _hugging_face(module: Any) -> _Reading | None:
    kind = getattr(getattr(module, "config", None), "model_type", None)
    if not isinstance(kind, str):
        return None
    classifies = hasattr(module, "classifier")
    if kind == "deit":
        return _Reading(2, "distilled" if hasattr(module, "distillation_classifier") else "token")
    if kind.startswith("dinov2"):
        registers = getattr(module.config, "num_register_tokens", 0)
        return _Reading(1 + registers, "token+patches" if classifies else "token")
    if kind == "dinov3_vit":
        return _Reading(1 + module.config.num_register_tokens, "token")
    if kind in ("beit", "data2vec-vision"):
        return _Reading(1, "patches" if module.config.use_mean_pooling else "token")
    if kind.startswith("siglip") and classifies:
        return _Reading(0, "patches")
    if kind.startswith(("clip", "metaclip")) and classifies:
        return _Reading(1, "patches")
    return _Reading(None, "")


def _fixed_row(pool: str, prefix: int, patches: int) -> Tensor:
    row = torch.zeros(prefix + patches, dtype=torch.float64)
    if pool == "token":
        row[0] = 1
    elif pool == "distilled":
        row[:2] = 1 / 2
    elif pool == "patches":
        row[prefix:] = 1 / patches
    elif pool == "all":
        row[:] = 1 / len(row)
    elif pool == "token+patches":
        row[0] = 1 / 2
        row[prefix:] = 1 / (2 * patches)
    else:
        raise VitxError(
            f"the model pools its tokens by {pool!r}, which reads no fixed share of each token: only "
            "token, average and attention pooling can be explained"
        )
    return row


def _pooled_row(trace: Trace, head_fusion: str, prefix: int, patches: int) -> Tensor:
    """The attention of an attention-pooling head over the tokens, (B, N)."""
    if len(trace.pooling) > 1:
        raise VitxError(
            f"{len(trace.pooling)} attentions with a single query were found: only one, the pooling of the "
            "tokens, can be explained"
        )
    row = fuse_heads(trace.pooling[0].weights(), head_fusion)[:, 0]
    if row.shape[1] == patches:
        return nn.functional.pad(row, (prefix, 0))
    if row.shape[1] != prefix + patches:
        raise VitxError(f"the pooling attends to {row.shape[1]} of {prefix + patches} tokens")
    return row

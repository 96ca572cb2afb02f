"""The preprocessing of a model: declared by it, by its folder, or given instead."""

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from vitx.errors import VitxError
from vitx.inputs.preprocessing import Preprocessing, channels_taken, declared, of_open_clip

_UNKNOWN = (
    "the model does not say how it wants its images (timm's do): give a tensor (B, C, H, W), or in the "
    "shell --input-options size=PIXELS mean=V std=V"
)


def preprocessing_of(
    model: nn.Module,
    *,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep_aspect: bool = False,
) -> Preprocessing:
    """Return the preprocessing that a model declares (timm's, and modules that hold one).

    A size (height and width), a mean and a std of each channel stand in place of those declared. Where the
    aspect is kept, the whole image keeps its proportions.
    """
    from timm.data import resolve_data_config

    config = declared(model, "input_size")
    if config is None and None in (size, mean, std):
        saved = None
        if "transformers" in sys.modules:
            from vitx.inputs.processors import saved_processor

            saved = saved_processor(model)
        configs = (getattr(part, "preprocess_cfg", None) for part in model.modules())
        of_clip = next((of_open_clip(one) for one in configs if isinstance(one, dict)), None)
        if (found := saved or of_clip) and not keep_aspect and (size, mean, std) == (None, None, None):
            return found
        raise VitxError(_UNKNOWN)
    known = resolve_data_config(pretrained_cfg=dict(config or {"crop_pct": 1.0}))  # else the whole image
    holder = next((part for part in model.modules() if getattr(part, "patch_embed", None) is not None), None)
    embedding: Any = getattr(holder, "patch_embed", None)
    if keep_aspect and not getattr(holder, "dynamic_img_size", False):
        said = "the model takes images of one size only"
        raise VitxError(f"{said}: make it with dynamic_img_size=True to keep proportions")
    own = getattr(embedding, "img_size", None) or known["input_size"][1:]
    if any(value <= 0 for value in std or ()):
        raise VitxError(f"std must be above 0, found {list(std or ())}")
    taken = channels_taken(model)
    return Preprocessing(
        size=(size, size) if size else (int(own[0]), int(own[1])),
        mean=_channels("mean", mean or known["mean"], taken),
        std=_channels("std", std or known["std"], taken),
        interpolation=known["interpolation"],
        crop_pct=known["crop_pct"],
        crop_mode=known["crop_mode"],
        multiple=int(max(embedding.patch_size)) if keep_aspect else 1,
        keep_aspect=keep_aspect,
    )


def _channels(name: str, values: Sequence[float], taken: int) -> tuple[float, ...]:
    """Return one value for each channel; for a single one, the mean of those declared for three."""
    values = tuple(float(value) for value in values)
    if taken == 1 and len(values) == 3:
        values = (sum(values) / 3,)
    if len(values) == 1:
        values *= taken
    if len(values) != taken:
        raise VitxError(
            f"{name} has {len(values)} values, and the model takes {taken} channels: give a tensor "
            f"(B, C, H, W), or in the shell --input-options {name}=V with one value for each, or one for all"
        )
    return values

"""Models of open_clip, with their image preprocessing and their tokenizer."""

from pathlib import Path
from typing import Any

from torch import nn

from vitx.errors import VitxError, in_words
from vitx.inputs.preprocessing import Preprocessing, of_open_clip
from vitx.models.checkpoints import fill, read_weights, without_prefix


def load_open_clip(
    name: str, weights: Path | None, trust: bool = False
) -> tuple[nn.Module, Preprocessing, Any]:
    """Make a model of open_clip.

    Args:
        name: of its architecture, as `ViT-B-32`.
        weights: a file of its weights; None: those of its name, as `hf-hub:org/model` has some.
        trust: read also files that run code as they are read.

    Returns:
        The model, how it wants its images, and its tokenizer.

    Raises:
        VitxError: open_clip is not there, or knows no such model, or these are no weights of it.
    """
    try:
        import open_clip
    except ImportError as error:
        raise VitxError("models of open_clip need it: pip install open_clip_torch") from error
    if weights is None and not name.startswith(("hf-hub:", "local-dir:")):
        raise VitxError(f"say which weights {name} is to have: --weights FILE")
    try:
        model = open_clip.create_model(name)
        tokenizer = open_clip.get_tokenizer(name)
        wanted = open_clip.get_model_preprocess_cfg(model)
    except Exception as error:  # whatever it does as it is made
        raise VitxError(f"open_clip cannot make {name}: {in_words(error)[:200]}") from error
    if weights is not None:
        fill(model, without_prefix(read_weights(weights, trust), model.state_dict()), weights)
    prepare = of_open_clip(wanted)
    if prepare is None:
        raise VitxError(f"{name} wants its images padded, which vitx does not: give tensors, in Python")
    return model, prepare, tokenizer

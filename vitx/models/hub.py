"""Models of Hugging Face's transformers, with the image processor that is saved beside them."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from vitx.errors import VitxError
from vitx.inputs.preprocessing import Preprocessing
from vitx.inputs.processors import load_processor, quiet
from vitx.models.classes import declared_names
from vitx.models.network import hub


def load_hugging_face(
    name: str, trust: bool = False
) -> tuple[nn.Module, Preprocessing, tuple[str, ...] | None]:
    """Loads a model that classifies images or clips.

    Args:
        name: of a folder, or on the hub.
        trust: run also code that comes with the model.

    Returns:
        The model, how it wants its images or clips, and the names of its classes, if it has any.

    Raises:
        VitxError: transformers is not there, or the hub is not, or there is no such model, or it has no
            trained head.
    """
    with nullcontext(True) if Path(name).is_dir() else hub() as answers:
        try:
            return _load(name, trust)
        except VitxError as error:
            if answers or not isinstance(error.__cause__, OSError):
                raise
            raise VitxError(
                f"{name} could not be fetched from the hub, which does not answer: check the connection, or "
                "give the folder of a model"
            ) from error


def _load(name: str, trust: bool) -> tuple[nn.Module, Preprocessing, tuple[str, ...] | None]:
    try:
        import transformers
    except ImportError as error:
        raise VitxError("models of Hugging Face need transformers: pip install transformers") from error
    kinds: Any = transformers  # some without types
    with quiet():
        try:
            config = kinds.AutoConfig.from_pretrained(name, trust_remote_code=trust)
            of_clips = type(config) in kinds.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING
            known = (
                kinds.AutoModelForVideoClassification if of_clips else kinds.AutoModelForImageClassification
            )
            model, told = known.from_pretrained(name, trust_remote_code=trust, output_loading_info=True)
        except Exception as error:  # whatever the model does as it is made
            raise VitxError(
                f"{name} holds no model that classifies images or clips: {_said(error)}"
            ) from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise VitxError(
            f"{name} holds no trained model that classifies images or clips: {len(missing)} of its tensors "
            f"are missing ({missing[0]})"
        )
    frames = int(config.num_frames) if of_clips else 0
    return model, load_processor(model, name, frames, trust=trust), declared_names(model)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

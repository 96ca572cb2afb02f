"""Models of Hugging Face's transformers, with the image processor that is saved beside them."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from vitx.errors import VitxError
from vitx.inputs.preprocessing import Preprocessing
from vitx.inputs.processors import load_processor, quiet
from vitx.models.classes import declared_names
from vitx.models.network import hub

T = TypeVar("T")
_DENSE = {  # what loads models of objects and segments, and what tells which these are
    "AutoModelForObjectDetection": "MODEL_FOR_OBJECT_DETECTION_MAPPING",
    "AutoModelForSemanticSegmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING",
    "AutoModelForUniversalSegmentation": "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING",
    "AutoModelForInstanceSegmentation": "MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING",
}


def load_hugging_face(
    name: str, trust: bool = False
) -> tuple[nn.Module, Preprocessing, tuple[str, ...] | None]:
    """Loads a model that classifies images or clips, or finds objects or segments in images.

    Args:
        name: of a folder, or on the hub.
        trust: run also code that comes with the model.

    Returns:
        The model, how it wants its images or clips, and the names of its classes, if it has any.

    Raises:
        VitxError: transformers is not there, or the hub is not, or there is no such model, or it has no
            trained head.
    """
    return _reached(name, lambda: _load(name, trust))


def load_towers(name: str, trust: bool = False) -> tuple[nn.Module, Preprocessing, Any]:
    """Loads a model that compares images with texts, how it wants its images, and its tokenizer.

    Args:
        name: of a folder, or on the hub.
        trust: run also code that comes with the model.

    Raises:
        VitxError: As for `load_hugging_face`, or it has no text tower.
    """

    def load() -> tuple[nn.Module, Preprocessing, Any]:
        model = _pretrained("AutoModel", "compares images with texts", name, trust)
        if not hasattr(model, "get_text_features"):
            raise VitxError(
                f"{name} holds {type(model).__name__}, which compares no images with texts: leave out --text"
            )
        tokenizer = _pretrained("AutoTokenizer", "has a tokenizer", name, trust)
        return model, load_processor(model, name, trust=trust), tokenizer

    return _reached(name, load)


def load_answering(name: str, trust: bool = False) -> tuple[nn.Module, Any]:
    """Loads a model that answers prompts about pictures, and its processor.

    Args:
        name: of a folder, or on the hub.
        trust: run also code that comes with the model.

    Raises:
        VitxError: As for `load_hugging_face`.
    """
    what = "answers prompts about pictures"
    return _reached(
        name,
        lambda: (
            _pretrained("AutoModelForImageTextToText", what, name, trust),
            _pretrained("AutoProcessor", "has a processor", name, trust),
        ),
    )


def _reached(name: str, load: Callable[[], T]) -> T:
    """Loads what a folder holds, or the hub; says where that does not answer."""
    with nullcontext(True) if Path(name).is_dir() else hub() as answers:
        try:
            return load()
        except VitxError as error:
            if answers or not isinstance(error.__cause__, OSError):
                raise
            raise VitxError(
                f"{name} could not be fetched from the hub, which does not answer: check the connection, or "
                "give the folder of a model"
            ) from error


def _transformers() -> Any:  # some of it without types
    try:
        import transformers
    except ImportError as error:
        raise VitxError("models of Hugging Face need transformers: pip install transformers") from error
    return transformers


def _pretrained(kind: str, what: str, name: str, trust: bool) -> Any:
    """Loads something of a kind of transformers, all of whose tensors are there."""
    kinds = _transformers()
    of_model = kind.startswith("AutoModel")
    with quiet():
        try:
            options = {"output_loading_info": True} if of_model else {}
            found = getattr(kinds, kind).from_pretrained(name, trust_remote_code=trust, **options)
        except Exception as error:  # whatever the model does as it is made
            raise VitxError(f"{name} holds nothing that {what}: {_said(error)}") from error
    if not of_model:
        return found
    model, told = found
    _check_whole(name, f"model that {what}", told)
    return model


def _check_whole(name: str, what: str, told: Any) -> None:
    if missing := sorted(told["missing_keys"]):
        raise VitxError(
            f"{name} holds no trained {what}: {len(missing)} of its tensors are missing ({missing[0]})"
        )


def _load(name: str, trust: bool) -> tuple[nn.Module, Preprocessing, tuple[str, ...] | None]:
    kinds = _transformers()
    with quiet():
        try:
            config = kinds.AutoConfig.from_pretrained(name, trust_remote_code=trust)
            known = getattr(kinds, _auto_class(kinds, config))
            of_clips = known is kinds.AutoModelForVideoClassification
            model, told = known.from_pretrained(name, trust_remote_code=trust, output_loading_info=True)
        except Exception as error:  # whatever the model does as it is made
            raise VitxError(
                f"{name} holds no model that classifies images or clips: {_said(error)}"
            ) from error
    texts = " (to compare images with texts, add --text)" if hasattr(config, "text_config") else ""
    _check_whole(name, f"model that classifies images or clips{texts}", told)
    frames = int(config.num_frames) if of_clips else 0
    return model, load_processor(model, name, frames, trust=trust), declared_names(model)


def _auto_class(kinds: Any, config: Any) -> str:
    """Returns what loads a model: what its saved class does, or else one that classifies."""
    saved = (config.architectures or [""])[0]
    for name, mapping in _DENSE.items():
        found = getattr(kinds, mapping).get(type(config), None)
        if found is not None and found.__name__ == saved:
            return name
    of_clips = type(config) in kinds.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING
    return "AutoModelForVideoClassification" if of_clips else "AutoModelForImageClassification"


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

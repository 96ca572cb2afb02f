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
_CLASSES = "classifies images or clips"
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
        The model, its preprocessing of images or clips, and the names of its classes, if it has any.

    Raises:
        VitxError: transformers is not there, or the hub is not, or there is no such model, or it has no
            trained head.
    """

    def load() -> tuple[nn.Module, Preprocessing, tuple[str, ...] | None]:
        config = _pretrained("AutoConfig", _CLASSES, name, trust)
        kind = _auto_class(config)
        hint = " (to compare images with texts, add --text)" if hasattr(config, "text_config") else ""
        model = _pretrained(kind, _CLASSES + hint, name, trust)
        frames = int(config.num_frames) if kind == "AutoModelForVideoClassification" else 0
        return model, load_processor(model, name, frames, trust=trust), declared_names(model)

    return _reached(name, load)


def load_towers(name: str, trust: bool = False) -> tuple[nn.Module, Preprocessing, Any]:
    """Loads a model that compares images with texts, its preprocessing and its tokenizer.

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
    """Loads a model that answers prompts about pictures, and its processor, as `load_hugging_face`."""
    kinds = {
        "AutoModelForImageTextToText": "answers prompts about pictures",
        "AutoProcessor": "has a processor",
    }
    model, processor = _reached(name, lambda: [_pretrained(*kind, name, trust) for kind in kinds.items()])
    return model, processor


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


def _pretrained(kind: str, what: str, name: str, trust: bool) -> Any:
    """Loads something of a kind of transformers, all of whose tensors are there."""
    try:
        import transformers
    except ImportError as error:
        raise VitxError("models of Hugging Face need transformers: pip install transformers") from error
    options = {"output_loading_info": True} if kind.startswith("AutoModel") else {}
    with quiet():
        try:
            found = getattr(transformers, kind).from_pretrained(name, trust_remote_code=trust, **options)
        except Exception as error:  # whatever the model does as it is made
            said = " ".join(str(error).split())[:200]
            raise VitxError(f"{name} holds nothing that {what}: {said}") from error
    if not options:
        return found
    model, info = found
    if missing := sorted(info["missing_keys"]):
        raise VitxError(
            f"{name} holds no trained model that {what}: {len(missing)} of its tensors are missing "
            f"({missing[0]})"
        )
    return model


def _auto_class(config: Any) -> str:
    """Returns the class that loads a model: that of its saved class, or else one that classifies."""
    import transformers

    saved = (config.architectures or [""])[0]
    for name, mapping in _DENSE.items():
        found = getattr(transformers, mapping).get(type(config), None)
        if found is not None and found.__name__ == saved:
            return name
    of_clips = type(config) in transformers.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING
    return "AutoModelForVideoClassification" if of_clips else "AutoModelForImageClassification"

"""Models of Hugging Face's transformers, with the image processor that is saved beside them."""

import json
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
_BARE = "AutoModel"  # loads a model as it was saved without a head
_DENSE = {  # what loads models of objects and segments, and what tells which these are
    "AutoModelForObjectDetection": "MODEL_FOR_OBJECT_DETECTION_MAPPING",
    "AutoModelForSemanticSegmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING",
    "AutoModelForUniversalSegmentation": "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING",
    "AutoModelForInstanceSegmentation": "MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING",
}


def read_config(name: str, file: str) -> dict[str, Any]:
    """Read a file of settings of a folder, or of a model on the hub; empty where there is no such file.

    Raises:
        VitxError: There is no such model, or the hub does not answer.
    """
    path = Path(name) / file
    if not Path(name).is_dir():
        if name.count("/") != 1 or name.startswith((".", "~")) or name.endswith("/"):
            raise VitxError(f"there is no folder {name}")
        found = _reached(name, lambda: _downloaded(name, file))
        if found is None:
            return {}
        path = Path(found)
    try:
        read = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise VitxError(f"{path} could not be read: {error}") from error
    return read if isinstance(read, dict) else {}


def _downloaded(name: str, file: str) -> str | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return str(hf_hub_download(name, file))
    except LocalEntryNotFoundError as error:
        raise VitxError(f"{name} is not on this machine, and the hub was not asked for it") from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # each version of the client has its own
        raise VitxError(
            f"the hub has no model {name} for you: {' '.join(str(error).split())[:200]}"
        ) from error


def load_hugging_face(
    name: str, trust: bool = False, classes: bool = True
) -> tuple[nn.Module, Preprocessing, tuple[str, ...] | None]:
    """Load a model of images or clips: one that classifies, finds objects or segments, or has features.

    Args:
        name: of a folder, or on the hub.
        trust: run also code that comes with the model.
        classes: the model is to tell classes apart, or to have features of images alone.

    Returns:
        The model, how it wants its images or clips, and the names of its classes, if they are known; none,
        as (), where it was saved without a head.

    Raises:
        VitxError: transformers is not there, or the hub is not, or there is no such model, or it has no
            trained head.
    """

    def load() -> tuple[nn.Module, Preprocessing, tuple[str, ...] | None]:
        config = _pretrained("AutoConfig", _CLASSES, name, trust)
        kind = _auto_class(config)
        if classes and kind == _BARE and hasattr(config, "text_config"):
            raise VitxError(f"{name} compares images with texts: add --text, as in --text 'a cat' 'a dog'")
        model = _pretrained(kind, _CLASSES, name, trust)
        frames = getattr(config, "num_frames", 0) if type(config) in _of_clips() else 0
        names = () if kind == _BARE else declared_names(model)
        return model, load_processor(model, name, int(frames), trust=trust), names

    return _reached(name, load)


def load_towers(name: str, trust: bool = False) -> tuple[nn.Module, Preprocessing, Any]:
    """Load a model that compares images with texts, its preprocessing and its tokenizer.

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
    """Load a model that answers prompts about pictures, and its processor, as `load_hugging_face`."""
    kinds = {
        "AutoModelForImageTextToText": "answers prompts about pictures",
        "AutoProcessor": "has a processor",
    }
    model, processor = _reached(name, lambda: [_pretrained(*kind, name, trust) for kind in kinds.items()])
    return model, processor


def _reached(name: str, load: Callable[[], T]) -> T:
    """Load what a folder holds, or the hub; says where that does not answer."""
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
    """Load something of a kind of transformers, all of whose tensors are there."""
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
    """Return the class that loads a model: that of its saved class, or else one that classifies."""
    import transformers

    saved = (config.architectures or [""])[0]
    for name, mapping in {**_DENSE, _BARE: "MODEL_MAPPING"}.items():
        found = getattr(transformers, mapping).get(type(config), None)
        if found is not None and found.__name__ == saved:
            return name
    known = type(config) in _of_clips()
    return "AutoModelForVideoClassification" if known else "AutoModelForImageClassification"


def _of_clips() -> Any:
    """Return the configs of the models that classify clips."""
    import transformers

    return transformers.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING

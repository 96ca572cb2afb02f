"""Models loaded by name, from timm, Hugging Face, open_clip or the user's own code."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from vitx.errors import VitxError, failure
from vitx.inputs.preprocessing import Preprocessing, of_open_clip
from vitx.inputs.processors import load_processor, quiet
from vitx.models.checkpoints import create_model, fill, model_of_weights, read_weights, without_prefix
from vitx.models.classes import declared_names
from vitx.models.network import hub
from vitx.models.own import load_own

_OPEN_CLIP = "open_clip:"
_HUB = "hf-hub:"
_FOLDER = "local-dir:"
_CLASSES = "classifies images or clips"
_ADD_TEXT = "add --text, as in --text 'a cat' 'a dog'"
_BARE = "AutoModel"  # loads models without a task head
_SAVED = (  # auto classes of models other than classifiers; of several that fit, the last one loads
    _BARE,
    "AutoModelForInstanceSegmentation",
    "AutoModelForUniversalSegmentation",
    "AutoModelForSemanticSegmentation",
    "AutoModelForObjectDetection",
)


class Loaded(NamedTuple):
    """A loaded model, with its preprocessing, class names and tokenizer."""

    model: nn.Module
    prepare: Preprocessing | None = None  # None if it is to be derived from the model
    names: tuple[str, ...] | None = None  # of its classes; () if it was saved without a head
    tokenizer: Any = None


def load_named(
    name: str,
    weights: Path | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    of_timm: Mapping[str, Any] | None = None,
    trust: bool = False,
    texts: bool = False,
    classes: bool = True,
) -> Loaded:
    """Load a model by name, with weights from a file or its own pretrained weights.

    The name is one in timm (`vit_base_patch16_224`); `hf-hub:owner/name` or a folder, for transformers, timm
    or open_clip; `open_clip:ViT-B-32`; or `package.module:name`, the user's own class or function. `options`
    are arguments for timm or this code, `of_timm` for timm alone. `texts` requires a model that compares
    images with texts, `classes` one with classes. With `trust`, loading may run code from files.
    """
    name = name.replace("hf_hub:", _HUB, 1)
    if Path(name).is_file():
        raise VitxError(f"{name} is a file of weights: give it by --weights, and the model's name by --model")
    place, folder = name.removeprefix(_HUB), Path(name).is_dir()
    if folder or name.startswith(_HUB) or ("/" in name and ":" not in name):
        kind, place = _kind(place, texts), f"{_FOLDER if folder else _HUB}{place}"
    elif name.startswith(_OPEN_CLIP):
        kind, place = "open_clip", name.removeprefix(_OPEN_CLIP)
    else:
        kind = "own" if ":" in name and not name.startswith(_FOLDER) else "timm"
    if texts and kind in ("own", "timm"):
        raise VitxError(f"{name} compares no images with texts: name a CLIP, or open_clip:NAME")
    if kind == "own":
        loaded = Loaded(load_own(name, weights, options, trust))
    elif kind == "timm":
        options = {**(of_timm or {}), **(options or {})}
        if weights is None:
            loaded = Loaded(create_model(place, True, None, options))
        else:
            loaded = Loaded(model_of_weights(place, weights, options, trust))
    elif options:
        raise VitxError("--model-options are only for timm models and your own code: leave them out")
    elif kind == "open_clip":
        loaded = load_open_clip(place, weights, trust)
        if classes and not texts:
            raise VitxError(f"{name} compares images with texts: {_ADD_TEXT}")
    elif weights is not None:
        raise VitxError(f"{name} has weights of its own: leave out --weights")
    else:
        loaded = load_hugging_face(name.removeprefix(_HUB), trust, texts=texts, classes=classes)
    loaded.model.eval()
    return loaded


def _kind(place: str, texts: bool) -> str:
    """Return the library of a folder, or of a model on the hub, according to its configuration files."""
    config = read_config(place, "config.json")
    if "model_type" in config or "auto_map" in config:
        return "transformers"
    clip = "preprocess_cfg" in read_config(place, "open_clip_config.json")
    if "architecture" in config and not (clip and texts):
        return "timm"
    return "open_clip" if clip else "transformers"


def load_open_clip(name: str, weights: Path | None, trust: bool = False) -> Loaded:
    """Load an open_clip model, with weights from a file or those of a name such as `hf-hub:org/model`."""
    try:
        import open_clip
    except ImportError as error:
        raise VitxError("models of open_clip need it: pip install open_clip_torch") from error
    if weights is None and not name.startswith(("hf-hub:", "local-dir:")):
        raise VitxError(f"say which weights {name} is to have: --weights FILE")
    with failure(f"open_clip cannot make {name}"):
        model = open_clip.create_model(name)
        tokenizer = open_clip.get_tokenizer(name)
        wanted = open_clip.get_model_preprocess_cfg(model)
    if weights is not None:
        fill(model, without_prefix(read_weights(weights, trust), model.state_dict()), weights)
    prepare = of_open_clip(wanted)
    if prepare is None:
        raise VitxError(f"{name} needs padded images, which vitx does not make: give tensors, in Python")
    return Loaded(model, prepare, tokenizer=tokenizer)


def load_hugging_face(name: str, trust: bool = False, *, texts: bool = False, classes: bool = True) -> Loaded:
    """Load a transformers model from a folder or the hub; `texts` and `classes` are as for `load_named`."""
    with _reached(name):
        if texts:
            model = _pretrained(_BARE, "compares images with texts", name, trust)
            if not hasattr(model, "get_text_features"):
                kind = type(model).__name__
                raise VitxError(f"{name} holds {kind}, which compares no images with texts: leave out --text")
            tokenizer = _pretrained("AutoTokenizer", "has a tokenizer", name, trust)
            return Loaded(model, load_processor(model, name, trust=trust), tokenizer=tokenizer)
        config = _pretrained("AutoConfig", _CLASSES, name, trust)
        import transformers

        clips = type(config) in transformers.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING
        kind = "AutoModelForVideoClassification" if clips else "AutoModelForImageClassification"
        saved = (config.architectures or [""])[0]
        for auto in _SAVED:
            if getattr(transformers, auto)._model_mapping.get(type(config), object).__name__ == saved:
                kind = auto
        if classes and kind == _BARE and hasattr(config, "text_config"):
            raise VitxError(f"{name} compares images with texts: {_ADD_TEXT}")
        model = _pretrained(kind, _CLASSES, name, trust)
        frames = int(getattr(config, "num_frames", 0)) if clips else 0
        names = () if kind == _BARE else declared_names(model)
        return Loaded(model, load_processor(model, name, frames, trust=trust), names)


def load_answering(name: str, trust: bool = False) -> tuple[nn.Module, Any]:
    """Load a model that answers prompts about pictures, and its processor, from a folder or the hub."""
    with _reached(name):
        model = _pretrained("AutoModelForImageTextToText", "answers prompts about pictures", name, trust)
        return model, _pretrained("AutoProcessor", "has a processor", name, trust)


def read_config(name: str, file: str) -> dict[str, Any]:
    """Read a JSON file from a folder or from a model on the hub; empty if there is no such file."""
    path = Path(name, file) if Path(name).is_dir() else _downloaded(name, file)
    with failure(f"{path} could not be read"):
        read = json.loads(path.read_text("utf-8")) if path is not None and path.is_file() else {}
    return read if isinstance(read, dict) else {}


def _downloaded(name: str, file: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if name.count("/") != 1 or name.startswith((".", "~")) or name.endswith("/"):
        raise VitxError(f"there is no folder {name}, and {_HUB} takes owner/name")
    with _reached(name), failure(f"the hub has no model {name} for you"):
        try:
            return Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError as error:
            raise VitxError(f"{name} is not in the cache, and could not be fetched from the hub") from error
        except EntryNotFoundError:
            return None


@contextmanager
def _reached(name: str) -> Iterator[None]:
    """Run the block, which loads from a folder or the hub, and report if the hub does not answer."""
    with nullcontext(True) if Path(name).is_dir() else hub() as answers:
        try:
            yield
        except VitxError as error:
            if answers or not isinstance(error.__cause__, OSError):
                raise
            said = f"{name} could not be fetched from the hub, which does not answer"
            raise VitxError(f"{said}: check the connection, or give the folder of a model") from error


def _pretrained(kind: str, what: str, name: str, trust: bool) -> Any:
    """Load with an auto class of transformers; raise a VitxError if a model lacks tensors."""
    try:
        import transformers
    except ImportError as error:
        raise VitxError("models of Hugging Face need transformers: pip install transformers") from error
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise VitxError(f"{name} holds no model that was saved by transformers: it has no config.json")
    options = {"output_loading_info": True} if kind.startswith("AutoModel") else {}
    with quiet(), failure(f"{name} holds nothing that {what}"):
        found = getattr(transformers, kind).from_pretrained(name, trust_remote_code=trust, **options)
    if not options:
        return found
    model, info = found
    if missing := sorted(info["missing_keys"]):
        lacks = f"{len(missing)} of its tensors are missing ({missing[0]})"
        raise VitxError(f"{name} holds no trained model that {what}: {lacks}")
    return model

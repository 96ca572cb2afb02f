"""Models by one name: of timm, of Hugging Face, of open_clip, or of one's own code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from vitx.errors import VitxError
from vitx.inputs.preprocessing import Preprocessing
from vitx.models.checkpoints import create_model, model_of_weights
from vitx.models.clip import load_open_clip
from vitx.models.hub import load_hugging_face, load_towers, read_config
from vitx.models.own import found_here, load_own

_OPEN_CLIP = "open_clip:"
_HUB = "hf-hub:"
_FOLDER = "local-dir:"


class Loaded(NamedTuple):
    """A model with what comes with it.

    Attributes:
        model: in eval mode.
        prepare: makes its images; None: the model declares it, or the user does.
        names: of its classes, or None.
        tokenizer: of its texts, or None.
    """

    model: nn.Module
    prepare: Preprocessing | None = None
    names: tuple[str, ...] | None = None
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
    """Load a model by its name.

    Args:
        name: of timm (`vit_base_patch16_224`); `hf-hub:owner/name`, or a folder, of transformers, timm or
            open_clip; `open_clip:ViT-B-32`; or `package.module:name`, a class or a function of one's own.
        weights: a file; None: those that the model comes with.
        options: arguments for timm, or for one's own class or function.
        of_timm: further arguments, for timm alone.
        trust: load also what runs code.
        texts: the model is to compare images with texts.
        classes: the model is to tell classes apart, and not only to have features.

    Raises:
        VitxError: There is no such model, or it does not take the weights or options.
    """
    name = name.replace("hf_hub:", _HUB, 1)
    if Path(name).is_file():
        raise VitxError(f"{name} is a file of weights: give it by --weights, and the model's name by --model")
    place, folder = name.removeprefix(_HUB), Path(name).is_dir()
    of_hub = folder or name.startswith(_HUB) or ("/" in name and ":" not in name)
    package, dot, last = name.rpartition(".")
    if of_hub:
        kind, place = _kind(place, texts), f"{_FOLDER if folder else _HUB}{place}"
    elif name.startswith(_OPEN_CLIP):
        kind, place = "open_clip", name.removeprefix(_OPEN_CLIP)
    else:
        kind = "own" if ":" in name and not name.startswith(_FOLDER) else "timm"
    if texts and kind in ("own", "timm"):
        raise VitxError(
            f"{name} compares no images with texts: name a CLIP of Hugging Face, or open_clip:NAME"
        )
    if kind == "own":
        return Loaded(load_own(name, weights, options, trust).eval())
    if kind == "timm":
        if dot and not of_hub and found_here(package):
            raise VitxError(f"for a class or function of your own write --model {package}:{last}")
        options = {**(of_timm or {}), **(options or {})}
        if weights is None:
            return Loaded(create_model(place, True, None, options).eval())
        return Loaded(model_of_weights(place, weights, options, trust).eval())
    if options:
        raise VitxError("--model-options are for models of timm and your own: leave them out")
    if kind == "open_clip":
        model, prepare, tokenizer = load_open_clip(place, weights, trust)
        if classes and not texts:
            raise VitxError(f"{name} compares pictures with texts: add --text, as in --text 'a cat' 'a dog'")
        return Loaded(model.eval(), prepare, tokenizer=tokenizer)
    if weights is not None:
        raise VitxError(f"{name} has weights of its own: leave out --weights")
    place = name.removeprefix(_HUB)
    if texts:
        model, prepare, tokenizer = load_towers(place, trust)
        return Loaded(model.eval(), prepare, tokenizer=tokenizer)
    model, prepare, names = load_hugging_face(place, trust, classes)
    return Loaded(model.eval(), prepare, names)


def _kind(place: str, texts: bool) -> str:
    """Return which library made a folder, or a model on the hub, by the settings that lie in it."""
    config = read_config(place, "config.json")
    if "model_type" in config or "auto_map" in config:
        return "transformers"
    clip = "preprocess_cfg" in read_config(place, "open_clip_config.json")
    if "architecture" in config and not (clip and texts):
        return "timm"
    return "open_clip" if clip else "transformers"

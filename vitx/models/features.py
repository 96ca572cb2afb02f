"""The pooled features of a picture or a text: one vector that represents the whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError, failure, shown
from vitx.inputs.processors import saved_beside
from vitx.models.given import IMAGE_NAMES, Inputs, parameters_of
from vitx.models.outputs import part
from vitx.models.prediction import forward, predict, refusals

_OPEN_CLIP = "encode_image", "encode_text"
_TOWERS = ("get_image_features", "get_text_features"), _OPEN_CLIP
_POOLED = "image_embeds", "pooler_output", "last_hidden_state"
_PADDED = "siglip"  # pools the last token, so its texts are padded to the full length

Way = Callable[[Tensor, Inputs], Any]  # from images and other inputs to features


class Towers:
    """The image tower and the text tower of a model, or of its first submodule that has both.

    Their methods are `get_image_features` and `get_text_features` in Hugging Face models, `encode_image` and
    `encode_text` in open_clip. `both` is the module with them; None if the model may be an image tower alone.
    """

    def __init__(self, model: nn.Module) -> None:
        pairs = ((one, names) for one in model.modules() for names in _TOWERS if _has(one, names))
        self._model = model
        found: Any = next(pairs, (None, ()))
        self.both, self._names = found
        config = getattr(self.both, "config", None)
        self.scales = getattr(self.both, "logit_scale", None) is not None  # its logits are for a softmax
        self._kind = str(getattr(config, "model_type", ""))
        self._longest = getattr(getattr(config, "text_config", None), "max_position_embeddings", None)

    def logits(self, similarities: Tensor) -> Tensor:
        """Scale and shift similarities to logits, as the model does."""
        scale, bias = (getattr(self.both, f"logit_{name}", None) for name in ("scale", "bias"))
        found = similarities if scale is None else similarities * scale.detach().exp()
        return found if bias is None else found + bias.detach()

    def of_images(self, images: Tensor, inputs: Inputs) -> Tensor:
        """Return the features of images, (B, D)."""
        with refusals(images, inputs):
            if self.both is None:
                return _rows(predict(self._model, images, inputs))
            if self._names == _OPEN_CLIP:
                return _rows(self._features(self.both.encode_image(images)))
            features, image = self.both.get_image_features, inputs.name or IMAGE_NAMES[0]
            known = {*parameters_of(features), image}  # without inputs of the text tower
            given = replace(inputs, name=image).of(images)
            return _rows(self._features(features(**{key: given[key] for key in given if key in known})))

    def of_texts(self, texts: Sequence[Any], tokenizer: Any, like: Tensor) -> Tensor:
        """Return the features, (T, D), of texts: strings, ids (L,) or (1, L), or features (D,) or (1, D)."""
        if self.both is not None and any(isinstance(text, str) for text in texts):
            tokenizer = tokenizer or saved_beside(getattr(self.both, "name_or_path", ""), "AutoTokenizer")
            if tokenizer is None:
                known = "transformers.AutoTokenizer or open_clip.get_tokenizer"
                said = "no tokenizer was saved with the model"
                raise VitxError(f"{said}: give tokenizer=, as {known} makes it, or the text as token ids")
        rows = [self._of_text(text, tokenizer, like) for text in texts]
        widths = {row.shape for row in rows}
        if len(widths) > 1:
            raise VitxError(f"the texts have features of several sizes: {sorted(map(tuple, widths))}")
        return torch.cat(rows)

    def _of_text(self, text: Any, tokenizer: Any, like: Tensor) -> Tensor:
        if isinstance(text, Tensor) and text.is_floating_point():  # already features
            return text.detach().reshape(1, -1).to(like.device, like.dtype)
        if self.both is None:
            said = f"{type(self._model).__name__} has no text tower (get_text_features or encode_text)"
            raise VitxError(f"{said}: give the whole model, or the text as its features")
        text = self._tokens(text, tokenizer) if isinstance(text, str) else text
        named = dict(text) if isinstance(text, Mapping) else {"input_ids": text}
        named = {name: one.reshape(1, -1).to(like.device) for name, one in named.items()}
        with failure(f"the text tower refused token ids of shape {tuple(named['input_ids'].shape)}"):
            if self._names == _OPEN_CLIP:
                return self._features(self.both.encode_text(named["input_ids"]))
            return self._features(self.both.get_text_features(**named))

    def _tokens(self, text: str, tokenizer: Any) -> Mapping[str, Tensor]:
        if not any(kind.__module__.startswith("transformers.") for kind in type(tokenizer).__mro__):
            return {"input_ids": tokenizer([text])}
        padded = self._kind.startswith(_PADDED)
        lengths = {"padding": "max_length" if padded else False, "max_length": self._longest}
        found = tokenizer(text, return_tensors="pt", truncation=padded or bool(self._longest), **lengths)
        kept = ("input_ids",) if padded else ("input_ids", "attention_mask")
        return {name: found[name] for name in kept if name in found}

    def _features(self, output: Any) -> Tensor:
        """Return the features in the output of a tower."""
        found: Any = part(output, "pooler_output")
        if found is None:
            found = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(found, Tensor):
            raise VitxError(f"found no features in {self._kind or 'the model'}'s output")
        return found[:, 0] if found.ndim == 3 and self._kind == "flava" else found  # the class token


class Features:
    """The pooled features of a model, or of its first submodule that is `known` to have them.

    They are the output of an image tower (CLIP and similar) or the input of the classifier (timm). Otherwise
    they are the pooled output, else the class token, else the mean of the tokens: of a Hugging Face model
    without its head, or of any other model.
    """

    def __init__(self, model: nn.Module) -> None:
        towers = Towers(model)
        ways = (way for of in (_of_timm, _of_hugging) for one in model.modules() if (way := of(one)))
        found = towers.of_images if towers.both is not None else next(ways, None)
        self.known = found is not None
        self._of = found or partial(_pooled, model)

    def of(self, images: Tensor, inputs: Inputs) -> Tensor:
        """Return the features of images, (B, D)."""
        return _rows(self._of(images, inputs))


def _rows(found: Any) -> Tensor:
    """Return the features, (B, D), or raise a VitxError unless there is one row for each image."""
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise VitxError(f"the features of images are {shown(found)}: wrap the model to return them as (B, D)")
    return found


def _of_timm(model: Any) -> Way | None:
    if not _has(model, ("forward_features", "forward_head")):
        return None
    return lambda images, _: model.forward_head(model.forward_features(images), pre_logits=True)


def _of_hugging(model: Any) -> Way | None:
    """Return the pooling without a head, which models such as ViTForImageClassification have."""
    if not (hasattr(model, "base_model_prefix") and hasattr(model, "config")):
        return None
    inside = model.base_model_prefix if "For" in type(model).__name__ else ""
    return partial(_pooled, getattr(model, inside or "_", model))


def _pooled(body: nn.Module, images: Tensor, inputs: Inputs) -> Any:
    output = forward(body, images, inputs)
    pooled = part(output, *_POOLED)
    found = output if pooled is None else pooled
    if isinstance(found, Tensor) and found.ndim == 3:
        own = any(name.rpartition(".")[2] == "cls_token" for name, _ in body.named_parameters())
        return found[:, 0] if own else found.mean(1)
    return found.flatten(2).mean(2) if isinstance(found, Tensor) and found.ndim == 4 else found


def _has(model: Any, names: Sequence[str]) -> bool:
    return all(callable(getattr(model, name, None)) for name in names)

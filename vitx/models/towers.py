"""Models that bring images and texts into one space: CLIP, SigLIP and their kind."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.inputs.processors import saved_beside
from vitx.models.given import IMAGE_NAMES, Inputs
from vitx.models.prediction import predict, refusals

_OF_IMAGES, _OF_TEXTS = ("get_image_features", "encode_image"), ("get_text_features", "encode_text")
_PADDED = "siglip"  # whose texts are padded to the full length, as it pools the last token


class Towers:
    """The image tower and the text tower of a model, or of the first one inside it that has any.

    Hugging Face's models call them `get_image_features` and `get_text_features`, open_clip's `encode_image`
    and `encode_text`. A model with neither may be the image tower alone.
    """

    def __init__(self, model: nn.Module) -> None:
        found = (part for part in model.modules() if _method(part, _OF_IMAGES) and _method(part, _OF_TEXTS))
        self._model = model
        self._both: Any = next(found, None)
        config = getattr(self._both, "config", None)
        self._kind = str(getattr(config, "model_type", ""))
        self._longest = getattr(getattr(config, "text_config", None), "max_position_embeddings", None)

    def logits(self, similarities: Tensor) -> Tensor:
        """Return similarities scaled and shifted as the model does before it compares them."""
        scale, bias = (getattr(self._both, f"logit_{name}", None) for name in ("scale", "bias"))
        found = similarities if scale is None else similarities * scale.detach().exp()
        return found if bias is None else found + bias.detach()

    @property
    def sees(self) -> bool:
        """True if there is an image tower beside that of texts."""
        return self._both is not None

    @property
    def scales(self) -> bool:
        """True if the model means a softmax of its logits."""
        return getattr(self._both, "logit_scale", None) is not None

    def of_images(self, images: Tensor, inputs: Inputs) -> Tensor:
        """Return the features of images, (B, D).

        Args:
            images: as the model takes them.
            inputs: what else it is given.
        """
        with refusals(images, inputs):
            found = self._features(self._seen(images, inputs))
        if found.ndim != 2:
            raise VitxError(
                f"the features of the images are {tuple(found.shape)}, not (B, D): a text is compared with "
                "one row of features for each image"
            )
        return found

    def _seen(self, images: Tensor, inputs: Inputs) -> Any:
        name = _method(self._both, _OF_IMAGES)
        if name is None:
            return predict(self._model, images, inputs=inputs)
        if name == "encode_image":
            return self._both.encode_image(images)
        features, image = self._both.get_image_features, inputs.name or IMAGE_NAMES[0]
        takes = inspect.signature(features).parameters  # which are none of a text
        given = replace(inputs, name=image).of(images)
        return features(**{key: one for key, one in given.items() if key in (*takes, image)})

    @torch.no_grad()
    def of_texts(self, texts: Sequence[Any], tokenizer: Any, like: Tensor) -> Tensor:
        """Return the features of texts, (T, D).

        Args:
            texts: each a string, token ids, (L,) or (1, L), or features, (D,) or (1, D).
            tokenizer: of transformers or of open_clip; None: the one that was saved with the model.
            like: the images, which have the device and the precision of features.

        Raises:
            VitxError: There is no text tower, or no tokenizer.
        """
        if self._both is None and not all(map(_are_features, texts)):
            raise VitxError(
                f"{type(self._model).__name__} has no text tower (get_text_features or encode_text): give "
                "the whole model, or the text as its features"
            )
        words = [text for text in texts if isinstance(text, str)]
        tokens = iter(self._tokens(words, tokenizer) if words else [])
        rows = [self._of_text(next(tokens) if isinstance(text, str) else text, like) for text in texts]
        widths = {row.shape for row in rows}
        if len(widths) > 1:
            raise VitxError(f"the texts have features of several sizes: {sorted(map(tuple, widths))}")
        return torch.cat(rows)

    def _of_text(self, text: Any, like: Tensor) -> Tensor:
        if _are_features(text):
            row: Tensor = text.detach().reshape(1, -1).to(like.device, like.dtype)
            return row
        named = dict(text) if isinstance(text, Mapping) else {"input_ids": text}
        named = {name: one.reshape(1, -1).to(like.device) for name, one in named.items()}
        try:
            if _method(self._both, _OF_TEXTS) == "encode_text":
                return self._features(self._both.encode_text(named["input_ids"]))
            return self._features(self._both.get_text_features(**named))
        except (ValueError, RuntimeError, IndexError, TypeError) as error:  # each kind has its own
            shape = tuple(named["input_ids"].shape)
            said = str(error).split("\n")[0]
            raise VitxError(f"the text tower refused token ids of shape {shape}: {said}") from error

    def _tokens(self, texts: list[str], tokenizer: Any) -> list[Mapping[str, Tensor]]:
        tokenizer = tokenizer or saved_beside(getattr(self._both, "name_or_path", ""), "AutoTokenizer")
        if tokenizer is None:
            raise VitxError(
                "no tokenizer was saved with the model: give tokenizer=, as transformers.AutoTokenizer or "
                "open_clip.get_tokenizer makes it, or the text as token ids"
            )
        if not any(kind.__module__.startswith("transformers.") for kind in type(tokenizer).__mro__):
            return [{"input_ids": row} for row in tokenizer(texts)]
        padded = self._kind.startswith(_PADDED)
        options: dict[str, Any] = {"max_length": self._longest} if self._longest else {}
        if padded:
            options["padding"] = "max_length"
        found = [tokenizer(text, return_tensors="pt", truncation=bool(options), **options) for text in texts]
        kept = ("input_ids",) if padded else ("input_ids", "attention_mask")
        return [{name: one[name] for name in kept if name in one} for one in found]

    def _features(self, output: Any) -> Tensor:
        """Return the features in what a tower puts out."""
        found = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
        if found is None and isinstance(output, (tuple, list)):
            found = output[0]
        if isinstance(found, Tensor) and found.ndim == 3 and self._kind == "flava":
            found = found[:, 0]  # what it compares
        if not isinstance(found, Tensor):
            raise VitxError(f"found no features in what {self._kind or 'the model'} puts out")
        return found


def _are_features(text: Any) -> bool:
    return isinstance(text, Tensor) and text.is_floating_point()


def _method(part: Any, names: Sequence[str]) -> str | None:
    return next((name for name in names if callable(getattr(part, name, None))), None)

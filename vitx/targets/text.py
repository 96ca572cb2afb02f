"""A text that is compared with the picture."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.given import Inputs
from vitx.models.towers import Towers
from vitx.targets.question import Asked, Question


def text(*texts: Any, against: Any = None, tokenizer: Any = None) -> "Text":
    """Asks for the similarity of the picture and a text: the cosine of their features.

    For CLIP, SigLIP and their kind: what has `get_image_features` and `get_text_features` (Hugging Face), or
    `encode_image` and `encode_text` (open_clip), or contains such a model. The text tower runs once.

    Args:
        *texts: each a string, its token ids, (1, L), or its features, (1, D); or a list of these. Of several,
            each picture has a map for each, one after the other.
        against: a text whose similarity is subtracted: why this one, and not the other.
        tokenizer: of transformers or of open_clip; None: the one that was saved with the model.

    Returns:
        A value for `target=`.

    Raises:
        VitxError: There is no text. Once it is put to a model: this cannot compare pictures with texts.

    Example:
        >>> len(text("a cat", "a dog"))
        2
    """
    return Text([one for given in texts for one in _each(given)], against, tokenizer)


class Text(Question):
    """Texts that are compared with the picture, see `text`."""

    def __init__(self, texts: Sequence[Any], against: Any = None, tokenizer: Any = None) -> None:
        others = [] if against is None else _each(against)
        for one in (*texts, *others):
            if not isinstance(one, (str, Tensor)):
                raise VitxError(f"a text is a string, token ids or features, found {type(one).__name__}")
        if not texts or len(others) > 1:
            raise VitxError(
                f"give at least one text, against one other, found {len(texts)} and {len(others)}"
            )
        self.texts, self.against, self.tokenizer = [*texts], others, tokenizer

    def __len__(self) -> int:
        return len(self.texts)

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Computes the features of the texts."""
        towers = Towers(model)
        features = unit(towers.of_texts([*self.texts, *self.against], self.tokenizer, images))
        number, count = torch.arange(len(images) * len(self), device=images.device) % len(self), len(self)

        def similarities(_: Any, pictures: Tensor, inputs: Inputs) -> Tensor:
            found = towers.of_images(pictures, inputs.repeated(count))
            if found.shape[1] != features.shape[1]:
                raise VitxError(
                    f"the features of the texts are {features.shape[1]} numbers, and those of the images "
                    f"{found.shape[1]}: they are of different models"
                )
            return unit(found) @ features.T

        def score(found: Tensor) -> Tensor:
            own = found.gather(1, number[:, None])[:, 0]
            return own - found[:, -1] if self.against else own

        return Asked(
            images.repeat_interleave(count, 0),
            score,
            similarities,
            lambda scores: self._captions(scores.view(-1, count), towers.scale),
        )

    def _captions(self, scores: Tensor, scale: float | None) -> list[str]:
        """Says the similarities of each picture, (B, T), and among several texts their softmax."""
        names = [_said(one, number) for number, one in enumerate(self.texts, 1)]
        other = f", not {_said(self.against[0], 0)}" if self.against else ""
        shares = scores.mul(scale or 0).softmax(1)
        several = scale is not None and len(names) > 1
        return [
            f"{name}{other}: {value:.3f}" + (f" ({share:.0%})" if several else "")
            for row, parts in zip(scores.tolist(), shares.tolist(), strict=True)
            for name, value, share in zip(names, row, parts, strict=True)
        ]


def _each(given: Any) -> list[Any]:
    """Returns texts one by one: rows of token ids or features are some, too."""
    if isinstance(given, Tensor):
        return [*given.unbind()] if given.ndim == 2 else [given]
    return [one for part in given for one in _each(part)] if isinstance(given, (list, tuple)) else [given]


def _said(one: Any, number: int) -> str:
    """Returns a text as it was given, or its number."""
    return one if isinstance(one, str) else f"text {number}" if number else "the other"


def unit(features: Tensor) -> Tensor:
    """Divides features, (B, D), by their length."""
    found: Tensor = features / features.norm(dim=-1, keepdim=True)
    return found

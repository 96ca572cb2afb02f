"""A text that is compared with the picture."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.given import Inputs
from vitx.models.outputs import Kind
from vitx.models.towers import Towers
from vitx.targets.question import Answers, Asked, Question

Maps = Literal["all", "nearest", "own"] | int  # or the place of one text
_SIMILAR, _LOGITS = "similarities", "logits"  # what the comparison puts out


def text(*texts: Any, against: Any = None, tokenizer: Any = None, maps: Maps = "all") -> "Text":
    """Asks for the similarity of the picture and a text: the cosine of their features.

    For CLIP, SigLIP and their kind: what has `get_image_features` and `get_text_features` (Hugging Face), or
    `encode_image` and `encode_text` (open_clip), or contains such a model. The text tower runs once.

    Args:
        *texts: each a string, its token ids, (1, L), or its features, (1, D); or a list of these.
        against: a text whose similarity is subtracted: why this one, and not the other.
        tokenizer: of transformers or of open_clip; None: the one that was saved with the model.
        maps: "all", a map of each picture for each text, one after the other; "nearest", one of each picture,
            for the text that it is nearest to; "own", the first text is that of the first picture, and so on.

    Returns:
        A value for `target=`. The logits of the explanation are those of the model: scaled similarities.

    Raises:
        VitxError: There is no text. Once it is put to a model: this cannot compare pictures with texts.

    Example:
        >>> len(text("a cat", "a dog").texts)
        2
    """
    return Text([one for given in texts for one in _each(given)], against, tokenizer, maps)


class Text(Question):
    """Texts that are compared with the picture, see `text`."""

    def __init__(
        self, texts: Sequence[Any], against: Any = None, tokenizer: Any = None, maps: Maps = "all"
    ) -> None:
        """Checks what was given."""
        others = [] if against is None else _each(against)
        for one in (*texts, *others):
            if not isinstance(one, (str, Tensor, Mapping)):
                raise VitxError(f"a text is a string, token ids or features, found {type(one).__name__}")
        if not texts or len(others) > 1:
            raise VitxError(
                f"give at least one text, against one other, found {len(texts)} and {len(others)}"
            )
        if not isinstance(maps, int) and maps not in ("all", "nearest", "own"):
            raise VitxError(f'maps must be "all", "nearest" or "own", found {maps!r}')
        self.texts, self.against, self.tokenizer, self.maps = [*texts], others, tokenizer, maps

    @property
    def names(self) -> list[str]:
        """What to call each text."""
        own = self.maps == "own"  # numbers would say nothing
        numbers = ["similarity" if own else f"text {number}" for number, _ in enumerate(self.texts, 1)]
        return [_said(one, number) for one, number in zip(self.texts, numbers, strict=True)]

    @property
    def kind(self) -> Kind:
        """What the logits are: of several texts, each is a class."""
        return "class" if self.maps == "nearest" else "features"

    def of(self, images: slice) -> "Text":
        """Returns the same of some of the images."""
        texts = self.texts[images] if self.maps == "own" else self.texts
        return self._with(texts, self.maps)

    def at(self, place: int) -> "Text":
        """Returns the same with a map for one of the texts alone."""
        return self._with(self.texts, place)

    def one_each(self) -> "Text":
        """Returns the same with one map for each image: of several texts, that of the nearest one."""
        return self if len(self.texts) == 1 or self.maps == "own" else self._with(self.texts, "nearest")

    def _with(self, texts: Sequence[Any], maps: Maps) -> "Text":
        return Text(texts, self.against[0] if self.against else None, self.tokenizer, maps)

    @property
    def _other(self) -> str:
        """Says that there is a text whose similarity is subtracted."""
        return f", not {_said(self.against[0], 'the other')}" if self.against else ""

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Computes the features of the texts."""
        own = self.maps == "own"
        if own and len(self.texts) != len(images):
            raise VitxError(f"{len(self.texts)} texts for {len(images)} images: each must have its own")
        towers = Towers(model)
        features = unit(towers.of_texts([*self.texts, *self.against], self.tokenizer, images))
        texts, other = features[: len(self.texts)], features[len(self.texts) :]
        copies = len(texts) if self.maps == "all" else 1
        places = torch.arange(len(images) * copies, device=images.device) % copies

        def compare(_: Any, pictures: Tensor, inputs: Inputs) -> Mapping[str, Tensor]:
            found = towers.of_images(pictures, inputs.repeated(copies))
            if found.shape[1] != features.shape[1]:
                raise VitxError(
                    f"the features of the texts are {features.shape[1]} numbers, and those of the images "
                    f"{found.shape[1]}: they are of different models"
                )
            found = unit(found)
            similar = (found * texts).sum(1, keepdim=True) if own else found @ texts.T
            return {
                _SIMILAR: similar - found @ other.T if self.against else similar,
                _LOGITS: towers.logits(similar.detach()),
            }

        def which(similar: Tensor) -> Tensor:
            if isinstance(self.maps, int):
                return torch.full_like(places, self.maps)
            return similar.detach().argmax(1) if self.maps == "nearest" else places

        def score(found: Mapping[str, Tensor]) -> Tensor:
            return found[_SIMILAR].gather(1, which(found[_SIMILAR])[:, None])[:, 0]

        def answers(found: Mapping[str, Tensor]) -> Answers:
            index = which(found[_SIMILAR])[:, None]
            shares = towers.logits(found[_SIMILAR].detach()).softmax(1).gather(1, index)[:, 0].tolist()
            names = self.names if own else [self.names[place] for place in index[:, 0].tolist()]
            said = [
                f"{name}{self._other}: {value:.3f}" for name, value in zip(names, score(found), strict=True)
            ]
            if towers.scales and len(texts) > 1 and not own:
                said = [f"{one} ({share:.0%})" for one, share in zip(said, shares, strict=True)]
            return Answers(said)

        return Asked(images.repeat_interleave(copies, 0), score, compare, answers=answers)


def _each(given: Any) -> list[Any]:
    """Returns texts one by one: rows of token ids or features are some, too."""
    if isinstance(given, Tensor):
        return [*given.unbind()] if given.ndim == 2 else [given]
    return [one for part in given for one in _each(part)] if isinstance(given, (list, tuple)) else [given]


def _said(one: Any, otherwise: str) -> str:
    """Returns a text as it was given, or what else to call it."""
    return one if isinstance(one, str) else otherwise


def unit(features: Tensor) -> Tensor:
    """Divides features, (B, D), by their length."""
    found: Tensor = features / features.norm(dim=-1, keepdim=True)
    return found

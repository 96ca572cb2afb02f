"""A text that is compared with the picture."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vitx.errors import VitxError
from vitx.models.given import Inputs
from vitx.models.outputs import Kind
from vitx.models.towers import Towers
from vitx.targets.question import Answers, Asked, Question

Maps = Literal["all", "nearest", "own"] | int


class Text(Question):
    """The similarity of the picture and a text: the cosine of their features.

    For CLIP, SigLIP and their kind: what has `get_image_features` and `get_text_features` (Hugging Face), or
    `encode_image` and `encode_text` (open_clip), or contains such a model. The text tower runs once. The
    logits of the explanation are those of the model: scaled similarities.

    Args:
        *texts: each a string, its token ids, (1, L), or its features, (1, D); or a list of these.
        against: a text whose similarity is subtracted: why this one, and not the other.
        tokenizer: of transformers or of open_clip; None: the one that was saved with the model.
        maps: "all", a map of each picture for each text, one after the other; "nearest", one of each picture,
            for the text that it is nearest to; "own", the first text is that of the first picture, and so on;
            a number, one of each picture, for the text at that place.

    Raises:
        VitxError: There is no text. Once it is put to a model: this cannot compare pictures with texts.

    Example:
        >>> len(text("a cat", "a dog").texts)
        2
    """

    def __init__(self, *texts: Any, against: Any = None, tokenizer: Any = None, maps: Maps = "all") -> None:
        self.texts, self.against = _each(texts), [] if against is None else _each(against)
        for one in (*self.texts, *self.against):
            if not isinstance(one, (str, Tensor, Mapping)):
                raise VitxError(f"a text is a string, token ids or features, found {type(one).__name__}")
        if not self.texts or len(self.against) > 1:
            counts = f"{len(self.texts)} and {len(self.against)}"
            raise VitxError(f"give at least one text, against one other, found {counts}")
        if not isinstance(maps, int) and maps not in ("all", "nearest", "own"):
            raise VitxError(f'maps must be "all", "nearest" or "own", found {maps!r}')
        self.tokenizer, self.maps = tokenizer, maps

    @property
    def names(self) -> list[str]:
        """The names of the texts."""
        if self.maps == "own":  # numbers would say nothing
            return [_said(one, "similarity") for one in self.texts]
        return [_said(one, f"text {number}") for number, one in enumerate(self.texts, 1)]

    @property
    def kind(self) -> Kind:
        """The kind of the logits: of several texts, each is a class."""
        return "class" if self.maps == "nearest" else "features"

    def of(self, images: slice) -> "Text":
        """Return the same of some of the images."""
        return self._with(self.texts[images], "own") if self.maps == "own" else self

    def at(self, place: int) -> "Text":
        """Return the same with a map for one of the texts alone."""
        return self._with(self.texts, place)

    def one_each(self) -> "Text":
        """Return the same with one map for each image: of several texts, that of the nearest one."""
        return self if len(self.texts) == 1 or self.maps == "own" else self._with(self.texts, "nearest")

    def runs_inside(self, model: nn.Module) -> bool:
        """Return that it finds the towers."""
        return True

    def _with(self, texts: Sequence[Any], maps: Maps) -> "Text":
        return Text(*texts, against=self.against or None, tokenizer=self.tokenizer, maps=maps)

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Compute the features of the texts."""
        own = self.maps == "own"
        if own and len(self.texts) != len(images):
            raise VitxError(f"{len(self.texts)} texts for {len(images)} images: each must have its own")
        towers = Towers(model)
        features = normalize(towers.of_texts([*self.texts, *self.against], self.tokenizer, images), dim=1)
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
            found = normalize(found, dim=1)
            similar = (found * texts).sum(1, keepdim=True) if own else found @ texts.T
            scored = similar - found @ other.T if self.against else similar
            return {"similarities": scored, "logits": towers.logits(similar.detach())}

        def which(similar: Tensor) -> Tensor:
            if isinstance(self.maps, int):
                return torch.full_like(places, self.maps)
            return similar.detach().argmax(1) if self.maps == "nearest" else places

        def score(found: Mapping[str, Tensor]) -> Tensor:
            similar = found["similarities"]
            return similar.gather(1, which(similar)[:, None])[:, 0]

        def answers(found: Mapping[str, Tensor]) -> Answers:
            index = which(found["similarities"])
            names = self.names if own else [self.names[place] for place in index.tolist()]
            against = f", not {_said(self.against[0], 'the other')}" if self.against else ""
            scores = score(found).tolist()
            said = [f"{name}{against}: {value:.3f}" for name, value in zip(names, scores, strict=True)]
            if towers.scales and len(texts) > 1 and not own:
                shares = towers.logits(found["similarities"].detach()).softmax(1)
                said = [f"{one} ({row[at]:.0%})" for one, row, at in zip(said, shares, index, strict=True)]
            return Answers(said)

        return Asked(images.repeat_interleave(copies, 0), score, compare, answers)


text = Text


def _each(given: Any) -> list[Any]:
    """Return texts one by one: rows of token ids or features are some, too."""
    if isinstance(given, Tensor):
        return [*given.unbind()] if given.ndim == 2 else [given]
    return [one for part in given for one in _each(part)] if isinstance(given, (list, tuple)) else [given]


def _said(one: Any, otherwise: str) -> str:
    """Return a text as it was given, or what else to call it."""
    return one if isinstance(one, str) else otherwise

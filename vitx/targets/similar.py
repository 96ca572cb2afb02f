"""The likeness of a picture to a text, or to another picture: the cosine of their pooled features."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vitx.errors import VitxError
from vitx.inputs.prepared import prepared
from vitx.models.features import Features, Towers
from vitx.models.given import ALONE, Inputs
from vitx.models.outputs import Kind
from vitx.targets.question import Answers, Asked, Question, for_each

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
        self.rows = "texts" if maps == "own" else ""

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

    def at(self, maps: Maps) -> "Text":
        """Return the same with other maps, as for one of the texts alone."""
        return Text(*self.texts, against=self.against or None, tokenizer=self.tokenizer, maps=maps)

    def one_each(self) -> "Text":
        """Return the same with one map for each image: of several texts, that of the nearest one."""
        return self if len(self.texts) == 1 or self.maps == "own" else self.at("nearest")

    def runs_inside(self, model: nn.Module) -> bool:
        """Return that it finds the towers."""
        return True

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
            found = _unit(towers.of_images(pictures, inputs.repeated(copies)), features)
            similar = (found * texts).sum(1, keepdim=True) if own else found @ texts.T
            scored = similar - found @ other.T if self.against else similar
            return {"similarities": scored, "logits": towers.logits(similar.detach())}

        def answers(found: Mapping[str, Tensor]) -> Answers:
            similar = found["similarities"]
            index = torch.full_like(places, self.maps) if isinstance(self.maps, int) else places
            if self.maps == "nearest":
                index = similar.detach().argmax(1)
            scores = similar.gather(1, index[:, None])[:, 0]
            names = self.names if own else [self.names[place] for place in index.tolist()]
            against = f", not {_said(self.against[0], 'the other')}" if self.against else ""
            said = [f"{name}{against}: {one:.3f}" for name, one in zip(names, scores.tolist(), strict=True)]
            if towers.scales and len(texts) > 1 and not own:
                shares = found["logits"].softmax(1)  # which another text does not change
                said = [f"{one} ({row[at]:.0%})" for one, row, at in zip(said, shares, index, strict=True)]
            return Answers(scores, said)

        return Asked(images.repeat_interleave(copies, 0), answers, compare)


class Similar(Question):
    """The likeness to another picture: the cosine of the pooled features of both.

    Where the other one is a picture, both have a map, one after the other: what of the one is like the
    other, whose features are held, and the other way round. See `vitx.models.features` for which features
    these are.

    Args:
        other: a file, a PIL image, a uint8 array or tensor, as `vitx.explain` prepares it; a picture as the
            model takes it, (C, H, W) or (1, C, H, W), or one for each image, (B, C, H, W); or features, (D,),
            (1, D) or (B, D).
        paired: whether another picture has a map, too.

    Raises:
        VitxError: Once it is put to a model: this is no picture that it takes, or it has no pooled features.

    Example:
        >>> similar_to(torch.rand(384)).other.shape
        torch.Size([1, 384])
    """

    def __init__(self, other: Any, *, paired: bool = True) -> None:
        self.tensor = isinstance(other, Tensor) and other.is_floating_point()
        self.features = self.tensor and other.ndim in (1, 2)
        self.other = other.detach()[None] if self.tensor and other.ndim in (1, 3) else other
        self.paired = paired and not self.features
        self.rows = "other" if self.tensor else ""

    def one_each(self) -> "Similar":
        """Return the same, but with a map of each image alone, none of the other picture."""
        return Similar(self.other, paired=False)

    def runs_inside(self, model: nn.Module) -> bool:
        """Return whether a part of the model is known to have pooled features."""
        return Features(model).known

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Compute the features of the other picture, and of these."""
        features = Features(model)
        others = for_each(self._others(model, images), len(images), "others")
        if self.paired:
            images = torch.stack([images, others], 1).flatten(0, 1)
            others = features.of(images, ALONE).unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        elif not self.features:
            others = features.of(others, ALONE)
        others = normalize(others, dim=1)

        def answers(found: Tensor) -> Answers:
            scores = (_unit(found, others) * others).sum(1)
            return Answers(scores, [f"similarity {one:.3f}" for one in scores.tolist()], paired=self.paired)

        return Asked(images, answers, lambda _, pictures, inputs: features.of(pictures, inputs))

    def _others(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the other pictures as the model takes them, or their features."""
        other, _ = prepared(model, self.other)
        if not isinstance(other, Tensor):
            raise VitxError(f"a picture or its features are wanted, found {type(self.other).__name__}")
        if not self.features and other.shape[1:] != images.shape[1:]:
            raise VitxError(
                f"the other picture has shape {tuple(other.shape)}, and the images {tuple(images.shape)}: "
                "prepare both alike"
            )
        return other.to(images)


text, similar_to = Text, Similar


def _unit(found: Tensor, others: Tensor) -> Tensor:
    """Scale features of images, (B, D), to a length of 1, if they can be compared with these others."""
    if found.shape[1] != others.shape[1]:
        raise VitxError(
            f"the features of the images are {found.shape[1]} numbers, and the others {others.shape[1]}: "
            "they are of different models"
        )
    return normalize(found, dim=1)


def _each(given: Any) -> list[Any]:
    """Return texts one by one: rows of token ids or features are some, too."""
    if isinstance(given, Tensor):
        return [*given.unbind()] if given.ndim == 2 else [given]
    return [one for part in given for one in _each(part)] if isinstance(given, (list, tuple)) else [given]


def _said(one: Any, otherwise: str) -> str:
    """Return a text as it was given, or what else to call it."""
    return one if isinstance(one, str) else otherwise

"""The similarity of a picture to a text or to another picture: the cosine of their pooled features."""

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

    For CLIP, SigLIP and similar models: those with `get_image_features` and `get_text_features` (Hugging
    Face), or `encode_image` and `encode_text` (open_clip), and modules that contain one. The text tower runs
    once. The logits of the explanation are those of the model: scaled similarities.

    Args:
        *texts: each a string, token ids, (1, L), or features, (1, D); or a list of these.
        against: a text whose similarity is subtracted: why the one text rather than the other.
        tokenizer: from transformers or open_clip; None for the one saved with the model.
        maps: "all" for one map per picture and text, the texts of a picture in a row; "nearest" for one map
            per picture, for its nearest text; "own" if the first text belongs to the first picture, and so
            on; an integer for one map per picture, for the text at that index.
    """

    def __init__(self, *texts: Any, against: Any = None, tokenizer: Any = None, maps: Maps = "all") -> None:
        self.texts, self.against = _each(texts), [] if against is None else _each(against)
        for one in (*self.texts, *self.against):
            if not isinstance(one, (str, Tensor, Mapping)):
                raise VitxError(f"a text is a string, token ids or features, found {type(one).__name__}")
        if not self.texts or len(self.against) > 1:
            counts = f"{len(self.texts)} and {len(self.against)}"
            raise VitxError(f"give at least one text, and at most one against it, found {counts}")
        known = range(len(self.texts)) if isinstance(maps, int) else ("all", "nearest", "own")
        if maps not in known:
            raise VitxError(f'maps must be "all", "nearest", "own" or the index of a text, found {maps!r}')
        self.tokenizer, self.maps = tokenizer, maps
        self.rows = "texts" if maps == "own" else ""

    @property
    def names(self) -> list[str]:
        """The names of the texts."""
        own = self.maps == "own"  # numbers would say nothing
        return [_said(one, "similarity" if own else f"text {n}") for n, one in enumerate(self.texts, 1)]

    @property
    def kind(self) -> Kind:
        """The kind of the logits: if the nearest text is explained, each text is a class."""
        return "class" if self.maps == "nearest" else "features"

    def at(self, maps: Maps) -> "Text":
        """Return this question with other maps, such as those for a single text."""
        return Text(*self.texts, against=self.against or None, tokenizer=self.tokenizer, maps=maps)

    def one_each(self) -> "Text":
        """Return this question with one map per image: if there are several texts, for the nearest one."""
        return self if len(self.texts) == 1 or self.maps == "own" else self.at("nearest")

    def runs_inside(self, model: nn.Module) -> bool:
        """Return True: the question calls the image tower, also inside a wrapper."""
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
                shares = found["logits"].softmax(1)  # `against` does not change them
                said = [f"{one} ({row[at]:.0%})" for one, row, at in zip(said, shares, index, strict=True)]
            return Answers(scores, said)

        return Asked(images.repeat_interleave(copies, 0), answers, compare)


class Similar(Question):
    """The similarity to another picture: the cosine of the pooled features of both.

    If the other one is a picture, both get a map, one after the other: what makes the first similar to the
    second, whose features are held constant, and vice versa. See `vitx.models.features` for the features.

    Args:
        other: a file, a PIL image, a uint8 array or tensor, which is prepared as by `vitx.explain`; a picture
            as the model takes it, (C, H, W) or (1, C, H, W), or one per image, (B, C, H, W); or features,
            (D,), (1, D) or (B, D).
        paired: whether the other picture gets a map, too.
    """

    def __init__(self, other: Any, *, paired: bool = True) -> None:
        self.tensor = isinstance(other, Tensor) and other.is_floating_point()
        self.features = self.tensor and other.ndim in (1, 2)
        self.other = other.detach()[None] if self.tensor and other.ndim in (1, 3) else other
        self.paired = paired and not self.features
        self.rows = "other" if self.tensor else ""

    def one_each(self) -> "Similar":
        """Return this question with one map per image, and none for the other picture."""
        return Similar(self.other, paired=False)

    def runs_inside(self, model: nn.Module) -> bool:
        """Return whether the question calls a part of the model, one known to have pooled features."""
        return Features(model).known

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Compute the features that each image is compared with."""
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
        """Return the other pictures, prepared for the model, or the features that were given."""
        other, _ = prepared(model, self.other)
        if not isinstance(other, Tensor):
            raise VitxError(f"give a picture or its features, found {type(self.other).__name__}")
        if not self.features and other.shape[1:] != images.shape[1:]:
            shapes = f"{tuple(other.shape)}, and the images {tuple(images.shape)}"
            raise VitxError(f"the other picture has shape {shapes}: prepare both alike")
        return other.to(images)


text, similar_to = Text, Similar


def _unit(found: Tensor, others: Tensor) -> Tensor:
    """Scale the features of images, (B, D), to unit length; raise a VitxError if the others' size differs."""
    if found.shape[1] != others.shape[1]:
        sizes = f"{found.shape[1]}, and the others {others.shape[1]}"
        raise VitxError(f"the features of the images have size {sizes}: they are from different models")
    return normalize(found, dim=1)


def _each(given: Any) -> list[Any]:
    """Return a flat list of texts; each row of a matrix of token ids or features is one, too."""
    if isinstance(given, Tensor):
        return [*given.unbind()] if given.ndim == 2 else [given]
    return [one for part in given for one in _each(part)] if isinstance(given, (list, tuple)) else [given]


def _said(one: Any, otherwise: str) -> str:
    """Return a text if it is a string, else another name for it."""
    return one if isinstance(one, str) else otherwise

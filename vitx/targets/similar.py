"""Another picture: why two are alike."""

from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.features import pooled_features
from vitx.models.given import ALONE, Inputs
from vitx.targets.question import Answers, Asked, Question
from vitx.targets.text import unit


def similar_to(other: Any) -> "Similar":
    """Asks what makes the picture like another one: the cosine of their pooled features.

    Where the other one is a picture, both have a map, one after the other: what of the one is like the
    other, whose features are held, and the other way round. See `vitx.models.features.pooled_features` for
    which features these are.

    Args:
        other: a file, a PIL image, a uint8 array or tensor, as `vitx.explain` prepares it; a picture as the
            model takes it, (C, H, W) or (1, C, H, W), or one for each image, (B, C, H, W); or features, (D,),
            (1, D) or (B, D).

    Returns:
        A value for `target=`.

    Raises:
        VitxError: Once it is put to a model: this is no picture that it takes, or it has no pooled features.

    Example:
        >>> similar_to(torch.rand(384)).features.shape
        torch.Size([1, 384])
    """
    return Similar(other)


class Similar(Question):
    """Another picture, or its features, see `similar_to`."""

    def __init__(self, other: Any) -> None:
        """Tells features from pictures."""
        self.features: Tensor | None = None
        self.other, self.alone = other, False
        if isinstance(other, Tensor) and other.is_floating_point() and other.ndim in (1, 2):
            self.features = other.detach().reshape(-1, other.shape[-1])

    def one_each(self) -> "Similar":
        """Returns the same, but with a map of each image alone, none of the other picture."""
        found = Similar(self.other)
        found.alone = True
        return found

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Computes the features of the other picture, and of these."""
        if self.features is not None:
            others, pictures = self.features.to(images), images
        elif self.alone:
            others, pictures = pooled_features(model, self._pictures(model, images), ALONE), images
        else:
            second = _of_all(self._pictures(model, images), len(images))
            # In pairs: a picture, and the one that it is held against.
            pictures = torch.stack([images, second], 1).flatten(0, 1)
            others = pooled_features(model, pictures, ALONE).unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        others = unit(_of_all(others, len(pictures)))

        def score(features: Tensor) -> Tensor:
            if features.shape[1] != others.shape[1]:
                raise VitxError(
                    f"the features of the images are {features.shape[1]} numbers, and the others "
                    f"{others.shape[1]}: they are of different models"
                )
            return (unit(features) * others).sum(1)

        def forward(model: Any, images: Tensor, inputs: Inputs) -> Tensor:
            return pooled_features(model, images, inputs)

        def answers(features: Tensor) -> Answers:
            said = [f"similarity {value:.3f}" for value in score(features).tolist()]
            return Answers(said, paired=self.features is None and not self.alone)

        return Asked(pictures, score, forward, answers=answers)

    def _pictures(self, model: nn.Module, images: Tensor) -> Tensor:
        """Returns the other pictures as the model takes them."""
        other = self.other
        if not (isinstance(other, Tensor) and other.is_floating_point()):
            from vitx.inputs.prepared import prepared

            other, _ = prepared(model, other)
        if not isinstance(other, Tensor):
            raise VitxError(f"a picture or its features are wanted, found {type(self.other).__name__}")
        other = other[None] if other.ndim == images.ndim - 1 else other
        if other.shape[1:] != images.shape[1:]:
            raise VitxError(
                f"the other picture has shape {tuple(other.shape)}, and the images {tuple(images.shape)}: "
                "prepare both alike"
            )
        return other.detach().to(images)


def _of_all(rows: Tensor, count: int) -> Tensor:
    """Returns a row for each image."""
    if len(rows) not in (1, count):
        raise VitxError(f"{len(rows)} others for {count} images: give one, or one for each image")
    return rows.expand(count, *rows.shape[1:])

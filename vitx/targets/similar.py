"""Another picture: why two are alike."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vitx.errors import VitxError
from vitx.models.features import Features
from vitx.models.given import ALONE
from vitx.targets.question import Answers, Asked, Question, for_each, part_of


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

    def one_each(self) -> "Similar":
        """Return the same, but with a map of each image alone, none of the other picture."""
        return Similar(self.other, paired=False)

    def of(self, images: slice) -> "Similar":
        """Return the same of some of the images."""
        return Similar(part_of(self.other, images), paired=self.paired) if self.tensor else self

    def runs_inside(self, model: nn.Module) -> bool:
        """Return whether the model, or a part of it, is known to have pooled features."""
        return Features(model).known

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Compute the features of the other picture, and of these."""
        features = Features(model)
        if self.features:
            others = for_each(self.other.to(images), len(images), "others")
        else:
            second = for_each(self._pictures(model, images), len(images), "others")
            if self.paired:
                images = torch.stack([images, second], 1).flatten(0, 1)
                others = features.of(images, ALONE).unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
            else:
                others = features.of(second, ALONE)
        others = normalize(others, dim=1)

        def score(found: Tensor) -> Tensor:
            if found.shape[1] != others.shape[1]:
                raise VitxError(
                    f"the features of the images are {found.shape[1]} numbers, and the others "
                    f"{others.shape[1]}: they are of different models"
                )
            return (normalize(found, dim=1) * others).sum(1)

        def answers(found: Tensor) -> Answers:
            return Answers([f"similarity {value:.3f}" for value in score(found).tolist()], paired=self.paired)

        return Asked(images, score, lambda _, pictures, inputs: features.of(pictures, inputs), answers)

    def _pictures(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the other pictures as the model takes them."""
        other = self.other
        if not self.tensor:
            from vitx.inputs.prepared import prepared

            other, _ = prepared(model, other)
        if not isinstance(other, Tensor):
            raise VitxError(f"a picture or its features are wanted, found {type(self.other).__name__}")
        if other.shape[1:] != images.shape[1:]:
            raise VitxError(
                f"the other picture has shape {tuple(other.shape)}, and the images {tuple(images.shape)}: "
                "prepare both alike"
            )
        return other.to(images)


similar_to = Similar

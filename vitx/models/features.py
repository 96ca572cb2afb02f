"""The pooled features of a picture: one row of numbers that stands for the whole."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.given import Inputs
from vitx.models.prediction import forward
from vitx.models.towers import Towers

_POOLED = "image_embeds", "pooler_output", "last_hidden_state"


class Features:
    """The pooled features of a model, or of the first part of it that is known to have some.

    They are those of the image tower of CLIP and its kind; what a model of timm gives its classifier; of a
    model of Hugging Face, without its head, the pooled output, else the class token, else the mean of the
    tokens; or what any other model puts out.

    Attributes:
        known: whether they are not what any other model puts out.
    """

    def __init__(self, model: nn.Module) -> None:
        towers = Towers(model)
        kinds: list[tuple[Callable[[Any], bool], Callable[[Any], Callable[[Tensor, Inputs], Any]]]]
        kinds = [(_has_head, _of_timm), (_is_hugging, _of_hugging)]
        found = [of(part) for fits, of in kinds for part in model.modules() if fits(part)]
        self.known = towers.sees or bool(found)
        self._of = towers.of_images if towers.sees else found[0] if found else _of_hugging(model)

    def of(self, images: Tensor, inputs: Inputs) -> Tensor:
        """Return the features of images, (B, D).

        Args:
            images: as the model takes them.
            inputs: what else it is given.

        Raises:
            VitxError: What comes out is not one row for each image.
        """
        found = self._of(images, inputs)
        if not isinstance(found, Tensor) or found.ndim != 2:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise VitxError(
                f"the features of the images are {shape}, not (B, D): wrap the model so that it puts out one "
                "row of features for each image"
            )
        return found


def _has_head(part: Any) -> bool:
    return hasattr(part, "forward_features") and hasattr(part, "forward_head")


def _of_timm(part: Any) -> Callable[[Tensor, Inputs], Any]:
    return lambda images, _: part.forward_head(part.forward_features(images), pre_logits=True)


def _is_hugging(part: Any) -> bool:
    return hasattr(part, "base_model_prefix") and hasattr(part, "config")


def _of_hugging(part: Any) -> Callable[[Tensor, Inputs], Any]:
    """Those with a head are called ...For..., as ViTForImageClassification."""
    body = part
    if "For" in type(part).__name__:
        body = getattr(part, str(getattr(part, "base_model_prefix", "")) or "_", part)
    return lambda images, inputs: _pooled(forward(body, images, inputs), body)


def _pooled(output: Any, body: nn.Module) -> Any:
    found = output
    if not isinstance(output, Tensor):
        found = next((one for name in _POOLED if (one := getattr(output, name, None)) is not None), output)
    if not isinstance(found, Tensor):
        return found
    if found.ndim == 3:
        own = any(name.rpartition(".")[2] == "cls_token" for name, _ in body.named_parameters())
        return found[:, 0] if own else found.mean(1)
    return found.flatten(2).mean(2) if found.ndim == 4 else found

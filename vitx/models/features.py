"""The pooled features of a picture: one row of numbers that stands for the whole."""

from typing import Any

from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.given import Inputs
from vitx.models.prediction import forward
from vitx.models.towers import Towers

_POOLED = "image_embeds", "pooler_output", "last_hidden_state"


def pooled_features(model: nn.Module, images: Tensor, inputs: Inputs) -> Tensor:
    """Returns the pooled features of images, (B, D).

    They are those of the image tower of CLIP and its kind; what a model of timm gives its classifier; of a
    model of Hugging Face, without its head, the pooled output, else the class token, else the mean of the
    tokens; or what any other model puts out.

    Args:
        model: that puts out features, or has a head behind them.
        images: as the model takes them.
        inputs: what else it is given.

    Raises:
        VitxError: What comes out is not one row for each image.
    """
    towers = Towers(model)
    if towers.sees:
        return towers.of_images(images, inputs)
    timms: Any = next((one for one in model.modules() if _has_head(one)), None)
    if timms is not None:
        found = timms.forward_head(timms.forward_features(images), pre_logits=True)
    else:
        body = _body(model)
        found = _pooled(forward(body, images, inputs), body)
    if not isinstance(found, Tensor) or found.ndim != 2:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise VitxError(
            f"the features of the images are {shape}, not (B, D): wrap the model so that it puts out one row "
            "of features for each image"
        )
    return found


def _body(model: nn.Module) -> nn.Module:
    """Returns a model of Hugging Face without its head: those with one are called ...For..., as ViTForX."""
    name = str(getattr(model, "base_model_prefix", ""))
    body = getattr(model, name, None) if name and "For" in type(model).__name__ else None
    return body if isinstance(body, nn.Module) else model


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


def _has_head(module: Any) -> bool:
    return hasattr(module, "forward_features") and hasattr(module, "forward_head")

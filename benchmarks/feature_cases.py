"""The tools whose features are compared, how each is called, and the models that they explain."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from peers import grad_cam, torchcam_grad_cam, torchxai, without_fallback
from torch import Tensor, nn

import vitx

Maps = Callable[..., Any]
CLASSES = 10


@dataclass(frozen=True)
class Tool:
    """A tool to compare, with functions that return its maps; None for what it does not have.

    Attributes:
        package: its name in the package registry; empty if it has none.
        rollout: attention rollout from model and images, with heads averaged and nothing discarded.
        for_class: maps from model, images and a class for each.
        patches: as `rollout`, before maps are upsampled; None if they are not upsampled.
        gradient_rollout: gradient rollout from model, images and classes.
        glue: whether the user must write code that is specific to the model.
    """

    package: str
    rollout: Maps | None = None
    for_class: Maps | None = None
    patches: Maps | None = None
    gradient_rollout: Maps | None = None
    glue: bool = False


def vitx_rollout(model: nn.Module, images: Tensor) -> Any:
    """Return the attention rollout of vitx, as in its README."""
    return vitx.explain(model, images, "rollout").maps


def vitx_for_class(model: nn.Module, images: Tensor, classes: list[int]) -> Any:
    """Return the gradient rollout of vitx, one of its methods for a class."""
    return vitx.explain(model, images, "grad_rollout", target=classes).maps


def vitx_plain(model: nn.Module, images: Tensor, classes: list[int]) -> Any:
    """Return the gradient rollout of vitx with the plain gradient, as in the formula of the test."""
    return vitx.explain(model, images, "grad_rollout", target=classes, gradient="plain").maps


def fast_vit_rollout(model: nn.Module, images: Tensor) -> Any:
    """Return the matrix of the tool, cut like its own heat map to the last tokens that form a square."""
    from fast_vit_rollout import ViTAttentionRollout

    matrix = ViTAttentionRollout(model, discard_ratio=0.0)(images)
    side = int((matrix.shape[-1] - 1) ** 0.5)
    return matrix[:, 0, -side * side :].unflatten(1, (side, side))


def torchxai_rollout(model: nn.Module, images: Tensor) -> Any:
    """Explain one image at a time."""
    from torchxai.methods.attention_rollout import AttentionRollout

    with without_fallback():
        rollout = AttentionRollout(model, head_fusion="mean", discard_ratio=0.0)
        return [rollout(image[None]) for image in images]


def torchxai_patches(model: nn.Module, images: Tensor) -> Any:
    """Return the same maps before they are upsampled."""
    from torchxai.methods.attention_rollout import AttentionRollout

    rollout = AttentionRollout(model, head_fusion="mean", discard_ratio=0.0)
    with without_fallback():
        return [rollout._compute_cam(image[None], None) for image in images]


def captum(model: nn.Module, images: Tensor, classes: list[int]) -> Any:
    """Return captum's integrated gradients, as it has no method for attention."""
    from captum.attr import IntegratedGradients

    attribution = IntegratedGradients(model).attribute(images, target=torch.tensor(classes), n_steps=8)
    return attribution.detach().sum(1)


def attention_extract(model: nn.Module, images: Tensor) -> Any:
    """Extract the attention of each layer by timm.utils, from which the user would have to make a map."""
    from timm.utils.attention_extract import AttentionExtract

    found = AttentionExtract(model)(images)
    raise NotImplementedError(f"it gives {len(found)} matrices of attention, and no map")


def vit_explain_rollout(model: nn.Module, images: Tensor) -> Any:
    """Explain one image at a time."""
    from vit_rollout import VITAttentionRollout

    rollout = VITAttentionRollout(model, discard_ratio=0.0)
    return [rollout(image[None]) for image in images]


def vit_explain_for_class(model: nn.Module, images: Tensor, classes: list[int]) -> Any:
    """Explain with gradients. An instance collects those of all calls, so each image has its own."""
    from vit_grad_rollout import VITAttentionGradRollout

    pairs = zip(images, classes, strict=True)
    return [VITAttentionGradRollout(model, discard_ratio=0.0)(image[None], target) for image, target in pairs]


TOOLS = {
    "vitx": Tool("vitx", vitx_rollout, vitx_for_class, gradient_rollout=vitx_plain),
    "vit-explain": Tool(
        "", vit_explain_rollout, vit_explain_for_class, gradient_rollout=vit_explain_for_class
    ),
    "fast-vit-rollout": Tool("fast-vit-rollout", fast_vit_rollout),
    "torchxai-explain": Tool(
        "torchxai-explain", torchxai_rollout, partial(torchxai, "attribution"), torchxai_patches
    ),
    "pytorch-grad-cam": Tool("grad-cam", for_class=grad_cam, glue=True),
    "torch-cam": Tool("torchcam", for_class=torchcam_grad_cam, glue=True),
    "captum": Tool("captum", for_class=captum),
    "timm's AttentionExtract": Tool("timm", attention_extract),
}


def uneven(model: nn.Module) -> nn.Module:
    """Draw larger values for all weight matrices, so that attention differs from token to token."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1.3 * noise / parameter.shape[1] ** 0.5)
    return model.eval()


def of_timm(name: str = "deit_tiny_patch16_224", **options: Any) -> nn.Module:
    """Return a timm model with three layers."""
    torch.manual_seed(0)
    return uneven(timm.create_model(name, depth=3, num_classes=CLASSES, **options))


def of_hugging_face() -> nn.Module:
    """Return a ViT of Hugging Face."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3}
    size |= {"intermediate_size": 768, "num_labels": CLASSES}
    return uneven(ViTForImageClassification(ViTConfig(**size)))


def of_torchvision() -> nn.Module:
    """Return a ViT of torchvision."""
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    size = {"num_layers": 3, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    return uneven(VisionTransformer(image_size=224, patch_size=16, num_classes=CLASSES, **size))


def pictures(model: nn.Module | None = None) -> Tensor:
    """Return two images of the size that the model takes."""
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or (224, 224)
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))

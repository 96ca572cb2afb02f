"""Which tools are compared by what they can do, how each is called, and on which models."""

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
    """One of those that are compared.

    Attributes:
        package: its name in the package registry; empty if it has none.
        rollout: model and images to attention rollout, heads averaged and nothing discarded.
        for_class: model, images and a class for each to maps.
        patches: as `rollout`, before anything is enlarged; None: it is not.
        gradient_rollout: model, images and classes to gradient rollout, where it has that.
        glue: whether its user must say what is specific to the model.
    """

    package: str
    rollout: Maps | None = None
    for_class: Maps | None = None
    patches: Maps | None = None
    gradient_rollout: Maps | None = None
    glue: bool = False


def vitx_rollout(model: nn.Module, images: Tensor) -> Any:
    """As its README has it."""
    return vitx.explain(model, images, "rollout").maps


def vitx_for_class(model: nn.Module, images: Tensor, classes: list[int]) -> Any:
    """Of its methods for a class, gradient rollout."""
    return vitx.explain(model, images, "grad_rollout", target=classes).maps


def vitx_plain(model: nn.Module, images: Tensor, classes: list[int]) -> Any:
    """Its gradient rollout by the formula that it is held against: with the plain gradient."""
    return vitx.explain(model, images, "grad_rollout", target=classes, gradient="plain").maps


def fast_vit_rollout(model: nn.Module, images: Tensor) -> Any:
    """Its matrix, cut as its own heat map is: the last tokens that make a square."""
    from fast_vit_rollout import ViTAttentionRollout

    matrix = ViTAttentionRollout(model, discard_ratio=0.0)(images)
    side = int((matrix.shape[-1] - 1) ** 0.5)
    return matrix[:, 0, -side * side :].unflatten(1, (side, side))


def torchxai_rollout(model: nn.Module, images: Tensor) -> Any:
    """One image after the other."""
    from torchxai.methods.attention_rollout import AttentionRollout

    with without_fallback():
        rollout = AttentionRollout(model, head_fusion="mean", discard_ratio=0.0)
        return [rollout(image[None]) for image in images]


def torchxai_patches(model: nn.Module, images: Tensor) -> Any:
    """The same before it is enlarged."""
    from torchxai.methods.attention_rollout import AttentionRollout

    rollout = AttentionRollout(model, head_fusion="mean", discard_ratio=0.0)
    with without_fallback():
        return [rollout._compute_cam(image[None], None) for image in images]


def captum(model: nn.Module, images: Tensor, classes: list[int]) -> Any:
    """Integrated gradients: it has no method that is made for attention."""
    from captum.attr import IntegratedGradients

    attribution = IntegratedGradients(model).attribute(images, target=torch.tensor(classes), n_steps=8)
    return attribution.detach().sum(1)


def attention_extract(model: nn.Module, images: Tensor) -> Any:
    """timm.utils: each layer's attention, from which its user would have to make a map."""
    from timm.utils.attention_extract import AttentionExtract

    found = AttentionExtract(model)(images)
    raise NotImplementedError(f"it gives {len(found)} matrices of attention, and no map")


def vit_explain_rollout(model: nn.Module, images: Tensor) -> Any:
    """One image after the other."""
    from vit_rollout import VITAttentionRollout

    rollout = VITAttentionRollout(model, discard_ratio=0.0)
    return [rollout(image[None]) for image in images]


def vit_explain_for_class(model: nn.Module, images: Tensor, classes: list[int]) -> Any:
    """The same with gradients; it collects those of all calls, so each image has its own."""
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
    """Enlarge the weights of queries and keys, so that attention differs from token to token."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1.3 * noise / parameter.shape[1] ** 0.5)
    return model.eval()


def of_timm(name: str = "deit_tiny_patch16_224", **options: Any) -> nn.Module:
    """A model of three layers."""
    torch.manual_seed(0)
    return uneven(timm.create_model(name, depth=3, num_classes=CLASSES, **options))


def of_hugging_face() -> nn.Module:
    """Its ViT."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3}
    size |= {"intermediate_size": 768, "num_labels": CLASSES}
    return uneven(ViTForImageClassification(ViTConfig(**size)))


def of_torchvision() -> nn.Module:
    """Its ViT."""
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    size = {"num_layers": 3, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    return uneven(VisionTransformer(image_size=224, patch_size=16, num_classes=CLASSES, **size))


def pictures(model: nn.Module | None = None) -> Tensor:
    """Two images, in the size that the model takes."""
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or (224, 224)
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))

"""The table of supported models in docs/models.md, computed by explaining each of them.

python -m tests.supported_models    writes the table into the page
"""

from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitx
from tests.models import FAMILIES, NOT_PLAIN, REFUSED, Family, Refused, built

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
BEGIN, END = "<!--- made by python -m tests.supported_models -->\n", "<!--- until here -->"
READOUTS = {
    "token": "the class token",
    "distilled": "class and distillation token",
    "patches": "the patches",
    "all": "all tokens",
    "token+patches": "the class token and the patches",
    "attention": "what an attention pools",
}
# The common names; a family without one belongs to the one above it.
TITLES = {
    "deit": "ViT, DeiT",
    "distilled deit": "DeiT distilled",
    "deit3": "DeiT-III",
    "dinov2 with registers": "DINOv2 with registers",
    "dinov3": "DINOv3",
    "siglip": "SigLIP",
    "perception encoder": "Perception Encoder",
    "average pooling": "ViT with average pooling",
    "average of all tokens": "ViT with an average of all",
    "eva02": "EVA-02",
    "beit": "BEiT",
    "relative position": "relative position",
    "relative position, class token": "relative position with a class token",
    "clip": "CLIP",
    "rope": "RoPE",
    "mixed rope": "RoPE mixed",
    "flexivit": "FlexiViT",
    "naflex": "NaFlexViT",
    "hybrid": "ResNet hybrids",
    "hf vit, sdpa": "ViT",
    "hf deit, sdpa": "DeiT",
    "hf distilled deit, sdpa": "DeiT distilled",
    "hf dinov2, sdpa": "DINOv2",
    "torchvision": "`vit_b_16` and its kind",
    "open_clip": "CLIP's visual tower",
    "open_clip, average pooling": "CLIP's visual tower with average pooling",
}
LIBRARIES = {"hf ": "Hugging Face", "torchvision": "torchvision", "open_clip": "open_clip"}


def table() -> str:
    """Explain every family by every method, and return the results and the refused models as Markdown."""
    rows = defaultdict(list)
    for name, family in FAMILIES.items():
        row = library(name), READOUTS[family.readout], methods(name, family)
        if name in TITLES:
            rows[row].append(TITLES[name])
        else:
            assert row in rows, f"{name} is unlike the others of its kind: give it a title of its own"
    lines = ["| library | models | their classifier reads | methods |", "|---|---|---|---|"]
    lines += [
        f"| {source} | {', '.join(names)} | {reads} | {how} |" for (source, reads, how), names in rows.items()
    ]
    others = defaultdict(list)
    for name, kind in NOT_PLAIN.items():
        others[carrying(kind)].append(name)
    lines += [
        f"| timm | {', '.join(names)} | what its forward pass reads | {how} |"
        for how, names in others.items()
    ]
    reasons = defaultdict(list)
    for name, refused in REFUSED.items():
        reasons[refused.sentence].append(name)
    lines += ["", "Refused, in a sentence that says why:", ""]
    lines += [f"- {', '.join(names)}: {said(names[0])}" for names in reasons.values()]
    return "\n".join(lines) + "\n"


def library(name: str) -> str:
    """Return the title of the library that a family comes from."""
    return next((title for prefix, title in LIBRARIES.items() if name.startswith(prefix)), "timm")


def methods(name: str, family: Family) -> str:
    """List the methods that explain a family, with maps of the right shape that are not constant."""
    target = None if family.classes else lambda output: output[:, 2]
    found = explained(built(name), family.images(), target)
    for method, maps in ((method, one.maps) for method, one in found.items()):
        assert maps.shape == (2, *family.grid), (name, method)
        assert torch.isfinite(maps).all(), (name, method)
        assert (maps.flatten(1).std(1) > 0).all(), (name, method)
    refusing = [f"`{method}`" for method in vitx.methods() if method not in found]
    return f"all but {', '.join(refusing)}" if refusing else "all"


def carrying(kind: Refused) -> str:
    """List the methods that explain a model of `NOT_PLAIN`, with conservation checked."""
    images = torch.randn(1, 3, kind.image_size, kind.image_size, generator=torch.Generator().manual_seed(1))
    found = explained(kind.build().eval(), images, apart=("flow", "legrad"))
    for method, one in found.items():
        assert one.conservation is not None, method
    return ", ".join(f"`{method}`" for method in found)


def explained(
    model: nn.Module, images: Tensor, target: Any = None, apart: tuple[str, ...] = ("legrad",)
) -> dict[str, vitx.Explanation]:
    """Explain by all methods that do not refuse; all but those set `apart`, which may, share a pass."""
    found = {}
    for together in ([name for name in vitx.methods() if name not in apart], *([name] for name in apart)):
        try:
            found |= vitx.explain_methods(model, images, together, target=target)
        except vitx.VitxError:
            for name in together:
                with suppress(vitx.VitxError):
                    found[name] = vitx.explain(model, images, name, target=target)
    return {name: found[name] for name in vitx.methods() if name in found}


def said(name: str) -> str:
    """Return the error message without the advice."""
    refused = REFUSED[name]
    try:
        vitx.explain(refused.build(), torch.randn(1, 3, refused.image_size, refused.image_size))
    except vitx.VitxError as error:
        return str(error).split(":")[0].split(" (found")[0]
    raise AssertionError(f"{name} is explained")


def parts() -> tuple[str, str, str]:
    """Return the page before the table, the current table, and the page after the table."""
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    between, after = rest.split(END)
    return before, between, after


if __name__ == "__main__":
    before, _, after = parts()
    PAGE.write_text(before + BEGIN + table() + END + after, "utf-8")

"""The features of each tool on the installed timm, found by trying them.

    pip install -e ".[bench]" transformers
    python benchmarks/features.py --vit-explain FOLDER

FOLDER is a clone of jacobgil/vit-explain; without it, that row shows errors. Every cell comes from a call.
Models are real architectures with three layers, and with random weights that make attention uneven. The
reason for each "no" is listed below the table. Some tools need functions from their user, for the layout of
patches and the layer to take; these are written here as in the documentation of the tool: "glue".
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from feature_cases import (
    TOOLS,
    Tool,
    of_hugging_face,
    of_timm,
    of_torchvision,
    pictures,
)
from measuring import first_line
from peers import Logits, dense_grad_rollout, dense_rollout, unfused, without_fallback
from showing import table
from torch import Tensor, nn

NO = "no: "


def as_defined(model: Any, images: Tensor, read: int = 1, classes: Sequence[int] | None = None) -> Tensor:
    """Return attention rollout in float64, or gradient rollout if there are classes.

    Args:
        model: a timm model.
        images: (B, C, H, W).
        read: the number of leading tokens that are read.
        classes: one for each image.

    Returns:
        The maps, (B, h, w).
    """
    model, images = model.double(), images.double()
    if classes is None:
        maps: Tensor = dense_rollout(model, images, read)
    else:
        maps = dense_grad_rollout(model, images, classes)
    model.float()
    return maps


def stacked(maps: Any) -> Tensor:
    """Stack the maps, one for each image."""
    return torch.stack([torch.as_tensor(one).detach().double().squeeze() for one in maps])


def error_of(maps: Any, wanted: Tensor) -> float:
    """Return the largest error, with each map divided by its maximum, as tools scale them differently."""
    found = stacked(maps)
    if found.shape != wanted.shape:
        raise ValueError(f"maps of shape {tuple(found.shape[1:])}, where {tuple(wanted.shape[1:])} was right")
    both = (one / one.amax((1, 2), keepdim=True) for one in (found, wanted))
    return float((next(both) - next(both)).abs().max())


def any_map(tool: Tool, model: nn.Module, images: Tensor) -> Any:
    """Return maps by rollout if the tool has it, else maps for classes."""
    if tool.rollout is not None:
        return tool.rollout(model, images)
    assert tool.for_class is not None
    return tool.for_class(model, images, [3, 5])


def runs(tool: Tool) -> str:
    """Test whether the tool explains timm's DeiT as timm makes it."""
    try:
        maps = stacked(any_map(tool, of_timm(), pictures()))
    except NotImplementedError:
        raise
    except Exception as error:
        with unfused(model := of_timm()):
            any_map(tool, model, pictures())
        return f"{NO}only without fused attention; with it, {first_line(error)}"
    assert torch.isfinite(maps).all()
    return "with glue" if tool.glue else "yes"


def exact(tool: Tool) -> str:
    """Test whether the tool's attention rollout is that of the paper."""
    if tool.rollout is None:
        return "none"
    model, images = of_timm(), pictures()
    wanted = as_defined(model, images)
    with unfused(model):
        error = error_of((tool.patches or tool.rollout)(model, images), wanted)
    return "exact" if error < 1e-4 else f"{NO}off by {error:.0%} of the largest value"


def exact_with_gradients(tool: Tool) -> str:
    """Test whether the tool's gradient rollout is relu(E[A * G]), chained in the order of the layers."""
    if tool.gradient_rollout is None:
        return "none"
    model, images = of_timm(), pictures()
    wanted = as_defined(model, images, classes=(3, 5))
    with unfused(model):
        error = error_of(tool.gradient_rollout(model, images, [3, 5]), wanted)
    return "exact" if error < 1e-4 else f"off by {error:.0%}"


def for_a_class(tool: Tool) -> str:
    """Test whether the maps of two classes differ."""
    if tool.for_class is None:
        return "no"
    model, images = of_timm(), pictures()
    with unfused(model):
        one, other = (stacked(tool.for_class(model, images, [target] * 2)) for target in (3, 5))
    if not (one.isfinite().all() and other.isfinite().all()):
        return f"{NO}the maps are not finite"
    return "yes" if not torch.allclose(one, other, rtol=1e-2) else f"{NO}the maps are alike"


def batches(tool: Tool) -> str:
    """Test whether the model runs once for two images."""
    model, calls = of_timm(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    with unfused(model):
        any_map(tool, model, pictures())
    return "yes" if len(calls) == 1 else "one by one"


ODD: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "distilled": (partial(of_timm, "deit_tiny_distilled_patch16_224"), 2),
    "registers": (partial(of_timm, "vit_small_patch14_reg4_dinov2", img_size=224), 1),
    "oblong": (partial(of_timm, img_size=(160, 224)), 1),
}


def odd_ones(tool: Tool) -> str:
    """Count models with other tokens that get right maps, by the paper's formula if there is rollout."""
    right, wrong = 0, []
    for name, (build, read) in ODD.items():
        model = build()
        images = pictures(model)
        try:
            with unfused(model):
                if tool.rollout is None:
                    shape = stacked(any_map(tool, model, images)).shape[1:]
                    if shape not in (images.shape[2:], as_defined(model, images, read).shape[1:]):
                        raise ValueError(f"maps of shape {tuple(shape)}")
                else:
                    maps = (tool.patches or tool.rollout)(model, images)
                    if (error := error_of(maps, as_defined(model, images, read))) > 1e-4:
                        raise ValueError(f"off by {error:.0%} of the largest value")
            right += 1
        except Exception as error:
            wrong.append(f"{name}: {first_line(error)}")
    return f"{right} of {len(ODD)}" + (f"{NO}{'; '.join(wrong)}" if wrong else "")


def other_libraries(tool: Tool) -> str:
    """Test whether the tool explains the ViTs of Hugging Face and of torchvision as they are."""
    good, wrong = [], []
    for name, build in {"Hugging Face": of_hugging_face, "torchvision": of_torchvision}.items():
        try:
            with without_fallback():
                stacked(any_map(tool, build(), pictures()))
            good.append(name)
        except Exception as error:
            wrong.append(f"{name}: {first_line(error)}")
            with suppress(Exception), without_fallback():
                stacked(any_map(tool, Logits(build()).eval(), pictures()))
                good.append(f"{name} in a wrapper that returns logits")
    found = " and ".join(good) or "neither"
    return found + (" with glue" if good and tool.glue else "") + (f"{NO}{'; '.join(wrong)}" if wrong else "")


def state(model: nn.Module) -> dict[str, Any]:
    """Return the state of a model that an explanation might change."""
    return {
        "a module is in training mode or not": [module.training for module in model.modules()],
        "hooks": sum(
            len(hooks)
            for module in model.modules()
            for name, hooks in vars(module).items()
            if name.endswith("_hooks")
        ),
        "fused attention": [getattr(module, "fused_attn", None) for module in model.modules()],
        "gradients of weights": [parameter.grad is not None for parameter in model.parameters()],
        "weights that ask for gradients": [parameter.requires_grad for parameter in model.parameters()],
    }


def leaves_no_trace(tool: Tool) -> str:
    """Test whether a model in training mode is unchanged afterwards."""
    changed: set[str] = set()
    for use in (tool.rollout, tool.for_class):
        if use is not None:
            model = of_timm().train()
            before = state(model)
            with unfused(model), suppress(NotImplementedError):
                use(model, pictures(), *([[3, 5]] if use is tool.for_class else []))
            changed |= {name for name, value in state(model).items() if value != before[name]}
    return f"{NO}{', '.join(sorted(changed))}" if changed else "yes"


CHECKS = {
    "timm's DeiT as it is": runs,
    "attention rollout": exact,
    "gradient rollout": exact_with_gradients,
    "a map for a class": for_a_class,
    "a batch in one pass": batches,
    "right on distilled, registers, oblong": odd_ones,
    "other ViTs as they are": other_libraries,
    "leaves the model as it was": leaves_no_trace,
}


def try_all(tool: Tool) -> tuple[list[str], list[str]]:
    """Return the cells of a row, and the reasons for those that are not fully good."""
    cells, seen = [], []
    for title, check in CHECKS.items():
        try:
            found = check(tool)
        except NotImplementedError as no_map:
            found = f"no map{NO}{no_map}"
        except Exception as error:
            found = f"{NO}{first_line(error)}"
        short, _, why = found.partition(NO)
        cells.append(short or "no")
        if why:
            seen.append(f"{title}: {why}")
    return cells, seen


def main() -> None:
    """Print the table and the reasons."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vit-explain", metavar="FOLDER", help="a clone of jacobgil/vit-explain")
    if folder := parser.parse_args().vit_explain:
        sys.path.append(folder)
    rows, notes = [], []
    for name, tool in TOOLS.items():
        release = ""
        with suppress(PackageNotFoundError, ValueError):
            release = version(tool.package)
        cells, seen = try_all(tool)
        rows.append([f"{name} {release}".strip(), *cells])
        notes += [f"- {name}, {line}" for line in seen]
    print(table(["", *CHECKS], rows), *notes, sep="\n")


if __name__ == "__main__":
    main()

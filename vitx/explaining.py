"""Functions that explain a model: maps by one or several methods, and the trace of a forward pass."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vitx.attribution import DEFAULT, NETWORKS, Methods, find_method, with_options
from vitx.errors import VitxError
from vitx.explanation import Explanation, join
from vitx.inputs.prepared import Images, images_in, prepared
from vitx.models.given import ALONE, Inputs, inputs_in, read_inputs
from vitx.models.prediction import check_images, check_model
from vitx.passes import Show, Target, follow
from vitx.targets.question import Question
from vitx.tracing import Trace
from vitx.viewer.viewing import view


def explain(
    model: nn.Module,
    images: Images | DataLoader[Any] | None = None,
    method: str = DEFAULT,
    *,
    target: Target = None,
    inputs: Mapping[str, Any] | None = None,
    image: str | None = None,
    **options: Any,
) -> Explanation:
    """Map which patches a Vision Transformer looks at, for a batch of images in one forward pass.

    `vitx.explain(model, "cat.jpg")` is all you need. The model runs in eval mode; its state is restored.

    Args:
        model: a timm, torchvision, Hugging Face or open_clip Vision Transformer, or a model containing one.
        images: (B, C, H, W), floating point, preprocessed for the model and on its device; clips
            (B, C, T, H, W) or (B, T, C, H, W), volumes (B, C, D, H, W), or spectrograms (B, F, T). Or one or
            several files, PIL images, uint8 arrays (H, W, 3) or uint8 tensors (3, H, W), which the model's
            own transform prepares. Or a DataLoader whose batches are such tensors, sequences that begin
            with one, or mappings; entries named like parameters of forward are passed to it.
        method: one of `vitx.methods()`. "rollout" does not depend on a class and works on any model;
            "evidence" is best at showing what supports a class.
        target: the score to explain: None for the predicted class of each image; a class index; B class
            indices; a function from logits (B, ...) to scores (B,); or one of `vitx.targets`, such as a
            region of the picture.
        inputs: all arguments of the model's forward by name, instead of images: `{"pixel_values": ...,
            "input_ids": ...}`. If a prompt has several pictures, each gets a map.
        image: the name of the images in `inputs`; by default "pixel_values", or the only floating-point
            tensor with two spatial dimensions.
        **options: options of the method: `start_layer`, the first layer to include (all but "attention");
            `head_fusion`, "mean", "max" or "min" (the rollouts, "attention", "flow"); `discard_ratio`, the
            share in [0, 1) of the smallest entries to drop (the rollouts); `without_sinks`, to drop the
            columns of sinks (see `Explanation.sinks`) from A and rescale its rows to sum to 1 (the
            rollouts); `gradient`, "linearized" or "plain" ("grad_rollout", "gae", "legrad").

    Returns:
        The maps with the logits and the targets; for a DataLoader, on the CPU and without the images.

    Raises:
        VitxError: The input is invalid, or the model cannot be explained.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> explanation = explain(model, torch.rand(2, 3, 160, 160), "grad_rollout", target=[3, 7])
        >>> explanation.maps.shape
        torch.Size([2, 10, 10])
    """
    find_method(method)
    found = explain_methods(model, images, {method: options}, target=target, inputs=inputs, image=image)
    return found[method]


def explain_methods(
    model: nn.Module,
    images: Images | DataLoader[Any] | None = None,
    methods: Methods | Sequence[str] = (DEFAULT,),
    *,
    target: Target = None,
    inputs: Mapping[str, Any] | None = None,
    image: str | None = None,
) -> dict[str, Explanation]:
    """Explain images by several methods that share passes; return the explanations by method name.

    There is one forward pass, or two if the methods use both kinds of `gradient`, and one backward pass for
    each method that explains a class (for `legrad`, one through each block). `methods` is a list of names, or
    a mapping from names to options. All other arguments are those of `explain`.
    """
    asked = with_options(methods)
    if isinstance(images, DataLoader) and inputs is None:
        return _explain_loader(model, images, asked, target, image)
    tensor, given, prepare = _prepared(model, images, inputs, image, target)
    scale = {} if prepare is None else {"mean": prepare.mean, "std": prepare.std}
    found = {}
    for name, one in _explain_batch(model, tensor, asked, target, given).items():
        viewer = partial(view, ref(model), asked[name], target, explain_methods)
        found[name] = replace(one, viewer=None if given.others or given.together else viewer, **scale)
    return found


def trace(
    model: nn.Module,
    images: Images | None = None,
    method: str = DEFAULT,
    *,
    target: Target = None,
    inputs: Mapping[str, Any] | None = None,
    image: str | None = None,
    **options: Any,
) -> Trace:
    """Record a forward pass, and the relevance that flows back through each of its steps.

    `print(vitx.trace(model, image))` lists the steps: look there first if a map surprises you. The arguments
    are those of `explain`, except that a DataLoader is not accepted.
    """
    pixels, given, _ = _prepared(model, images, inputs, image, target)
    found: list[Trace] = []
    _explain_batch(model, pixels, with_options({method: options}), target, given, found.append)
    if len(found) > 1:
        raise VitxError(f"a trace takes one question, found {len(found)}: ask for one word")
    return found[0]


def _prepared(
    model: nn.Module, images: Any, inputs: Mapping[str, Any] | None, image: str | None, target: Target
) -> tuple[Any, Inputs, Any]:
    """Return the images as a tensor, the other arguments of forward, and the transform, if one was used."""
    if (images is None) == (inputs is None):
        raise VitxError("give either images, or all arguments of the model as inputs={...}")
    check_model(model)
    if inputs is not None:
        return *read_inputs(model, inputs, image), None
    ready = target.prepare(model, images) if isinstance(target, Question) else None
    if ready is not None:
        return *read_inputs(model, ready.inputs), ready
    tensor, prepare = prepared(model, images)
    return tensor, ALONE, prepare


def _explain_batch(
    model: nn.Module, images: Tensor, methods: Methods, target: Target, inputs: Inputs, show: Show = None
) -> dict[str, Explanation]:
    check_images(model, images)
    library = hasattr(model, "pretrained_cfg") or hasattr(model, "config_class")
    if library and images.is_cpu and images.ndim == 4 and images.shape[1] == 3 and images.max() > 20:
        said = f"the model takes normalized images, and these have values up to {float(images.max()):.0f}"
        warnings.warn(f"{said}: normalize them as in training, or give uint8 images", stacklevel=4)
    if isinstance(target, Question):
        inputs, (target, *more) = target.parts(model, images, inputs)
        if more:
            each = [_explain_batch(model, images, methods, part, inputs, show) for part in (target, *more)]
            return {name: join([found[name] for found in each]) for name in methods}
    networks = {name: find_method(name).network(options) for name, options in methods.items()}
    asked = [network for network in NETWORKS if network in networks.values()]
    found: dict[str, Explanation] = {}
    for network in asked or (None,):  # methods without a gradient join the first pass
        names = [name for name in methods if networks[name] == network or (not networks[name] and not found)]
        found |= follow(model, images, {name: methods[name] for name in names}, target, network, inputs, show)
    return {name: found[name] for name in methods}


def _explain_loader(
    model: nn.Module, loader: DataLoader[Any], methods: Methods, target: Target, image: str | None
) -> dict[str, Explanation]:
    """Explain each batch, and join the explanations on the CPU, without the images."""
    one_for_all = target is None or callable(target) or hasattr(target, "__index__")
    if not (one_for_all or isinstance(target, Question)):
        raise VitxError("for a DataLoader, target must be None, a class, a function or one of vitx.targets")
    check_model(model)
    weight = next(model.parameters(), torch.empty(0))
    parts: list[dict[str, Explanation]] = []
    size: torch.Size | None = None
    seen = 0
    for batch in tqdm(loader, "explaining", unit="batch", disable=None):
        named = inputs_in(model, batch)
        images, given = (images_in(batch), ALONE) if named is None else read_inputs(model, named, image)
        if size not in (None, images.shape[1:]):
            raise VitxError(
                f"the images in batch {len(parts) + 1} of the DataLoader are {tuple(images.shape[1:])}, but "
                f"before {tuple(size or ())}: resize all to one size, or explain batch by batch"
            )
        size, part = images.shape[1:], slice(seen, seen + len(images))
        seen = part.stop
        asked = target.of(part) if isinstance(target, Question) else target
        found = _explain_batch(model, images.to(weight.device), methods, asked, given.to(weight.device))
        parts.append({name: one.without_images().cpu() for name, one in found.items()})
    if not parts:
        raise VitxError("the DataLoader is empty")
    return {name: join([part[name] for part in parts]) for name in methods}

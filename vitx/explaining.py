"""Explaining a model: maps by one method or by several, and the trace of a pass."""

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
    """Explain a batch of images in one forward pass: which patches a Vision Transformer looks at.

    `vitx.explain(model, "cat.jpg")` is a whole program. The model runs in eval mode, and is left as it was.

    Args:
        model: a timm, torchvision, Hugging Face or open_clip Vision Transformer, or one that contains it.
        images: (B, C, H, W), floating point, as the model takes them, on its device; clips (B, C, T, H, W)
            or (B, T, C, H, W), volumes (B, C, D, H, W), or spectrograms (B, F, T). Or files, PIL images,
            uint8 arrays (H, W, 3) or uint8 tensors (3, H, W), one or several, which the model's own
            transform prepares. Or a DataLoader whose batches are such tensors, begin with one, or are
            mappings: what forward takes of these by name goes to it.
        method: one of `vitx.methods()`. "rollout" has no class and works on any model; "evidence" shows
            best what speaks for a class.
        target: the score of methods of a class: None for the predicted class of each image; a class; B
            classes; a function from logits (B, ...) to scores (B,); or one of `vitx.targets`, as a region
            of the picture.
        inputs: all arguments of the model's forward by name, in place of images: `{"pixel_values": ...,
            "input_ids": ...}`. Several pictures of one prompt have a map each.
        image: the name of the images in `inputs`; by default "pixel_values", or the only floating-point
            tensor with two dimensions of space.
        **options: of the method: `start_layer`, the first layer that counts (all but "attention");
            `head_fusion`, "mean", "max" or "min" (the rollouts, "attention", "flow"); `discard_ratio` in
            [0, 1) (the rollouts); `without_sinks`, to take the columns of sinks (see `Explanation.sinks`) out
            of A and scale its rows to sum to 1 again (the rollouts); `gradient`, "linearised" or "plain"
            ("grad_rollout", "gae", "legrad").

    Returns:
        The maps with the logits and the targets; of a DataLoader, on the CPU and without the images.

    Raises:
        VitxError: The input is wrong, or the model cannot be explained.

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
    """Explain the same images by several methods that share their passes; return each explanation by name.

    There is one forward pass, or two where some ask for `gradient="plain"`; and one backward pass for each
    method of a class, for `legrad` one through each block. `methods` are names, or the options of each
    method by its name; all else is as for `explain`.
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
    """Record a pass with the relevance that went through each of its steps.

    `print(vitx.trace(model, image))` lists the steps: look there first when a map surprises you. Arguments
    are those of `explain`, but no DataLoader.
    """
    pixels, given, _ = _prepared(model, images, inputs, image, target)
    found: list[Trace] = []
    _explain_batch(model, pixels, with_options({method: options}), target, given, found.append)
    if len(found) > 1:
        raise VitxError(f"a trace is of one question, found {len(found)}: ask for one word")
    return found[0]


def _prepared(
    model: nn.Module, images: Any, inputs: Mapping[str, Any] | None, image: str | None, target: Target
) -> tuple[Any, Inputs, Any]:
    """Return the images as tensors, other arguments of forward, and the transform if one was applied."""
    if (images is None) == (inputs is None):
        raise VitxError("give either images, or all that the model takes by inputs={...}")
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
    if isinstance(target, Question):
        inputs, (target, *more) = target.parts(model, images, inputs)
        if more:
            each = [_explain_batch(model, images, methods, part, inputs, show) for part in (target, *more)]
            return {name: join([found[name] for found in each]) for name in methods}
    networks = {name: find_method(name).network(options) for name, options in methods.items()}
    asked = [network for network in NETWORKS if network in networks.values()]
    found: dict[str, Explanation] = {}
    for network in asked or (None,):  # methods without a gradient take part in the first pass
        names = [name for name in methods if networks[name] == network or (not networks[name] and not found)]
        found |= follow(model, images, {name: methods[name] for name in names}, target, network, inputs, show)
    return {name: found[name] for name in methods}


def _explain_loader(
    model: nn.Module, loader: DataLoader[Any], methods: Methods, target: Target, image: str | None
) -> dict[str, Explanation]:
    """Explain batch by batch, and keep the maps."""
    one_for_all = target is None or callable(target) or hasattr(target, "__index__")
    if not (one_for_all or isinstance(target, Question)):
        raise VitxError("for a DataLoader, target must be None, one class, a function, or of vitx.targets")
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
                f"the images in batch {len(parts) + 1} of the DataLoader are {tuple(images.shape[1:])}, and "
                f"before {tuple(size or ())}: bring all to one size, or explain batch by batch"
            )
        size, part = images.shape[1:], slice(seen, seen + len(images))
        seen = part.stop
        asked = target.of(part) if isinstance(target, Question) else target
        found = _explain_batch(model, images.to(weight.device), methods, asked, given.to(weight.device))
        parts.append({name: one.without_images().cpu() for name, one in found.items()})
    if not parts:
        raise VitxError("the DataLoader is empty")
    return {name: join([part[name] for part in parts]) for name in methods}

"""From a model and images to maps."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vitx.errors import VitxError
from vitx.explanation import Explanation, join
from vitx.inputs.preprocessing import normalisation
from vitx.methods import DEFAULT, NETWORKS, Method, Methods, find_method, with_options
from vitx.models.isolation import untouched, without_autocast
from vitx.models.lens import LogitLens
from vitx.models.prediction import Target as Classes
from vitx.models.prediction import check_images, check_model
from vitx.tape.backward import Attribution, Backward
from vitx.tape.output import Score, evenly, score_of
from vitx.tape.recorder import Recorder
from vitx.tape.tape import Tape
from vitx.tape.trace import Trace
from vitx.targets.question import Asked, Question
from vitx.targets.reading import run

if TYPE_CHECKING:  # PIL is not imported before it is needed
    from vitx.inputs.prepared import Images

Target = Classes | Question


def explain(
    model: nn.Module,
    images: "Images | DataLoader[Any]",
    method: str = DEFAULT,
    *,
    target: Target = None,
    **options: Any,
) -> Explanation:
    """Explains what a Vision Transformer looks at, for a batch of images in one forward pass.

    `vitx.explain(model, "cat.jpg")` is a whole program.

    The model is left as it was, also when this raises; it runs in eval mode meanwhile.

    Args:
        model: a timm, torchvision, Hugging Face or open_clip Vision Transformer, or one that contains it.
        images: (B, C, H, W), floating point, as the model takes them, on its device; clips (B, C, T, H, W)
            or (B, T, C, H, W), volumes (B, C, D, H, W), or spectrograms (B, F, T). Or what the model's own
            transform (timm's models declare one) can prepare: image files, PIL images, uint8 arrays
            (H, W, 3), uint8 tensors (3, H, W), one or several. Or a DataLoader whose batches are such
            tensors, or begin with one.
        method: one of `vitx.methods()`. "rollout" has no class and works on any model; "evidence" shows
            best what speaks for a class.
        target: what methods of a class explain: None for the predicted class of each image; a class; B
            classes; a function from logits (B, ...) to scores (B,); or what `vitx.targets` makes, as a
            region of the picture.
        **options: of the method: `start_layer`, the first layer that counts (all but "attention");
            `head_fusion`, "mean", "max" or "min" (the rollouts, "attention", "flow"); `discard_ratio` in
            [0, 1) (the rollouts); `gradient`, "linearised" or "plain" ("grad_rollout", "gae", "legrad").

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
    return explain_methods(model, images, {method: options}, target=target)[method]


def explain_methods(
    model: nn.Module,
    images: "Images | DataLoader[Any]",
    methods: Methods | Sequence[str],
    *,
    target: Target = None,
) -> dict[str, Explanation]:
    """Explains the same images by several methods that share their passes.

    One forward pass, or two where some ask for `gradient="plain"`; one backward pass for each method of a
    class, and for `legrad` one through each block.

    Args:
        model: as for `explain`.
        images: as for `explain`.
        methods: names, or the options of each method by its name.
        target: as for `explain`.

    Returns:
        The explanation of each method, by its name.

    Raises:
        VitxError: As for `explain`.
    """
    asked = with_options(methods)
    if isinstance(images, DataLoader):
        return _explain_loader(model, images, asked, target)
    tensor, prepare = _prepared(model, images)
    found = _explain_batch(model, tensor, asked, target)
    if prepare is None:
        return found
    return {name: replace(one, mean=prepare.mean, std=prepare.std) for name, one in found.items()}


def trace(
    model: nn.Module, images: "Images", method: str = DEFAULT, *, target: Target = None, **options: Any
) -> Trace:
    """Records a pass, and how much of the relevance of a map went through each of its steps.

    `print(vitx.trace(model, image))` lists the steps: the first thing to look at where a map surprises.

    Args:
        model: as for `explain`.
        images: as for `explain`, but no DataLoader.
        method: as for `explain`.
        target: as for `explain`.
        **options: as for `explain`.

    Returns:
        The trace of the pass.

    Raises:
        VitxError: As for `explain`.
    """
    find_method(method)
    pixels, _ = _prepared(model, images)
    check_images(model, pixels)
    asked = with_options({method: options})
    found: list[Trace] = []
    _follow(model, pixels, asked, target, find_method(method).network(asked[method]), found.append)
    return found[0]


def _prepared(model: nn.Module, images: Any) -> tuple[Any, Any]:
    """Returns images as the model takes them, and how they were prepared; None: they came so."""
    if isinstance(images, Tensor) and images.is_floating_point():
        return images, None
    from vitx.inputs.prepared import prepared

    return prepared(model, images)


def _explain_batch(
    model: nn.Module, images: Tensor, methods: Methods, target: Target
) -> dict[str, Explanation]:
    chosen = {name: find_method(name) for name in methods}
    check_images(model, images)
    networks = {name: method.network(methods[name]) for name, method in chosen.items()}
    asked = [network for network in NETWORKS if network in networks.values()]
    found: dict[str, Explanation] = {}
    for network in asked or (None,):  # methods without a gradient take part in the first pass
        names = [name for name in chosen if networks[name] == network or (not networks[name] and not found)]
        found |= _follow(model, images, {name: methods[name] for name in names}, target, network)
    return {name: found[name] for name in methods}


def _follow(
    model: nn.Module,
    images: Tensor,
    methods: Methods,
    target: Target,
    network: str | None,
    show: Callable[[Trace], None] | None = None,
) -> dict[str, Explanation]:
    """Explains by methods that share one forward pass, each of which has its own way back.

    Where the tape is to be shown, it stays.
    """
    chosen = {name: find_method(name) for name in methods}
    lens = LogitLens(model) if any(m.gradient == "layer scores" for m in chosen.values()) else None
    tape = Tape(
        model,
        network=network,
        accounts=any(method.accounts for method in chosen.values()),
        head_fusion=None if network else _common_fusion(chosen, methods),
        named=show is not None,
    )
    found: dict[str, Attribution] = {}
    kind = torch.promote_types(images.dtype, torch.float32)
    with torch.inference_mode(False), torch.no_grad(), untouched(model):
        try:
            asked_for = target.put(model, images) if isinstance(target, Question) else target
            if isinstance(asked_for, Asked):
                images = asked_for.images
            pixels = images.detach().as_subclass(Tensor).clone()  # some models change their input
            recorder = Recorder(tape)
            recorder.begin(pixels)
            with recorder.recording(), nullcontext() if lens is None else lens.watch():
                end = run(recorder, model, pixels, asked_for)
            of_logits = cache(partial(score_of, end.value, end.total, end.output, kind))
            asked: dict[str | None, list[Score]] = {None: []}  # what is differentiated
            if any(method.gradient == "score" for method in chosen.values()):
                asked["score"] = [of_logits()]
            if lens is not None:
                if isinstance(asked_for, Asked):
                    raise VitxError(
                        "legrad scores classes layer by layer: take another method for this target"
                    )
                with recorder.recording():
                    layers = _layer_logits(lens, len(tape.layers), end.output)
                asked["layer scores"] = [score_of(recorder.get(own), end.total, own, kind) for own in layers]
            for name, method in chosen.items():
                reads = end.has_score and (target is not None or method.gradient is not None)
                start = of_logits().start if reads else evenly(end.output).to(kind)
                back = Backward(tape, images, start, end.value, asked[method.gradient])
                with without_autocast(images.device):
                    found[name] = method.find(back, **methods[name])
            channels = back.grid.channels
            if show is not None:
                show(Trace(tape, recorder, back.passed))
        finally:
            if show is None:
                tape.clear()
    _check_finite({name: one.maps for name, one in found.items()})
    size = tuple(count for dim, count in enumerate(images.shape) if dim not in (0, channels))
    logits = end.logits.detach().to(torch.promote_types(end.logits.dtype, torch.float32))
    mean, std = normalisation(model)
    explained = {}
    for name, one in found.items():
        about = end.classes if chosen[name].gradient else None
        explained[name] = Explanation(
            *(one.maps, logits, about, size, images, mean, std, name, one.conservation, one.signed, channels),
            captions=end.captions,
        )
    return explained


def _common_fusion(chosen: Mapping[str, Method], methods: Methods) -> str | None:
    """Returns how the heads are fused by all methods, if they read nothing else of A."""
    fusions = [method.head_fusion(methods[name]) for name, method in chosen.items()]
    return fusions[0] if all(other == fusions[0] for other in fusions) else None


def _layer_logits(lens: LogitLens, layers: int, logits: Tensor) -> list[Tensor]:
    """Returns what the head makes of each layer, (B, classes)."""
    of_layers = lens.logits()
    if len(of_layers) != layers or any(found.shape != logits.shape for found in of_layers):
        shapes = sorted({tuple(found.shape) for found in of_layers})
        raise VitxError(
            f"found {len(of_layers)} blocks with scores of shape {shapes}, {layers} attentions "
            f"and an output of shape {tuple(logits.shape)}: legrad needs one attention in each block, and "
            "the model's own head at its end"
        )
    return of_layers


def _explain_loader(
    model: nn.Module, loader: DataLoader[Any], methods: Methods, target: Target
) -> dict[str, Explanation]:
    """Explains batch by batch; nothing but what was found is kept."""
    from vitx.inputs.prepared import batches_of

    one_for_all = target is None or callable(target) or hasattr(target, "__index__")
    if not (one_for_all or isinstance(target, Question)):
        raise VitxError("for a DataLoader, target must be None, one class, a function, or of vitx.targets")
    check_model(model)
    weight = next(model.parameters(), torch.empty(0))
    parts: list[dict[str, Explanation]] = []
    for images in batches_of(loader):
        found = _explain_batch(model, images.to(weight.device), methods, target)
        parts.append({name: explanation.cpu() for name, explanation in found.items()})
    if not parts:
        raise VitxError("the DataLoader is empty")
    return {name: join([part[name] for part in parts]) for name in methods}


def _check_finite(found: Mapping[str, Tensor]) -> None:
    for name, maps in found.items():
        bad = (~maps.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise VitxError(
                f"the {name} maps of images {bad} are not finite: the images or the weights hold NaN or "
                "infinite values"
            )

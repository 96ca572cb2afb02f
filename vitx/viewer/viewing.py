"""From an explanation to its page: records the attention anew, and adds what else is worth a look."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitx.attribution import find_method, title_of
from vitx.errors import VitxError
from vitx.explanation import Explanation
from vitx.models.classes import declared_names, known_class_names, short
from vitx.models.isolation import untouched
from vitx.models.outputs import declared_classes
from vitx.models.prediction import forward
from vitx.pictures.captions import captions_said
from vitx.targets.question import Question
from vitx.viewer.packing import halves
from vitx.viewer.page import Page, page, sheet
from vitx.viewer.seeing import see

_METHODS = "evidence", "grad_rollout", "rollout"  # beside the explanation's own
_CLASSES = 3  # that the maps of an image are about
_ALIKE = 0.02  # of the largest output: what another precision or batch may change

Explain = Callable[..., dict[str, Explanation]]


def view(
    model: nn.Module,
    found: Explanation,
    options: Mapping[str, Any],
    target: Any,
    explain: Explain,
    names: Sequence[str] | None = None,
) -> Page:
    """Makes the page of an explanation.

    Args:
        model: that was explained.
        found: the explanation, with its images.
        options: of its method.
        target: as it was given to `vitx.explain`.
        explain: `vitx.explain_methods`.
        names: of the classes; by default those that are known.

    Raises:
        VitxError: The model is no longer the same, or there is nothing that can be pointed at.
    """
    assert found.images is not None
    run: Callable[..., Any] = forward
    if isinstance(target, Question):
        with torch.no_grad(), untouched(model):
            run = target.put(model, found.images[:: 1 + found.paired]).forward
    seen = [see(model, image, run, len(found.images)) for image in found.images.split(1)]
    for one, logits in zip(seen, found.logits, strict=True):
        _check_same(one.output, logits)
    special = isinstance(target, Question) or (callable(target) and not isinstance(target, Tensor))
    classes = None if special else _classes(model, found)
    slots = _explained(model, found, options, classes, explain)
    pixels = found.pixels().numpy()
    names = _names(model, found.logits) if names is None else names
    captions = [str(said) for said in captions_said(found.logits, found.captions, names)]
    images = []
    for number, one in enumerate(seen):
        maps = [_map(by, number, slot) for slot, some in enumerate(slots) for by in some]
        grids = [of["grid"] for of in maps] + [of["grids"][1] for of in one.layers if "grids" in of]
        about = (
            captions[number : number + 1]
            if classes is None
            else _said(found.logits[number], classes[number], names)
        )
        images.append(
            sheet(pixels[number], max(grid[-3] if len(grid) > 2 else 1 for grid in grids))
            | {"caption": captions[number], "targets": about, "maps": maps}
            | {"own": one.own, "layers": one.layers}
        )
    named = getattr(model, "pretrained_cfg", None) or {}
    name = named.get("architecture") or type(model).__name__
    return page(name, images, [(by.method, title_of(by.method)) for by in slots[0]])


def _check_same(output: Tensor | None, logits: Tensor) -> None:
    """Raises a VitxError if the model puts out other numbers than when it was explained."""
    if output is None or output.shape[1:] != logits.shape or not output.is_floating_point():
        return
    change = (output[0].to(logits) - logits).abs().max()
    if not change <= _ALIKE * logits.abs().max():
        raise VitxError(
            "the model puts out other numbers than when it was explained, as after further training: "
            "explain again, and view that at once"
        )


def _classes(model: nn.Module, found: Explanation) -> Tensor | None:
    """Returns the classes that each image is explained by, (B, n): its own, and the most probable others."""
    logits = found.logits
    if logits.ndim != 2 or logits.shape[1] < 2:
        return found.target[:, None] if found.target is not None else None
    own = logits.argmax(1) if found.target is None else found.target
    if logits.shape[1] not in set(declared_classes(model)):  # they may be features
        return own[:, None]
    others = logits.scatter(1, own[:, None], -torch.inf)
    count = min(_CLASSES, logits.shape[1]) - 1
    return torch.cat([own[:, None], others.topk(count).indices], 1)


def _explained(
    model: nn.Module,
    found: Explanation,
    options: Mapping[str, Any],
    classes: Tensor | None,
    explain: Explain,
) -> list[list[Explanation]]:
    """Returns the explanation, others of the same images, and those by the other classes."""
    asked = {found.method: options} | {name: {} for name in _METHODS if name != found.method}
    slots = [[found]]
    for slot, target in enumerate([] if classes is None else classes.T):
        names = [n for n in asked if (slot == 0 and n != found.method) or (slot and find_method(n).gradient)]
        try:
            more = explain(model, found.images, {n: asked[n] for n in names}, target=target.tolist())
        except VitxError:  # what takes no other method is shown by its own
            continue
        if slot:
            slots.append([])
        slots[-1] += more.values()
    return slots


def _names(model: nn.Module, logits: Tensor) -> list[str] | None:
    """Returns the names of the classes that the model declares, or those of ImageNet."""
    known = declared_names(model) or (known_class_names(logits.shape[1]) if logits.ndim == 2 else None)
    return None if known is None else [short(name) for name in known]


def _said(logits: Tensor, classes: Tensor, names: Sequence[str] | None) -> list[str]:
    """Names classes of an image, with their probabilities where they have some."""
    shares: Sequence[float] = logits.softmax(0).tolist() if len(logits) > 1 else ()
    said = []
    for one in classes.tolist():
        name = f"class {one}" if names is None or one >= len(names) else names[one]
        said.append(f"{name} ({shares[one]:.1%})" if shares else name)
    return said


def _map(by: Explanation, number: int, slot: int) -> dict[str, Any]:
    """Returns a map of an image, and which of its targets it is about; None: of no class."""
    values = by.maps[number]
    return {
        "method": by.method,
        "target": slot if find_method(by.method).gradient else None,
        "grid": list(values.shape),
        "values": halves(values),
        "against": None if by.signed is None else halves(by.signed[number]),
    }

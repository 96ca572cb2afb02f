"""The module that is explained: which weights, and how it is called."""

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from vitx.errors import VitxError, in_words
from vitx.models.given import IMAGE_NAMES, parameters_of
from vitx.models.prediction import forward
from vitx.watch.batches import LABELS
from vitx.watch.nested import last
from vitx.watch.observed import AVERAGED, ObservedStep

Forward = Callable[..., Tensor]
FORWARD_FN = "give forward_fn=lambda module, images: ..."


def averaged(model: nn.Module, callbacks: Iterable[Any]) -> nn.Module:
    """Return the module with averaged weights, of torch or timm, that a callback or the model holds."""
    held = [value for callback in callbacks for value in vars(callback).values()]
    modules = [one for one in held if isinstance(one, nn.Module) and not isinstance(one, type(model))]
    for candidate in (part for one in (*modules, model) for part in one.modules()):
        if isinstance(candidate, AVERAGED):
            found: nn.Module = candidate.module
            return found
    raise VitxError(
        'weights="ema" needs averaged weights: keep a torch.optim.swa_utils.AveragedModel or a ModelEmaV3 of '
        "timm in the module, or add a callback that has one"
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return a model without its data-parallel wrapper, which would synchronize ranks at each call."""
    while isinstance(model, (DistributedDataParallel, DataParallel)):
        model = model.module
    return model


def is_compiled(module: nn.Module) -> bool:
    """Return whether any part of a module is compiled, as recording would change how it runs."""
    return any(
        hasattr(part, "_orig_mod")
        or getattr(part, "_compiled_call_impl", None) is not None
        or any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(part).values())
        for part in module.modules()
    )


class Call(nn.Module):
    """A module called in the user's own way, with errors reported in one sentence."""

    def __init__(self, function: Callable[[Tensor], Any], module: nn.Module, called: str) -> None:
        super().__init__()
        self.module, self.function, self.called = module, function, called

    def forward(self, images: Tensor) -> Any:
        """Return the output of the call."""
        try:
            return self.function(images)
        except VitxError:
            raise
        except NotImplementedError as error:
            raise VitxError(f"{self.called} is not implemented: {FORWARD_FN} (it said {error})") from error
        except (TypeError, KeyError, IndexError, AttributeError, ValueError, AssertionError) as error:
            hint = "" if self.called == "forward_fn" else f": {FORWARD_FN}"
            failed = f"{self.called} failed on images of shape {tuple(images.shape)}"
            raise VitxError(f"{failed}{hint} (it said {in_words(error)})") from error


def call_of(
    model: nn.Module,
    forward_fn: Forward | None,
    observed: ObservedStep | None,
    name: str,
    inputs: Mapping[str, Tensor],
    by_name: bool = False,
) -> Call:
    """Return a module of images alone that calls `forward_fn`, replays the user's step, or calls the forward.

    `inputs` holds other tensors of these images by their paths in the batch, and `name` is the images' path.
    They fill parameters of the same name: the required ones, or all if the training calls models `by_name`.
    """
    named = {last(path): value for path, value in inputs.items()}
    if forward_fn is not None:
        given = _asked_for("forward_fn", [*parameters_of(forward_fn).values()][2:], named)
        return Call(lambda images: forward_fn(model, images, **given), model, "forward_fn")
    called, step = f"{type(model).__name__}.forward", observed
    if step is not None and not step.lacks(model, {*inputs, name}):
        return Call(lambda images: step.run(model, {name: images, **inputs}), model, step.where)
    parameters = [*parameters_of(model.forward).values()]
    if parameters and all(one.kind is one.VAR_KEYWORD for one in parameters):
        return Call(lambda images: model(**{**inputs, name: images}), model, called)
    takes = {one.name for one in parameters} - {*LABELS}
    if (by_name or last(name) in IMAGE_NAMES) and last(name) in takes:
        given = {one: value for one, value in named.items() if one in takes}
        return Call(lambda images: model(**given, **{last(name): images}), model, called)
    given = _asked_for(called, parameters[1:], named)
    return Call(lambda images: model(images, **given) if given else forward(model, images), model, called)


def _asked_for(called: str, parameters: list[Parameter], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    variadic = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    wanted = [one.name for one in parameters if one.default is one.empty and one.kind not in variadic]
    if missing := [one for one in wanted if one not in named]:
        raise VitxError(
            f"{called} takes more than images, and it was not seen how your step passes {missing[0]!r}: "
            f'{FORWARD_FN}, or batch_transform=lambda batch: {{"image": ..., "{missing[0]}": ...}}'
        )
    return {one: named[one] for one in wanted}

"""What is explained: which weights, and how a model is called."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from vitx.errors import VitxError, in_words
from vitx.watch.batches import is_item

T = TypeVar("T")
Forward = Callable[..., Tensor]
_FORWARD_FN = "give forward_fn=lambda module, images: ..."


def averaged(held: Iterable[Any]) -> nn.Module:
    """Returns averaged weights of torch or timm that are held, also by a module.

    Raises:
        VitxError: There are none.
    """
    for one in held:
        for candidate in one.modules() if isinstance(one, nn.Module) else (one,):
            if isinstance(candidate, (AveragedModel, ModelEmaV2, ModelEmaV3)):
                found: nn.Module = candidate.module
                return found
    raise VitxError(
        'weights="ema" needs averaged weights: keep a torch.optim.swa_utils.AveragedModel or a ModelEmaV3 of '
        "timm in the module, or add a callback that has one"
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns a model without what runs it on several devices: that would synchronise ranks at each call."""
    while isinstance(model, (DistributedDataParallel, DataParallel)):
        model = model.module
    return model


def ways_to_call(
    module: nn.Module, forward_fn: Forward | None, name: str, inputs: Mapping[str, Tensor]
) -> Iterator[nn.Module]:
    """Yields modules whose forward takes images alone: the ways to call a module, the likeliest first.

    Args:
        module: the one that is explained.
        forward_fn: a function from it and images to logits; by default its own forward.
        name: what the batch calls the images.
        inputs: what else there is of these images, by its name or place: passed on where the forward asks for
            it by name, or by the order of its parameters; or as the batch that the forward takes.

    Raises:
        VitxError: The module asks for more than there is.
    """
    called = "forward_fn" if forward_fn else f"{type(module).__name__}.forward"
    own = {key: value for key, value in inputs.items() if not is_item(key)}
    if forward_fn is None and not _takes_images(module.forward):
        yield Call(lambda images: module(**{name: images}), module)
        yield Call(lambda images: module(**{name: images, **own}), module)
        return
    wanted = _required(forward_fn)[2:] if forward_fn else _required(module.forward)[1:]
    items = [value for key, value in inputs.items() if is_item(key)]
    given = {parameter: inputs[parameter] for parameter in wanted if parameter in inputs}
    missing = [parameter for parameter in wanted if parameter not in inputs]
    if len(missing) > len(items):
        raise VitxError(
            f"{called} takes more than images, and the batch has no {missing[0]!r}: {_FORWARD_FN}, or "
            'batch_transform=lambda batch: {"image": ..., "label": ..., "' + missing[0] + '": ...}'
        )
    given |= dict(zip(missing, items, strict=False))
    if forward_fn is not None:
        yield Call(lambda images: forward_fn(module, images, **given), module)
        return
    yield Call(lambda images: module(images, **given), module) if given else module
    if not wanted:  # the forward may take a batch
        if is_item(name):
            yield Call(lambda images: module((images, *items)), module)
        else:
            yield Call(lambda images: module({**own, name: images}), module)


class Call(nn.Module):
    """Calls a module in a way of its own."""

    def __init__(self, function: Callable[[Tensor], Any], module: nn.Module) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, images: Tensor) -> Any:
        """Returns what the module puts out."""
        return self.function(images)


def by_any_way(ways: Iterable[nn.Module], explain: Callable[[nn.Module], T]) -> tuple[T, int]:
    """Explains by the first way to call a module that it takes; returns also which one that was.

    Raises:
        VitxError: It takes none.
    """
    first: Exception | None = None
    for number, way in enumerate(ways):
        try:
            return explain(way), number
        except NotImplementedError as error:
            kind = type(way.module if isinstance(way, Call) else way).__name__
            raise VitxError(f"{kind}.forward is not implemented: {_FORWARD_FN} (it said {error})") from error
        except (TypeError, KeyError, IndexError, AttributeError, ValueError, AssertionError) as error:
            first = first or error
    if isinstance(first, VitxError):
        raise first
    assert first is not None, "there was no way"
    raise VitxError(
        f"the forward of the module did not take the images: {_FORWARD_FN} (it said {in_words(first)})"
    ) from first


def _takes_images(function: Callable[..., Any]) -> bool:
    """Whether there is a parameter that is given by its place."""
    places = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    try:
        return any(p.kind in places for p in inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C
        return True


def _required(function: Callable[..., Any]) -> list[str]:
    """The names of the parameters without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]

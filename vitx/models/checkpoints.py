"""Models of timm by name, and weights from files."""

import difflib
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from zlib import crc32

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.layers.helpers import to_2tuple
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from vitx.errors import VitxError
from vitx.models.network import hub

State = Mapping[str, Tensor]


def create_model(
    name: str, pretrained: bool, num_classes: int | None, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """Makes a model of timm.

    Args:
        name: with a tag of pretrained weights or without, as `vit_base_patch16_224.augreg_in21k`.
        pretrained: take timm's weights, from the hub.
        num_classes: None for the model's own.
        options: further arguments of the model, as `img_size`.

    Raises:
        VitxError: timm has no such model, or its weights cannot be fetched.
    """
    options = dict(options or {})
    classes = {} if num_classes is None else {"num_classes": num_classes}
    try:
        with hub() if pretrained else nullcontext():
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **classes, **options)
    except RuntimeError as error:
        if str(error).startswith(("Invalid pretrained tag", "No pretrained weights")):
            raise VitxError(f"timm has no such weights of {name}: {error}") from error
        if "Unknown model" not in str(error):
            raise VitxError(f"{name} could not be made: {error}") from error
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=5, cutoff=0.5)
        raise VitxError(f"timm has no model {name!r}; similar names: {', '.join(near) or 'none'}") from error
    except (OSError, TypeError, ValueError, AssertionError) as error:
        if isinstance(error, OSError | ValueError) and pretrained:  # the hub's client, offline or unknown
            raise VitxError(
                f"the weights of {name} could not be fetched from the hub: check the connection, or give a "
                "file of weights"
            ) from error
        raise VitxError(f"{name} does not take these options: {error}") from error
    if size := options.get("img_size"):  # timm leaves it out of what the model says of its images
        config: Any = model.pretrained_cfg
        config["input_size"] = (3, *to_2tuple(size))
    return model


def model_of_weights(
    name: str, path: Path, options: Mapping[str, Any] | None = None, trust: bool = False
) -> nn.Module:
    """Makes a model of timm with the weights of a file, and as many classes as they have.

    Where the head stands elsewhere in the file, as a linear layer beside the backbone, it is taken from
    there; where there is none, the model has no classes and puts out its features.

    Args:
        name: of the model.
        path: a state dict, in .safetensors or of torch; or a checkpoint of Lightning, timm and others that
            holds one. What stands before the names of the weights, as `model.`, is found.
        options: further arguments of the model. With `img_size`, position embeddings are resampled to it.
        trust: read also files that run code as they are read.

    Raises:
        VitxError: As for `create_model` and `read_weights`, or the weights are those of another model.
    """
    state = read_weights(path, trust)
    try:
        with torch.device("meta"):  # its names alone are wanted
            plain = create_model(name, False, None, options)
    except VitxError:  # an older timm reads numbers from the tensors as it makes the model
        plain = create_model(name, False, None, options)
    state = _with_head(plain, state, path)
    model = create_model(name, False, _classes(plain, state), options)
    if options and "img_size" in options:
        state = _at_size_of(model, state)
    fill(model, state, path)
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Fills a model from a file; a head of another size keeps its random weights.

    Args:
        model: of timm.
        path: as for `model_of_weights`.

    Raises:
        VitxError: As for `model_of_weights`.
    """
    own = model.state_dict()
    state = without_prefix(read_weights(path), own)
    heads = tuple(f"{head}." for head in _heads(model))
    other = {name for name in own if name.startswith(heads) and _shape(state, name) != own[name].shape}
    fill(model, {name: value for name, value in state.items() if name not in other}, path, frozenset(other))


def read_weights(path: Path, trust: bool = False) -> State:
    """Reads names and tensors from a file.

    Args:
        path: as for `model_of_weights`.
        trust: read also files that run code as they are read.

    Raises:
        VitxError: There is no such file, it cannot be read, or it would run code.
    """
    if not path.is_file():
        raise VitxError(f"there is no weights file {path}")
    try:
        found = load_state_dict(str(path), use_ema=False, weights_only=not trust)
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}
    except Exception as error:  # each format has its own kinds
        refused = not trust and runs_code(path)
        raise VitxError((RUNS_CODE if refused else _UNREADABLE).format(path)) from error


def checksum(model: nn.Module) -> int:
    """Returns a number that a model of the same kind with other weights does not have, but by chance."""
    found = 0
    for name, value in model.state_dict().items():
        found = crc32(name.encode(), found)
        if isinstance(value, Tensor):
            found = crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def fill(model: nn.Module, state: State, path: Path, may_miss: frozenset[str] = frozenset()) -> None:
    """Loads weights into a model.

    Args:
        model: to be filled.
        state: the weights, by the model's own names.
        path: where they are from, for the message.
        may_miss: names of weights that may stay as they are.

    Raises:
        VitxError: They are those of another model.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state and name not in may_miss]
    unknown = [name for name in state if name not in own]
    other = [name for name in state if name in own and own[name].shape != state[name].shape]
    if missing or unknown or other:
        examples = [f"{name} is missing" for name in missing[:1]]
        examples += [
            f"{name} is {tuple(state[name].shape)} and not {tuple(own[name].shape)}" for name in other[:1]
        ]
        examples += [f"{name} is unknown" for name in unknown[:1]]
        raise VitxError(
            f"{path} holds weights of another model: of this one's {len(own)} tensors {len(missing)} are "
            f"missing and {len(other)} have another shape, and {len(unknown)} are not known to it "
            f"({'; '.join(examples)})"
        )
    model.load_state_dict(dict(state), strict=False)


RUNS_CODE = (
    "{} holds more than weights: reading it would run code from the file; allow this (--trust) only if you "
    "know where it is from"
)
_UNREADABLE = "{} holds no weights that torch or safetensors can read: give another file"


def runs_code(path: Path) -> bool:
    """Whether a file of torch names functions that are none of torch's own."""
    try:
        return bool(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # it is no such file
        return False


def without_prefix(state: State, own: State) -> State:
    """Cuts off what stands before the names that the model knows, and leaves out what stands elsewhere."""
    prefixes = {name.removesuffix(known) for name in state for known in own if name.endswith(known)}
    prefixes = {prefix for prefix in prefixes if not prefix or prefix.endswith(".")}
    if not prefixes:
        return state
    # Of several equally good ones the shortest: averaged weights are kept under a longer name.
    best = max(prefixes, key=lambda prefix: (sum(prefix + known in state for known in own), -len(prefix)))
    return {name.removeprefix(best): value for name, value in state.items() if name.startswith(best)}


def _with_head(model: nn.Module, state: State, path: Path) -> State:
    """The weights by the model's own names; a head that stands beside the backbone is put in its place."""
    own = model.state_dict()
    inside, heads = without_prefix(state, own), _heads(model)
    if len(heads) != 1 or {name for name in own if not name.startswith(f"{heads[0]}.")} != set(inside):
        return inside  # it has its head, or is another model
    kept = {id(value) for value in inside.values()}
    beside = {name: value for name, value in state.items() if id(value) not in kept}
    weights = [name for name in beside if name.endswith(".weight")]
    parts = (
        {f"{weights[0].removesuffix('weight')}{kind}" for kind in ("weight", "bias")} if weights else set()
    )
    features = getattr(model, "num_features", None)
    if not beside:
        return inside
    if len(weights) != 1 or set(beside) - parts or beside[weights[0]].shape[1:] != (features,):
        raise VitxError(
            f"{path} holds a backbone without a head, and beside it {', '.join(sorted(beside)[:4])}, "
            "which is not a single linear layer: give the code that joins them with --factory or --module"
        )
    return {**inside, **{f"{heads[0]}.{name.rpartition('.')[2]}": beside[name] for name in beside}}


def _at_size_of(model: nn.Module, state: State) -> State:
    """Resamples what is learned of places to the model's own number of patches, as timm does."""
    own: Any = getattr(model, "pos_embed", None)
    learned = state.get("pos_embed")
    if own is None or learned is None or own.shape == learned.shape or own.shape[-1] != learned.shape[-1]:
        return state
    some: Any = model
    prefix = 0 if some.no_embed_class else some.num_prefix_tokens
    resampled = resample_abs_pos_embed(learned, some.patch_embed.grid_size, num_prefix_tokens=prefix)
    return {**state, "pos_embed": resampled}


def _heads(model: nn.Module) -> tuple[str, ...]:
    """The names of the modules that put out the logits."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _classes(model: nn.Module, state: State) -> int | None:
    """How many classes the weights tell apart: none without a head; None where it is no linear layer."""
    heads = _heads(model)
    if heads and not any(name.startswith(f"{head}.") for head in heads for name in state):
        return 0
    return next((len(state[f"{head}.weight"]) for head in heads if f"{head}.weight" in state), None)


def _shape(state: State, name: str) -> Any:
    return state[name].shape if name in state else None

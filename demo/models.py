"""Models of timm, and their weights."""

from pathlib import Path
from typing import Any

import timm
from timm.layers.helpers import to_2tuple
from timm.models import load_state_dict
from torch import nn

from vitx.errors import VitxError

PROJECT = Path(__file__).parent.parent


def create_model(name: str, pretrained: bool, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """Makes a model of timm.

    Raises:
        VitxError: timm has no such model, or its weights cannot be fetched.
    """
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    except RuntimeError as error:
        if str(error).startswith(("Invalid pretrained tag", "No pretrained weights")):
            raise VitxError(f"timm has no such weights of {name}: {error}") from error
        if "Unknown model" not in str(error):
            raise
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise VitxError(f"timm has no model {name!r}; some near it: {near or 'none'}") from error
    except (OSError, ValueError) as error:  # what the hub's client raises, offline or unknown
        if not pretrained:
            raise
        raise VitxError(
            f"the weights of {name} could not be fetched from the hub: check the connection, or give a file "
            "with --model.weights PATH and --model.pretrained false"
        ) from error
    if size := options.get("img_size"):  # timm leaves it out of what the model says of its images
        config: Any = model.pretrained_cfg
        config["input_size"] = (3, *to_2tuple(size))
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Fills a model from a file; a head of another size keeps its random weights.

    Args:
        model: of timm.
        path: .safetensors, .pth or .ckpt; a relative one may also start at the project's folder.

    Raises:
        VitxError: There is no such file, or it holds the weights of another model.
    """
    found = path if path.is_file() else PROJECT / path
    if not found.is_file():
        raise VitxError(f"there is no weights file {path}")
    try:
        state = load_state_dict(str(found), use_ema=False)
    except Exception as error:  # each format has its own kinds
        raise VitxError(
            f"{path} holds no weights that torch or safetensors can read: give another file"
        ) from error
    # Checkpoints of Lightning hold the model under its name in the module.
    state = {name.removeprefix("model."): value for name, value in state.items()}
    own = model.state_dict()
    head = tuple(name for name in own if name.startswith(("head.", "head_dist.", "fc.")))
    state = {
        name: value for name, value in state.items() if name not in head or value.shape == own[name].shape
    }
    wrong = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    missing = [name for name in own if name not in state and name not in head]
    if wrong or missing:
        raise VitxError(
            f"{path} holds weights of another model: {len(missing)} of this one's {len(own)} tensors are "
            f"missing and {len(wrong)} do not fit, such as {(missing + wrong)[0]}"
        )
    model.load_state_dict(state, strict=False)

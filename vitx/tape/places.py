"""Where in the model a call was made."""

import linecache
import sys
from pathlib import Path
from types import FrameType

import torch
from torch import nn

_INSIDE = tuple(str(Path(file).resolve().parent) for file in (__file__, torch.__file__))


def place_of(model: nn.Module) -> tuple[str, str] | None:
    """Returns the module that runs now, and its line of code; None where none is known."""
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    frame: FrameType | None = sys._getframe(1)
    line = ""
    while frame:
        path = frame.f_code.co_filename
        if not line and not path.startswith(_INSIDE):
            line = linecache.getline(path, frame.f_lineno).strip()
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module in names:
            return names[module], line
        frame = frame.f_back
    return None

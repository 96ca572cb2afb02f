"""Another version of vitx in the same process as this one, so that both are timed in turn."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def explain_of(folder: Path) -> Callable[..., Any]:
    """Return `vitx.explain` of a checkout, without changing what `import vitx` loads."""
    here = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "vitx"}
    for name in here:
        del sys.modules[name]
    sys.path.insert(0, str(folder.resolve()))
    try:
        found: Callable[..., Any] = importlib.import_module("vitx").explain
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name.split(".")[0] == "vitx"]:
            del sys.modules[name]
        sys.modules.update(here)
    return found

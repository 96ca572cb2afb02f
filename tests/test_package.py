"""What the package is from outside."""

import subprocess
import sys
from pathlib import Path

import vitx


def test_import_is_light():
    """`import vitx` pulls in neither a model library nor Lightning nor matplotlib."""
    code = "import vitx, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    root = Path(vitx.__file__).parents[1]
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    names = set(loaded.stdout.split())
    assert "vitx" in names
    heavy = {
        "lightning",
        "pytorch_lightning",
        "timm",
        "torchvision",
        "transformers",
        "matplotlib",
        "open_clip",
        "scipy",
    }
    assert not names & heavy

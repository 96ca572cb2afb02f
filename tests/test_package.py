"""What the package is from outside."""

import ast
import subprocess
import sys
from pathlib import Path

import networkx

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


def _rooms_of(path: Path) -> set[str]:
    """The rooms that a module imports from, at its top or later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if "." in node.module else [f"{node.module}.{n.name}" for n in node.names]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("vitx.")}
    return found


def test_arrows_between_rooms_run_one_way():
    """Rooms and the modules at the front door import from one another without a circle."""
    root = Path(vitx.__file__).parent
    arrows = networkx.DiGraph()
    for path in root.rglob("*.py"):
        room = path.relative_to(root).with_suffix("").parts[0]
        if room not in ("__init__", "__main__"):
            arrows.add_edges_from((room, other) for other in _rooms_of(path) if other != room)
    assert len(arrows) > 10
    assert not list(networkx.simple_cycles(arrows))


def test_each_room_says_what_lives_there():
    root = Path(vitx.__file__).parent
    rooms = [path for path in root.iterdir() if path.is_dir() and (path / "__init__.py").exists()]
    assert len(rooms) > 8
    for room in rooms:
        said = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
        assert said, room


def test_names_of_0_1_are_where_they_were():
    exec(
        "from vitx import Explanation, Trace, attention_flow, capture, explain, render, sanity\n"
        "from vitx.attention import Tile\n"
        "from vitx.callbacks import RolloutCallback\n"
        "from vitx.callbacks.batches import read_batch\n"
        "from vitx.captions import captions_of\n"
        "from vitx.methods import methods, register\n"
        "from vitx.metrics import deletion, insertion\n"
        "from vitx.relevance import HeadFusion, carry\n"
    )

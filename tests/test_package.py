"""The package as a whole: its imports, help, links and wheel."""

import ast
import importlib
import pydoc
import re
import runpy
import subprocess
import sys
from pathlib import Path
from shutil import copy, copytree, ignore_patterns
from zipfile import ZipFile

import networkx
import pytest
import timm
import torch
from PIL import Image

import vitx

ROOT = Path(vitx.__file__).parents[1]


LIGHT = """
import sys
from contextlib import redirect_stdout
from importlib import import_module

def explain(words):
    with redirect_stdout(sys.stderr):
        assert import_module("vitx.cli").main(words) == 0

for load, *words in (
    (import_module, "vitx"),
    (explain, sys.argv[1:]),
    (import_module, "vitx.watch"),
    (import_module, "vitx.callbacks.huggingface"),
):
    load(*words)
    print(*sorted({module.split(".")[0] for module in sys.modules}))
"""


@pytest.mark.slow
def test_imports_are_light(tmp_path):
    """`import vitx` loads no model library, Lightning or matplotlib; a watch loads no training framework.

    Neither does the command on one device.
    """
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "model.pth")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    words = ["explain", "a.png", "--model", "test_vit", "--weights", "model.pth"]
    words += ["--run-options", "accelerator=cpu", "workers=1"]
    said = subprocess.run(
        [sys.executable, "-c", LIGHT, *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    core, command, watch, hugging_face = (set(line.split()) for line in said.stdout.splitlines())
    lightnings = {"lightning", "pytorch_lightning"}
    models = {"timm", "torchvision", "transformers", "open_clip"}
    assert "vitx" in core
    assert not core & {*lightnings, *models, "matplotlib", "scipy"}
    assert not command & {*lightnings, "transformers"}
    assert not watch & {*lightnings, "transformers"}
    assert not hugging_face & lightnings


def _modules_of(path: Path, root: Path) -> set[str]:
    """Return the modules of vitx that a module imports, also in functions, but not for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    left_out = {node for block in typed for node in ast.walk(block)}
    found = set()
    for node in ast.walk(tree):
        if (
            not isinstance(node, ast.ImportFrom)
            or node in left_out
            or not (node.module or "").startswith("vitx")
        ):
            continue
        for name in (f"{node.module}.{alias.name}" for alias in node.names):
            place = root.parent.joinpath(*name.split("."))
            is_module = place.with_suffix(".py").exists() or (place / "__init__.py").exists()
            found |= {name, node.module} if is_module else {node.module}
    return found


def test_no_two_modules_import_each_other():
    root = Path(vitx.__file__).parent
    arrows = networkx.DiGraph()
    folders = {"vitx": root, "vitx.callbacks": ROOT / "callbacks"}
    for package, path in ((name, path) for name, folder in folders.items() for path in folder.rglob("*.py")):
        place = path.relative_to(folders[package]).with_suffix("")
        own = ".".join((package, *place.parts)).removesuffix(".__init__")
        arrows.add_edges_from((own, other) for other in _modules_of(path, root) if other != own)
    assert len(arrows) > 80
    assert [circle for circle in networkx.strongly_connected_components(arrows) if len(circle) > 1] == []


def test_each_room_says_what_lives_there():
    root = Path(vitx.__file__).parent
    rooms = [path for path in root.iterdir() if path.is_dir() and (path / "__init__.py").exists()]
    assert len(rooms) > 8
    for room in rooms:
        said = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
        assert said, room


def test_names_are_where_the_docs_say():
    exec(
        "from vitx import Explanation, Trace, Watch, attention_flow, capture, explain, load, sanity, trace\n"
        "from vitx.callbacks import RolloutCallback\n"
        "from vitx.pictures.captions import captions_of\n"
        "from vitx.pictures.render import overlays\n"
        "from vitx.watch.batches import read_batch\n"
        "from vitx.functional import Tile, Weights, carry, fused\n"
        "from vitx.attribution import methods, register\n"
        "from vitx.metrics import deletion, insertion\n"
    )


def test_help_fits_on_a_screen_and_names_all():
    said = pydoc.render_doc(vitx, renderer=pydoc.plaintext)
    assert len(said.splitlines()) <= 60
    public = [
        name for name, value in vars(vitx).items() if getattr(value, "__module__", "").startswith("vitx")
    ]
    for name in {*public, "Watch"} - {"Sanity", "Trace", "__getattr__"}:
        assert re.search(rf"\b{name}\b", vitx.__doc__), name


def test_links_of_the_readme_are_absolute_on_an_index():
    described = runpy.run_path(str(ROOT / "setup.py"))["description"]
    assert described("") == (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((.*?)\)", described("https://example.org/vitx"))
    assert len(links) > 10
    assert all(re.match("https?:", link) for link in links), links
    assert "https://example.org/vitx/raw/main/docs/learning.gif" in links


BUILD = "from setuptools import build_meta; build_meta.build_wheel('.')"


def test_the_wheel_holds_every_file(tmp_path):
    for folder in ("vitx", "callbacks"):
        copytree(ROOT / folder, tmp_path / folder, ignore=ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        copy(ROOT / name, tmp_path)
    wanted = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "vitx").rglob("*.*")}
    wanted |= {f"vitx/callbacks/{path.name}" for path in (tmp_path / "callbacks").iterdir()}
    subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as opened:
        assert {name for name in opened.namelist() if ".dist-info/" not in name} == wanted


def test_what_the_callback_of_hugging_face_needs_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "vitx.callbacks.huggingface", raising=False)
    with pytest.raises(
        ModuleNotFoundError, match=r"^this .* for Hugging Face's .*: pip install transformers"
    ):
        importlib.import_module("vitx.callbacks.huggingface")

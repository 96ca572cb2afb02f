"""Every block of code in the README and the docs runs, or is read by the parser that it is written for.

The blocks of a page run in order: Python in one namespace, commands in one folder with the files that a
reader would have. No network is needed: pretrained models have two thin layers and random weights.
"""

import re
import runpy
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from torch.utils.data import DataLoader

import train_demo
from tests import dense_models, models, texts, vision_language
from tests.hugging_face import hugging_face, hugging_face_of_clips
from tests.lightning_models import SmallClassifier, samples
from tests.played_runs import write_run
from vitx import cli
from vitx.attribution import registry

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *("README.md", "benchmarks/RESULTS.md"),
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")),
]
TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}
MODULE = """
import train_demo

class MyLightningModule(train_demo.Classifier): ...

Module = MyLightningModule

def make_model(classes=1000):
    return train_demo.create_model("deit_tiny_patch16_224", False, classes, TINY)

class Wrapper(train_demo.pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images)
""".replace("TINY", str(TINY))


def shell(example: Example) -> None:
    """Run each command of vitx and of this repository, and check that the others are known."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, "&&"]:
            if word in ("&&", "|", ";"):
                assert not command or works(command), f"line {example.line}: {line}"
                command = []
            else:
                command += sorted(map(str, Path().glob(word))) if "*" in word else [word]


def works(command: list[str]) -> bool:
    """Return True if a command works, as far as it can be tried here."""
    match command:
        case ["vitx", name, *words] if any(
            "devices=" in word for word in words
        ):  # there is one device: only parse the options
            with patch(f"vitx.cli.{name}.run", return_value=0):
                return cli.main([name, *words]) == 0
        case ["vitx", *words]:
            return cli.main(words) == 0
        case ["python", "train_demo.py", *words]:
            configured(words)
            return True
        case ["python", script, *words] if (ROOT / script).is_file():
            known = (ROOT / script).read_text()
            return all(f'"{word}"' in known for word in words if word.startswith("--"))
        case ["pip", "install", *words]:
            extras = re.findall(r"\w+(?=[],])", " ".join(word for word in words if "[" in word))
            known = (ROOT / "pyproject.toml").read_text()
            return all(f"\n{extra} = [" in known for extra in extras)
        case ["python3", "-m", "venv", ".venv"] | [".", ".venv/bin/activate"] | ["python", "-m", "pytest"]:
            return True  # .ci/run does this
        case [("tensorboard" | "mkdocs"), *_]:
            return True
    return False


def settings(example: Example) -> None:
    """Merge settings into those of the demo as LightningCLI does, and instantiate their objects."""
    Path("part.yaml").write_text(example.parsed)
    configured(["--config", str(train_demo.CONFIGS / "demo.yaml"), "--config", "part.yaml"])


def configured(words: list[str]) -> None:
    """Parse a command line of the demo and instantiate all objects that it names, without training."""
    with patch.object(train_demo.DemoCLI, "_run_subcommand"), patch.object(sys, "argv", ["train_demo.py"]):
        train_demo.main(words)


SYBIL = Sybil(
    [
        PythonCodeBlockParser(),
        CodeBlockParser("bash", shell),
        CodeBlockParser("yaml", settings),
    ]
)


@pytest.fixture(scope="module")
def belongings(tmp_path_factory):
    """Return a reader's folder: pictures, a class folder, weights, a module with checkpoints, runs."""
    folder = tmp_path_factory.mktemp("reader")
    names = ("cat", "dog", "pets", "photos/1", "photos/2", "FOLDER/cat/1", "FOLDER/cat/2")
    for seed, name in enumerate((*names, "FOLDER/dog/1", "FOLDER/dog/2")):
        path = folder / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), np.uint8)).save(path)
    (folder / "configs").symlink_to(ROOT / "configs")
    save_file(timm.create_model("deit_tiny_patch16_224").state_dict(), folder / "mine.safetensors")
    (folder / "my_package.py").write_text(MODULE)
    own: dict[str, Any] = {}
    exec(MODULE, own)
    torch.save(own["make_model"]().state_dict(), folder / "mine.pth")
    hugging_face(folder / "my_model")
    hugging_face_of_clips(folder / "my_video_model")
    texts.save_clip(folder / "my_clip")
    dense_models.save("segformer", folder / "my_segmenter")
    dense_models.save("yolos", folder / "my_detector")
    vision_language.save("LLaVA", folder / "my_llava")
    Image.new("RGB", (32, 32)).save(
        folder / "dance.gif",
        save_all=True,
        append_images=[Image.new("RGB", (32, 32), (0, 0, 9 * number)) for number in range(20)],
    )
    options = {"img_size": 32, "patch_size": 8, **TINY}
    for name in ("first", "last"):
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        trainer.strategy.connect(train_demo.Classifier(5, model_options=options))
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    trainer.strategy.connect(own["Wrapper"](own["make_model"](3)))
    trainer.save_checkpoint(folder / "wrapped.ckpt")
    for run in ("demo", "shortcut"):
        write_run(folder / "logs" / run / "version_0")
    return folder


@pytest.fixture
def reader(belongings, tmp_path, monkeypatch):
    """Run the test in a copy of the reader's folder; methods that a page registers are removed after it."""
    shutil.copytree(belongings, tmp_path / "reader", symlinks=True)
    monkeypatch.chdir(tmp_path / "reader")
    monkeypatch.syspath_prepend(tmp_path / "reader")
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setenv("PL_TRAINER_LIMIT_TRAIN_BATCHES", "1")
    create = timm.create_model

    def create_without_network(name, pretrained=False, **options):
        return create(name, **(TINY if pretrained else {}) | options)

    monkeypatch.setattr(timm, "create_model", create_without_network)


# The objects that a page assumes the reader to have.
OWN = {
    "README.md": lambda: {"Trainer": pl.Trainer},
    "docs/extending.md": lambda: {
        "module": SmallClassifier(),
        "train": DataLoader(samples(8), batch_size=4),
        "val": DataLoader(samples(8), batch_size=4),
    },
}


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page):
    document = SYBIL.parse(ROOT / page)
    document.namespace.update(OWN.get(page, dict)(), __name__="page")
    for example in document:
        example.evaluate()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_tested(page):
    opened = re.findall(r"^ *```(.*)\n(?:.*\n)*? *```$", (ROOT / page).read_text(), re.MULTILINE)
    assert set(opened) <= {"python", "bash", "yaml", "text"}


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 160


def test_the_drawing_shows_the_rules_of_rollout():
    drawing = runpy.run_path(str(ROOT / "docs/make_block_drawing.py"))
    model = models.spread(drawing["untrained"]()).double().eval()
    drawing["followed"](model, drawing["squares"](1, seed=0)[0].double())  # checks each step


def public(module: str) -> dict[str, Any]:
    """Return the names in a module's `__all__`, or else the public functions and classes that it defines."""
    found = import_module(module)
    own = [name for name, value in vars(found).items() if getattr(value, "__module__", "").startswith(module)]
    names = getattr(found, "__all__", [name for name in own if not name.startswith("_")])
    return {f"{module}.{name}": getattr(found, name) for name in names}


@pytest.mark.parametrize(
    "module",
    [
        "vitx",
        "vitx.callbacks",
        "vitx.functional",
        "vitx.evaluation.faithfulness",
        "vitx.evaluation.metrics",
        "vitx.evaluation.perturbation",
        "vitx.watch",
    ],
)
def test_the_api_pages_list_everything_public(module):
    shown: list[Any] = []
    for page in (ROOT / "docs/api").glob("*.md"):
        for name in re.findall("^::: (.*)", page.read_text(), re.MULTILINE):
            found = resolve_name(re.sub(r"^callbacks", "vitx.callbacks", name))  # named by source folder
            shown += public(name).values() if isinstance(found, ModuleType) else [found]
    assert [name for name, value in public(module).items() if value not in shown] == []

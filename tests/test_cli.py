"""The command as a whole, and what sweep and compare draw."""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import vitx
from tests import models
from vitx.cli import COMMANDS, main
from vitx.pictures.render import TILE_WIDTH

NAME = "deit_tiny_patch16_224"
OPTIONS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A picture, and two models that differ."""
    made = tmp_path_factory.mktemp("compared")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(made / "cat.png")
    model = models.spread(timm.create_model(NAME, num_classes=7, **OPTIONS))
    save_file(model.state_dict(), made / "first.safetensors")
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(-1)
    save_file(model.state_dict(), made / "last.safetensors")
    return made


def options(folder, *names):
    words = ["--model", NAME, "--model-options", json.dumps(OPTIONS)]
    for name in names:
        words += ["--weights", str(folder / f"{name}.safetensors")]
    return words


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_says_what_it_does(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"vitx {command} " in said
    assert "--output" in said


def test_says_its_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"vitx {vitx.__version__}\n"


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "vitx", "nope"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], 'expected "command"'),
        (["explain"], "explain.paths"),
        (["explain", "-cat.jpg"], "put file names that begin with a dash after a lone --"),
    ],
)
def test_words_that_are_missing_or_wrong(words, sentence, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert sentence in said


class TestSweep:
    def test_every_cell_is_its_own_explanation(self, folder, tmp_path, capsys):
        path = tmp_path / "sweep.png"
        words = ["sweep", str(folder / "cat.png"), *options(folder, "last"), "--output", str(path)]
        assert main([*words, "--discard-ratio", "0", "0.6", "0.95"]) == 0
        picture = np.asarray(Image.open(path))
        grid = 5 + 4 * (TILE_WIDTH + 5)
        assert picture.shape[1] == 2 * grid + 26
        model = timm.create_model(NAME, num_classes=7, **OPTIONS)
        model.load_state_dict(vitx.models.checkpoints.read_weights(folder / "last.safetensors"))
        for block, method in enumerate(("rollout", "grad_rollout")):
            for row, fusion in enumerate(("mean", "max", "min")):
                for column, ratio in enumerate((0, 0.6, 0.95), 1):
                    found = vitx.explain(
                        model.eval(), folder / "cat.png", method, head_fusion=fusion, discard_ratio=ratio
                    )
                    tile = Image.fromarray(found.overlays()[0].numpy())
                    wanted = np.asarray(tile.resize((TILE_WIDTH, TILE_WIDTH), Image.Resampling.BICUBIC))
                    top = 26 + 19 + row * (19 + TILE_WIDTH + 5) + 19
                    left = block * (grid + 26) + 5 + column * (TILE_WIDTH + 5)
                    cell = picture[top : top + TILE_WIDTH, left : left + TILE_WIDTH]
                    assert np.abs(cell.astype(int) - wanted).max() <= 2

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (["--output", "a.jpg"], "pictures are written as .png"),
            (["--discard-ratio", "1.5"], "discard_ratio must be"),
            (["--target", "9"], "there is no class 9"),
        ],
    )
    def test_refusals(self, folder, words, sentence, capsys, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert main(["sweep", str(folder / "cat.png"), *options(folder, "last"), *words]) == 2
        assert sentence in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


class TestCompare:
    def test_side_by_side(self, folder, tmp_path):
        path = tmp_path / "compare.png"
        words = ["compare", str(folder / "cat.png"), *options(folder, "first", "last")]
        words += ["--method", "rollout", "evidence"]
        assert main([*words, "--output", str(path)]) == 0
        picture = Image.open(path)
        assert picture.width == 5 + 4 * (224 + 5)  # the input, two maps and their difference
        assert picture.height == 19 + 2 * (19 + 224 + 5) + 38

    def test_one_alone(self, folder, capsys):
        assert main(["compare", str(folder / "cat.png"), *options(folder, "first")]) == 2
        assert "name at least two" in capsys.readouterr().err

"""The command as a whole, and the pictures of sweep and compare."""

import json
import os
import re
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
from tests.explain_command import NAME, OPTIONS, tiny
from vitx.cli import COMMANDS, main
from vitx.cli.options import read_settings
from vitx.errors import VitxError
from vitx.pictures.render import TILE_WIDTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a picture and the weights of two models."""
    made = tmp_path_factory.mktemp("compared")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(made / "cat.png")
    model = tiny()
    save_file(model.state_dict(), made / "first.safetensors")
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(-1)
    save_file(model.state_dict(), made / "last.safetensors")
    return made


def options(folder, *names):
    weights = [str(folder / f"{name}.safetensors") for name in names]
    return ["--model", NAME, "--model-options", json.dumps(OPTIONS), "--weights", *weights]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_says_what_it_does(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"vitx {command} " in said
    assert "--output" in said
    assert len(re.findall("^  -", said, re.MULTILINE)) <= 26


@pytest.mark.parametrize(
    ("words", "now"),
    [
        (["explain", "cat.jpg", "--hf", "my_model"], "there is no --hf: write --model NAME"),
        (["ask", "cat.jpg", "--hf=my_model", "--prompt", "a"], "there is no --hf: write --model NAME"),
        (
            ["compare", "cat.jpg", "--checkpoint", "a.ckpt", "--module", "own.Net"],
            "there is no --checkpoint: write --weights FILE with --model package.module:name",
        ),
        (
            ["sanity", "cat.jpg", "--factory", "own.net"],
            "there is no --factory: write --model package.module:name",
        ),
        (["explain", "cat.jpg", "--model", NAME, "--json"], "there is no --json: write --save png json"),
        (
            ["explain", "cat.jpg", "--model", NAME, "--device", "cuda"],
            "there is no --device: write --run-options accelerator=gpu",
        ),
        (
            ["explain", "cat.jpg", "--model", NAME, "--head-fusion", "max"],
            "there is no --head-fusion: write --method-options head_fusion=VALUE",
        ),
    ],
)
def test_unknown_options_say_what_to_write_instead(words, now, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err == f"error: {now}\n"


def test_no_command_names_the_option_of_another(tmp_path, capsys):
    """`timelapse` takes no `--input-options`, and `sweep` no `--run-options`; it keeps `--discard-ratio`."""
    assert main(["timelapse", str(tmp_path), "--frames", "3"]) == 2
    assert capsys.readouterr().err.lower() == "error: unrecognized arguments: --frames 3\n"
    assert main(["sweep", "cat.jpg", "--model", NAME, "--device", "cuda"]) == 2
    assert capsys.readouterr().err.lower() == "error: unrecognized arguments: --device cuda\n"
    assert main(["sweep", str(tmp_path / "a.png"), "--model", NAME, "--discard-ratio", "2"]) == 2
    assert "discard_ratio must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (
            ["a=1", "b=0.5,1e-3", "c=x.Y", "d=true", "e="],
            {"a": 1, "b": [0.5, 1e-3], "c": "x.Y", "d": True, "e": None},
        ),
        (['{"a": {"b": 2}}', "c=[1, 2]"], {"a": {"b": 2}, "c": [1, 2]}),
        (["net={class_path: a.B, init_args: {n: 3}}"], {"net": {"class_path": "a.B", "init_args": {"n": 3}}}),
    ],
)
def test_settings_are_read_as_they_are_typed(words, found):
    assert read_settings("--model-options", words) == found


@pytest.mark.parametrize("word", ['{"depth": 4', "{[4]: 2", "{"])
def test_an_object_that_does_not_end_is_said(word):
    with pytest.raises(VitxError, match=r"--model-options takes KEY=VALUE, found '\{"):
        read_settings("--model-options", [word])


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
        # The oldest supported jsonargparse names only one of them, in no fixed order.
        (["explain"], 'arguments are required: PATH, --model|Key "explain.(paths|model)" is required'),
        (["sanity", "--model", NAME], 'arguments are required: IMAGE$|Key "sanity.images" is required'),
        (["sweep", "cat.jpg"], 'required: --model|Key "sweep.model" is required'),
        (["explain", "--model", NAME, "-cat.jpg"], "put file names that begin with a dash after a lone --"),
        (["sweep", "cat.jpg", "dog.jpg", "--model", NAME], "dog.jpg; name pictures first, and only one"),
    ],
)
def test_words_that_are_missing_or_wrong(words, sentence, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert re.search(sentence, said)


def test_without_words_it_shows_its_help(capsys):
    assert main([]) == 2
    assert "explain pictures, one or a million" in capsys.readouterr().err


def test_the_reader_of_its_output_may_end_first():
    reader, writer = os.pipe()
    os.close(reader)
    said = "import sys, types, vitx.cli; sys.modules['vitx.cli.sweep'] = types.SimpleNamespace(__doc__='', "
    said += "add_options=lambda command: None, run=lambda options: print('a line')); "
    said += "sys.exit(vitx.cli.main(['sweep']))"
    done = subprocess.run([sys.executable, "-c", said], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(("command", "goes_on"), [("explain", True), ("sanity", False)])
def test_only_explain_can_be_resumed(command, goes_on, capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"vitx.cli.{command}.run", interrupted)
    assert main([command, "cat.jpg", "--model", NAME]) == 130
    assert ("--resume" in capsys.readouterr().err) == goes_on


class TestSweep:
    def test_every_cell_is_its_own_explanation(self, folder, tmp_path, capsys):
        path = tmp_path / "sweep.png"
        words = ["sweep", str(folder / "cat.png"), *options(folder, "last"), "--output", str(path)]
        assert main([*words, "--discard-ratio", "0", "0.6", "0.95"]) == 0
        picture = np.asarray(Image.open(path))
        grid = 5 + 4 * (TILE_WIDTH + 5)
        assert picture.shape[1] == 2 * grid + 24
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
                    top = 19 + 5 + 19 + row * (19 + TILE_WIDTH + 5) + 19
                    left = block * (grid + 24) + 5 + column * (TILE_WIDTH + 5)
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

    @pytest.mark.parametrize("words", [[], ["--target", "0"], ["--target", "yes"]])
    def test_of_a_model_with_one_logit(self, folder, words, tmp_path, monkeypatch):
        """One logit distinguishes two classes, and each class has its own probability."""
        cat, weights, names = folder / "cat.png", tmp_path / "one.safetensors", tmp_path / "names.txt"
        model = models.spread(timm.create_model(NAME, num_classes=1, **OPTIONS)).eval()
        with torch.no_grad():
            model.head.bias += 1 - model(vitx.explain(model, cat).images)[0]
        save_file(model.state_dict(), weights)
        names.write_text("no\nyes\n")
        titles, beside = [], vitx.pictures.render.beside
        monkeypatch.setattr(vitx.pictures.render, "beside", lambda one: titles.extend(one) or beside(one))
        naming = ["--model", NAME, "--model-options", json.dumps(OPTIONS)]
        naming += ["--weights", str(weights), "--class-names", str(names)]
        output = ["--output", str(tmp_path / "sweep.png")]
        assert main(["sweep", str(cat), *naming, *words, *output]) == 0
        assert titles[1] == f"gradient rollout: {'no 27%' if '0' in words else 'yes 73%'}"


class TestCompare:
    def test_side_by_side(self, folder, tmp_path):
        path = tmp_path / "compare.png"
        words = ["compare", str(folder / "cat.png"), *options(folder, "first", "last")]
        words += ["--method", "rollout", "evidence"]
        assert main([*words, "--output", str(path)]) == 0
        picture = Image.open(path)
        assert picture.width == 5 + 4 * (224 + 5)  # the input, two maps and their difference
        assert picture.height == 19 + 2 * (19 + 224 + 5) + 38

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (["--model", NAME, "--weights", "a"], "name at least two to compare"),
            (["--model", "a", "b", "--weights", "a", "b", "c"], "2 models and 3 files of weights"),
        ],
    )
    def test_refusals(self, folder, words, sentence, capsys):
        assert main(["compare", str(folder / "cat.png"), *words]) == 2
        assert sentence in capsys.readouterr().err

    def test_a_folder_is_no_picture(self, folder, tmp_path, capsys):
        for name in "ab":
            (tmp_path / f"{name}.png").write_bytes((folder / "cat.png").read_bytes())
        assert main(["compare", str(tmp_path), *options(folder, "first", "last")]) == 2
        assert f"{tmp_path} means 2 pictures: name one" in capsys.readouterr().err

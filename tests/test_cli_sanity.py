"""`vitx sanity`: its text, its picture and its refusals."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import vitx
from tests.explain_command import NAME, OPTIONS, tiny
from vitx.cli import main


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """Return a folder with two pictures, a file that is not an image, and the model."""
    made = tmp_path_factory.mktemp("sanity")
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), np.uint8)).save(made / name)
    (made / "text.jpg").write_text("no picture")
    save_file(model.state_dict(), made / "tiny.safetensors")
    return made


def command(folder, *words):
    said = ["--model", NAME, "--model-options", json.dumps(OPTIONS), "--weights", folder / "tiny.safetensors"]
    return [str(word) for word in ("sanity", folder / "a.png", folder / "b.png", *said, *words)]


def test_what_it_says_is_what_python_finds(folder, model, tmp_path, capsys):
    path = tmp_path / "sanity.png"
    words = ["--method", "grad_rollout", "rollout", "--target", 3, "--seed", 4, "--output", path]
    assert main(command(folder, *words)) == 0
    images = [folder / "a.png", folder / "b.png"]
    found = vitx.sanity(model, images, ["grad_rollout", "rollout"], target=3, seed=4)
    sentences = [found.sentence(method) for method in ("grad_rollout", "rollout")]
    assert capsys.readouterr().out == "\n".join([str(found), "", *sentences, f"see {path}", ""])
    assert np.array_equal(np.asarray(Image.open(path)), found.picture())


def test_the_picture_has_the_colors_of_the_input(folder, tmp_path):
    """The colors do not depend on the normalization."""
    Image.new("RGB", (40, 40), (90, 140, 190)).save(tmp_path / "flat.png")
    words = command(
        folder, "--input-options", "mean=0.1,0.2,0.3", "std=0.4", "--output", tmp_path / "sanity.png"
    )
    words[1:3] = [str(tmp_path / "flat.png")]
    assert main(words) == 0
    middle = Image.open(tmp_path / "sanity.png").getpixel((5 + 85, 38 + 85))
    assert np.abs(np.subtract(middle, (90, 140, 190))).max() <= 1


def test_by_default_all_methods_are_named(folder, tmp_path, capsys):
    assert main(command(folder, "--output", tmp_path / "sanity.png")) == 0
    said = capsys.readouterr().out.splitlines()
    for method in set(vitx.methods()) - {"flow"}:
        assert any(line.startswith(f"{method} ") for line in said)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--output", "a.jpg"], "pictures are written as .png"),
        (["--method", "nope"], "there is no method 'nope'"),
        (["--target", "9"], "there is no class 9"),
        (["--seed", "-1"], "seed must be a whole number from 0"),
        (["--seed", "x"], "Got value: x"),
        (["--input-options", "size=0"], "size must be a whole number from 1"),
    ],
)
def test_refusals(folder, words, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(command(folder, *words)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["absent.jpg", "text.jpg"])
def test_files_that_are_no_pictures(folder, name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*command(folder)[:1], str(folder / name), *command(folder)[2:]]) == 2
    assert name in capsys.readouterr().err

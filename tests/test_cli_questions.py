"""`vitx explain` for a patch, a region or the objects of a detector."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vitx
from tests.dense_models import save
from tests.explain_command import NAME, OPTIONS, save_weights, tiny
from vitx.cli import main
from vitx.models.named import load_hugging_face
from vitx.targets import best_queries, query, region, similar_to, token


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a segmenter, two detectors (`detr` takes any aspect ratio), and two pictures."""
    place = tmp_path_factory.mktemp("questions")
    for name in ("segformer", "yolos", "detr"):
        save(name, place / name)
    generator = np.random.default_rng(0)
    for name, shape in (("cat", (40, 60, 3)), ("dog", (50, 40, 3))):
        Image.fromarray(generator.integers(0, 255, shape, np.uint8)).save(place / f"{name}.png")
    return place


def explained(folder, tmp_path, model, *words):
    paths = [str(folder / name) for name in ("cat.png", "dog.png")]
    options = ["--run-options", "workers=1", "--output", str(tmp_path)]
    return main(["explain", *paths, "--model", str(folder / model), *words, *options])


@pytest.mark.parametrize(
    ("model", "words", "key", "target"),
    [
        ("segformer", ["--patch", "3", "5"], "patch_3_5", token(3, 5)),
        ("segformer", ["--region", "3", "0", "0", "16", "32"], "region_3", region(3, box=(0, 0, 16, 32))),
        ("yolos", ["--objects", "3"], "object_2", None),
        ("detr", ["--objects", "2"], "object_2", None),
    ],
)
def test_it_is_what_python_says(folder, tmp_path, model, words, key, target):
    assert (
        explained(folder, tmp_path, model, *words, "--save", "png", "maps", "json", "--method", "evidence")
        == 0
    )
    net, prepare, *_ = load_hugging_face(str(folder / model))
    for name in ("cat.png", "dog.png"):
        image = prepare(Image.open(folder / name))[None]
        asked = target or query(best_queries(vitx.explain(net.eval(), image), 2)[:, 1])
        wanted = vitx.explain(net.eval(), image, "evidence", target=asked)
        found = np.load(tmp_path / f"{name}.npz")[f"evidence_{key}"]
        assert np.allclose(found, wanted.maps[0], atol=1e-5)
        facts = json.loads((tmp_path / f"{name}.json").read_text())["maps"]
        said = next(one for one in facts if one["question"] == key)
        assert said["said"] == wanted.captions[0]
        assert (said["box"] is None) == (wanted.boxes is None)
        assert Image.open(tmp_path / f"{name}.png").size[0] > 400


@pytest.mark.parametrize(
    ("model", "words", "said"),
    [
        ("segformer", ["--objects", "2"], "--objects needs a detector, but the model returns (2, 5, 8, 8)"),
        ("segformer", ["--patch", "3"], "--patch: expected 2 arguments"),
        (
            "segformer",
            ["--patch", "3", "9"],
            "there is no patch in row 3, column 9: there are rows 0 to 7 and columns 0 to 7",
        ),
        ("segformer", ["--region", "3", "0", "0", "40", "8"], "not inside images of 32 x 32 pixels"),
        ("segformer", ["--patch", "3", "2", "--target", "3"], "--patch cannot be combined with other"),
        ("segformer", [], "use vitx explain with --region, --objects or --patch"),
        ("yolos", ["--objects", "7"], "cannot choose 7 of 6 queries: ask for 1 to 6"),
    ],
)
def test_bad_words(folder, tmp_path, capsys, model, words, said):
    assert explained(folder, tmp_path / "out", model, *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_picture(tmp_path, capsys):
    """Both pictures get a map, side by side, and the similarity is reported."""
    torch.manual_seed(0)
    weights = save_weights(tmp_path / "tiny.safetensors")
    generator, colors = np.random.default_rng(0), []
    for name in ("cat", "dog", "owl"):
        pixels = generator.integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        colors.append(pixels)
    cat, dog, owl = (tmp_path / f"{name}.png" for name in ("cat", "dog", "owl"))
    words = ["--model", NAME, "--weights", weights]
    words += ["--model-options", json.dumps(OPTIONS), "--save", "png", "maps", "json"]
    words += ["--output", tmp_path / "o"]
    words = ["explain", cat, dog, *words, "--similar-to", owl, "--method", "evidence"]
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    for place, file in enumerate((cat, dog)):
        wanted = vitx.explain(tiny(), file, "evidence", target=similar_to(owl))
        assert f"{file}: {wanted.captions[0]}, see" in said
        with np.load(tmp_path / "o" / f"{file.name}.npz") as arrays:
            assert set(arrays) == {"logits", "evidence_similar", "evidence_similar_other"}
            assert np.allclose(arrays["evidence_similar"], wanted.maps[0], atol=1e-6)
            assert np.allclose(arrays["evidence_similar_other"], wanted.maps[1], atol=1e-6)
        drawn = np.asarray(Image.open(tmp_path / "o" / f"{file.name}.png"))
        assert drawn.shape[1] == 5 + 4 * (224 + 5)
        for column, pixels in ((0, colors[place]), (2, colors[2])):
            left = 5 + column * (224 + 5)
            mean = drawn[38 : 38 + 224, left : left + 224].mean((0, 1))
            assert np.abs(mean - pixels.mean((0, 1))).max() < 2
    assert main([str(word) for word in [*words[:-4], "--similar-to", tmp_path / "none.png"]]) == 2
    assert "there is no file or folder" in capsys.readouterr().err


def test_a_trace_of_a_question(folder, tmp_path, capsys):
    assert explained(folder, tmp_path, "segformer", "--patch", "1", "1", "--trace") == 0
    said = capsys.readouterr().out
    assert "classifier" in said
    assert "1.0000" in said

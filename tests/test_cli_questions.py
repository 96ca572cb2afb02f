"""`vitx explain` asked for a patch, a region or the objects of a detector."""

import json

import numpy as np
import pytest
from PIL import Image

import vitx
from tests.dense_models import save
from vitx.cli import main
from vitx.models.hub import load_hugging_face
from vitx.targets import best_queries, query, region, token


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A segmenter, two detectors, one of which takes pictures of any proportions, and two pictures."""
    place = tmp_path_factory.mktemp("questions")
    for name in ("segformer", "yolos", "detr"):
        save(name, place / name)
    generator = np.random.default_rng(0)
    for name, shape in (("cat", (40, 60, 3)), ("dog", (50, 40, 3))):
        Image.fromarray(generator.integers(0, 255, shape, np.uint8)).save(place / f"{name}.png")
    return place


def explained(folder, tmp_path, model, *words):
    paths = [str(folder / name) for name in ("cat.png", "dog.png")]
    options = ["--accelerator", "cpu", "--workers", "1", "--output", str(tmp_path)]
    return main(["explain", *paths, "--hf", str(folder / model), *words, *options])


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
    assert explained(folder, tmp_path, model, *words, "--save-maps", "--json", "--method", "evidence") == 0
    net, prepare, _ = load_hugging_face(str(folder / model))
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
        ("segformer", ["--objects", "2"], "--objects takes a detector, and the model puts out (2, 5, 8, 8)"),
        ("segformer", ["--patch", "3"], "--patch takes a row and a column, found 3"),
        ("segformer", ["--patch", "3", "9"], "(3, 9) (row, column) lies outside the 8 x 8 patches"),
        ("segformer", ["--region", "3", "0", "0", "40", "8"], "not inside images of 32 x 32 pixels"),
        ("segformer", ["--patch", "3", "2", "--target", "3"], "--patch is a question of its own"),
        ("segformer", [], "ask vitx explain by --region, --objects or --patch"),
        ("yolos", ["--objects", "7"], "7 objects of 6 queries"),
    ],
)
def test_bad_words(folder, tmp_path, capsys, model, words, said):
    assert explained(folder, tmp_path / "out", model, *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_trace_of_a_question(folder, tmp_path, capsys):
    assert explained(folder, tmp_path, "segformer", "--patch", "1", "1", "--trace") == 0
    said = capsys.readouterr().out
    assert "classifier" in said
    assert "1.0000" in said

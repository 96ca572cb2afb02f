"""The command asks of texts and of words, as a stranger would type it."""

import json

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image

import vitx
from tests import texts, vision_language
from vitx.cli import main
from vitx.inputs.processors import load_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models that are saved with all that belongs to them, and a picture."""
    folder = tmp_path_factory.mktemp("models")
    texts.save_clip(folder / "clip")
    vision_language.save("LLaVA", folder / "llava")
    Image.effect_noise((40, 32), 80).convert("RGB").save(folder / "cat.png")
    Image.effect_noise((32, 32), 80).convert("RGB").save(folder / "dog.png")
    return folder


def asked(folder, capsys, *words):
    """Runs the command in the folder, and returns its status and what it said."""
    status = main([str(word) for word in words])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_texts(folder, tmp_path, capsys):
    """One map for each text, as in Python; the caption says similarities and their softmax."""
    words = ["--text", "a cat", "a dog", "--output", tmp_path, "--json", "--save-maps"]
    status, said = asked(folder, capsys, "explain", folder / "cat.png", "--hf", folder / "clip", *words)
    assert status == 0, said
    model = transformers.CLIPModel.from_pretrained(folder / "clip").eval()
    image = load_processor(model, str(folder / "clip"))(Image.open(folder / "cat.png"))[None]
    target = vitx.targets.text("a cat", "a dog", tokenizer=texts.tokenizer())
    wanted = vitx.explain(model, image, "evidence", target=target)
    with np.load(next(tmp_path.glob("*.npz"))) as arrays:
        for number in range(2):
            assert np.allclose(arrays[f"evidence_{number}"], wanted.maps[number], atol=1e-6)
    assert ", ".join(wanted.captions) in said
    facts = json.loads((tmp_path / "cat.png.json").read_text())
    assert [one["said"] for one in facts["maps"]] == wanted.captions


def test_one_text_against_another(folder, tmp_path, capsys):
    words = ["--text", "a cat", "--against", "a wolf", "--output", tmp_path, "--json"]
    status, said = asked(folder, capsys, "explain", folder / "cat.png", "--hf", folder / "clip", *words)
    assert status == 0, said
    assert "a cat, not a wolf: " in said
    (facts,) = json.loads((tmp_path / "cat.png.json").read_text())["maps"]
    assert (facts["target_name"], facts["against_name"], facts["target_probability"]) == (
        "a cat",
        "a wolf",
        None,
    )
    status, said = asked(
        folder, capsys, "explain", folder / "cat.png", "--hf", folder / "clip", *words[:4], "--trace"
    )
    assert "softmax" in said or "attention" in said


def test_a_model_of_open_clip(folder, tmp_path, capsys):
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (tmp_path / "ViT-tiny-8.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "ViT-tiny-8.json")
    torch.save(open_clip.create_model("ViT-tiny-8").state_dict(), tmp_path / "tiny.pth")
    words = ["--open-clip", "ViT-tiny-8", "--weights", tmp_path / "tiny.pth", "--text", "a cat", "a dog"]
    status, said = asked(folder, capsys, "explain", folder / "cat.png", *words, "--output", tmp_path / "maps")
    assert status == 0, said
    assert "a cat: " in said
    assert "a dog: " in said
    loaded = open_clip.create_model("ViT-tiny-8", pretrained=str(tmp_path / "tiny.pth")).eval()
    target = vitx.targets.text("a cat", tokenizer=open_clip.get_tokenizer("ViT-tiny-8"))
    assert vitx.explain(loaded, folder / "cat.png", target=target).captions[0] in said


def test_words(folder, tmp_path, capsys):
    options = ["--hf", folder / "llava", "--prompt", "what is it", "--output", tmp_path / "ask.png"]
    pictures = [folder / "cat.png", folder / "dog.png"]
    status, said = asked(folder, capsys, "ask", *pictures, *options, "--word", "dog", "cat")
    assert status == 0, said
    target = vitx.targets.word("dog", "cat", prompt="what is it")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "llava").eval()
    wanted = vitx.explain(model, pictures, "evidence", target=target)
    assert said.splitlines()[:2] == [wanted.captions[0], wanted.captions[2]]
    assert Image.open(tmp_path / "ask.png").width > 3 * 224
    status, said = asked(folder, capsys, "ask", folder / "cat.png", *options, "--most-tokens", 3)
    assert status == 0, said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["explain", "--text", "a"],
            "--text needs a model of images and texts: either --hf NAME, or --open-clip",
        ),
        (
            ["explain", "--hf", "clip", "--text", "a", "--target", "3"],
            "--text says what is asked for: leave out",
        ),
        (
            ["explain", "--hf", "clip", "--text", "a", "--method", "rollout"],
            "needs a method of a class, and rollo",
        ),
        (
            ["explain", "--hf", "clip", "--text", "a", "--mean", "0.5"],
            "--hf uses the image processor of the mode",
        ),
        (
            ["explain", "--hf", "clip", "--text", "a", "--class-names", "x"],
            "--class-names does not go with --tex",
        ),
        (["explain", "--hf", "clip"], "to compare images with texts, add --text"),
        (
            ["explain", "--hf", "llava", "--text", "a"],
            "which compares no images with texts: leave out --text",
        ),
        (["explain", "--open-clip", "ViT-B-32"], "--open-clip compares pictures with texts: add --text"),
        (
            ["explain", "--open-clip", "ViT-B-32", "--text", "a"],
            "say which weights ViT-B-32 is to have: --weights",
        ),
        (["explain", "--open-clip", "none", "--weights", "x", "--text", "a"], "open_clip cannot make none: "),
        (["ask", "--hf", "clip", "--prompt", "a"], "clip holds nothing that answers prompts about pictures"),
        (["ask", "--hf", "llava", "--prompt", "a", "--word", "wolf"], "the model knows no word 'wolf'"),
        (["ask", "--hf", "llava", "--prompt", "a", "--most-tokens", "0"], "--most-tokens must be at least 1"),
        (["ask", "--hf", "llava", "--prompt", "a", "--method", "none"], "there is no method 'none'"),
    ],
)
def test_says_what_is_wrong(words, sentence, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    command, *options = words
    output = tmp_path / ("ask.png" if command == "ask" else "maps")
    status, said = asked(folder, capsys, command, "cat.png", *options, "--output", output)
    assert status == 2
    assert sentence in said
    assert said.count("\n") == 1

"""Commands that ask about texts and words, as a new user would type them."""

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
    """Return a folder with models, saved with everything that belongs to them, and two pictures."""
    folder = tmp_path_factory.mktemp("models")
    texts.save_clip(folder / "clip")
    vision_language.save("LLaVA", folder / "llava")
    Image.effect_noise((40, 32), 80).convert("RGB").save(folder / "cat.png")
    Image.effect_noise((32, 32), 80).convert("RGB").save(folder / "dog.png")
    return folder


def asked(capsys, *words):
    """Run the command, and return its status and its output."""
    status = main([str(word) for word in words])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_texts(folder, tmp_path, capsys):
    """There is one map for each text, as in Python; captions give similarities and their softmax."""
    words = [
        "--text",
        "a cat",
        "a dog",
        "--output",
        tmp_path,
        "--save",
        "png",
        "maps",
        "json",
        "--method",
        "evidence",
    ]
    status, said = asked(capsys, "explain", folder / "cat.png", "--model", folder / "clip", *words)
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
    words = ["--text", "a cat", "--against", "a wolf", "--output", tmp_path, "--save", "json"]
    status, said = asked(capsys, "explain", folder / "cat.png", "--model", folder / "clip", *words)
    assert status == 0, said
    assert "a cat, not a wolf: " in said
    (facts,) = json.loads((tmp_path / "cat.png.json").read_text())["maps"]
    assert (facts["target_name"], facts["against_name"], facts["target_probability"]) == (
        "a cat",
        "a wolf",
        None,
    )
    status, said = asked(
        capsys, "explain", folder / "cat.png", "--model", folder / "clip", *words[:4], "--trace"
    )
    assert status == 0, said
    assert all(f" {step} " in said for step in ("linalg_vector_norm", "mm", "sub")), "similarities"


def test_a_model_of_open_clip(folder, tmp_path, capsys):
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (tmp_path / "ViT-tiny-8.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "ViT-tiny-8.json")
    torch.save(open_clip.create_model("ViT-tiny-8").state_dict(), tmp_path / "tiny.pth")
    words = [
        "--model",
        "open_clip:ViT-tiny-8",
        "--weights",
        tmp_path / "tiny.pth",
        "--text",
        "a cat",
        "a dog",
    ]
    status, said = asked(capsys, "explain", folder / "cat.png", *words, "--output", tmp_path / "maps")
    assert status == 0, said
    assert "a cat: " in said
    assert "a dog: " in said
    status, said_without = asked(capsys, "explain", folder / "cat.png", *words[:4])
    assert status == 2
    assert "compares images with texts: add --text" in said_without
    loaded = open_clip.create_model("ViT-tiny-8", pretrained=str(tmp_path / "tiny.pth")).eval()
    target = vitx.targets.text("a cat", tokenizer=open_clip.get_tokenizer("ViT-tiny-8"))
    assert vitx.explain(loaded, folder / "cat.png", target=target).captions[0] in said


def test_words(folder, tmp_path, capsys):
    options = ["--model", folder / "llava", "--prompt", "what is it", "--output", tmp_path / "ask.png"]
    pictures = [folder / "cat.png", folder / "dog.png"]
    status, said = asked(capsys, "ask", *pictures, *options, "--word", "dog", "cat")
    assert status == 0, said
    target = vitx.targets.word("dog", "cat", prompt="what is it")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "llava").eval()
    wanted = vitx.explain(model, pictures, "evidence", target=target)
    assert said.splitlines()[:2] == [wanted.captions[0], wanted.captions[2]]
    assert Image.open(tmp_path / "ask.png").width > 3 * 224
    status, said = asked(capsys, "ask", pictures[0], *options, "--max-tokens", 3)
    assert status == 0, said
    wanted = vitx.explain(model, pictures[0], target=vitx.targets.answer("what is it", most_tokens=3))
    assert said.splitlines()[:3] == wanted.captions


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["explain", "--text", "a"], "required: --model"),
        (["explain", "--model", "deit_tiny_patch16_224", "--text", "a"], "compares no images with texts"),
        (["explain", "--model", "clip", "--text", "a", "--target", "3"], "--text cannot be combined with"),
        (
            ["explain", "--model", "clip", "--text", "a", "--patch", "3", "3"],
            "--text cannot be combined with other questions: leave out --patch",
        ),
        (
            ["explain", "--model", "clip", "--text", "a", "--method", "rollout"],
            "needs a method for classes, not rollout:",
        ),
        (
            ["explain", "--model", "clip", "--text", "a", "--input-options", "mean=0.5"],
            "clip has an image processor of its own: leave out --input-options mean",
        ),
        (
            ["explain", "--model", "clip", "--text", "a", "--class-names", "x"],
            "--class-names needs a model with classes",
        ),
        (["explain", "--model", "clip"], "compares images with texts: add --text"),
        (["explain", "--model", "llava", "--text", "a"], "which compares no images with texts"),
        (["explain", "--model", "open_clip:ViT-B-32"], "say which weights ViT-B-32 is to have: --weights"),
        (
            ["explain", "--model", "open_clip:none", "--weights", "x", "--text", "a"],
            "open_clip cannot make none: ",
        ),
        (
            ["ask", "--model", "clip", "--prompt", "a"],
            "clip holds nothing that answers prompts about pictures",
        ),
        (["ask", "--model", "llava", "--prompt", "a", "--word", "wolf"], "unknown word 'wolf'"),
        (
            ["ask", "--model", "llava", "--prompt", "a", "--max-tokens", "0"],
            "--max-tokens must be at least 1",
        ),
        (["ask", "--model", "llava", "--prompt", "a", "--method", "none"], "there is no method 'none'"),
    ],
)
def test_says_what_is_wrong(words, sentence, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    command, *options = words
    output = tmp_path / ("ask.png" if command == "ask" else "maps")
    status, said = asked(capsys, command, "cat.png", *options, "--output", output)
    assert status == 2
    assert sentence in said
    assert said.count("\n") == 1

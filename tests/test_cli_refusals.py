"""What `vitx explain` refuses, and how it says so."""

import pytest
import timm
import torch
from PIL import Image

from tests.explain_command import NAME, command
from vitx.cli import main


def damaged(folder, name):
    path = folder / name
    if name == "tiny.png":
        Image.new("RGB", (1, 1)).save(path)
    if name == "bomb.png":
        Image.new("1", (20_000, 20_000)).save(path)
    return path


class TestRefusals:
    """Each refusal is one sentence with exit status 2, and nothing is written."""

    def refused(self, arguments, capsys, output):
        try:
            status = main([str(word) for word in arguments])
        except SystemExit as stop:
            status = stop.code
        assert status == 2
        assert not output.exists()
        said = capsys.readouterr().err.strip().splitlines()
        assert "Traceback" not in "".join(said)
        assert said[-1].startswith("error: ")
        return "\n".join([*said, ""])

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("absent.jpg", "there is no file or folder"),
            ("*.bmp", "nothing matches"),
            ("text.jpg", "is not an image file that can be read"),
            ("broken.jpg", "could not be read, it may be damaged"),
            ("tiny.png", "1 x 1 pixels: at least 8 x 8"),
            ("bomb.png", "more than the 100,000,000 that are allowed"),
        ],
    )
    def test_files(self, folder, weights, tmp_path, capsys, name, sentence):
        output = tmp_path / "maps"
        arguments = command(damaged(folder, name), "--output", output, weights=weights)
        assert sentence in self.refused(arguments, capsys, output)

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (
                ["--method-options", "discard_ratio=1.5"],
                "discard_ratio must be at least 0 and below 1, found 1.5",
            ),
            (["--method-options", "discard_ratio=x"], "discard_ratio must be"),
            (["--method-options", "head_fusion=sum"], "head_fusion must be one of mean, max, min"),
            (["--method", "rollout", "gae", "--method-options", "head_fusion=max"], "gae has no option"),
            (["--method-options", "start_layer=9"], "start_layer must be from 0 to 1"),
            (["--method-options", "start_layer"], "--method-options takes KEY=VALUE, found 'start_layer'"),
            (["--method", "nope"], "there is no method 'nope'"),
            (["--method", "rollout", "--target", 7], "--target 7 needs a method for classes, not rollout:"),
            (["--method", "rollout", "attention", "--target", 7], "classes, not rollout or attention: add"),
            (["--target", "tabby"], "the class names are unknown"),
            (["--target", 7], "there is no class 7"),
            (["--against", 1], "--against compares two classes: name both"),
            (["--target", 1, "--against", 1], "--target and --against are the same class, 1"),
            (["--method", "rollout", "--against", 2], "--against needs a method for classes"),
            (["--batch-size", 0], "--batch-size must be at least 1"),
            (["--model", "own:Net"], "there is no class or function own:Net"),
            (["--input-options", "mean=0.5,0.5"], "mean has 2 values"),
            (["--input-options", "std=0"], "std must be above 0"),
            (["--input-options", "size=0"], "--input-options: size must be a whole number from 1, found 0"),
            (["--input-options", "width=3"], "--input-options has no 'width': it takes size, frames"),
            (["--run-options", "workers=0"], "--run-options: workers must be a whole number from 1, found 0"),
            (["--save", "gif"], "--save takes png, webp, jpg, maps, json, shards, found gif\n"),
            (["--save", __file__], f"found {__file__}: paths come before the options"),
            (["--trace", "--html"], "--trace writes nothing: leave out --html"),
            (["--trace", "--save", "maps"], "--trace writes nothing: leave out --save"),
            (["--target", -1], "there is no class -1: the model has classes 0 to 6"),
            (["--region", 1, 0, 0, 8, 8], "the output is (5, 7): ask about a class, since it has no spatial"),
            (["--patch", 4, 2], "there is no patch in row 4, column 2: there are rows 0 to 3 and columns"),
            (
                ["--save", "shards", "--input-options", "keep_aspect=true"],
                "--save shards needs maps of one size",
            ),
            (["--overview", "--resume"], "--overview needs all pictures in one process: leave out --resume"),
            (["--run-options", "accelerator=gpu"], "torch can use no gpu here"),
            (["--run-options", "devices=foo"], "Lightning's Trainer does not take these settings"),
            (["--run-options", "accelerator=nope"], "Lightning's Trainer does not take these settings"),
            (["--model-options", "img_size=big"], "does not take these options"),
            (["--output", ""], "--output is empty"),
            (["--output", __file__], f"--output is the file {__file__}: give a folder"),
            (["--class-names", "absent.txt"], "the class names could not be read"),
            (["--class-names", __file__], "must name 7 classes, one a line: found "),
            (["--nope", 3], "--nope"),
        ],
    )
    def test_options(self, folder, weights, tmp_path, capsys, words, sentence):
        output = tmp_path / "maps"
        arguments = [*command(folder, "--output", output, weights=weights), *words]
        assert sentence in self.refused(arguments, capsys, output)

    @pytest.mark.parametrize(
        ("model", "sentence"),
        [
            (["--model", "deit_tinny_patch16_224", "--weights", "{}"], "similar names: deit_tiny"),
            (["--model", "resnet10t", "--weights", "{}"], "holds weights of another model"),
            (["--model", NAME, "--weights", "absent.pth"], "there is no weights file absent.pth"),
            (["--model", "train_demo:Classifier", "--weights", "absent.ckpt"], "there is no weights file"),
            (["--model", "absent/folder/", "--weights", "{}"], "there is no folder absent/folder/"),
            (["--model", "hf-hub:openai"], "there is no folder openai, and hf-hub: takes owner/name"),
            (["--model", "tests/"], "tests/ holds no model that was saved by transformers"),
            (["--model", "{}"], "is a file of weights: give it by --weights"),
        ],
    )
    def test_models(self, folder, weights, tmp_path, capsys, model, sentence):
        output = tmp_path / "maps"
        model = [word.format(weights) for word in model]
        arguments = ["explain", folder, *model, "--output", output]
        assert sentence in self.refused(arguments, capsys, output)

    def test_a_model_without_attention(self, folder, tmp_path, capsys):
        torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "a.pth")
        output = tmp_path / "maps"
        arguments = ["explain", folder, "--model", "resnet10t", "--weights", tmp_path / "a.pth"]
        said = self.refused([*arguments, "--output", output], capsys, output)
        assert "no attention between tokens was found" in said

    def test_an_output_that_cannot_be_written(self, folder, weights, tmp_path, capsys):
        (tmp_path / "file").write_text("here")
        output = tmp_path / "file" / "maps"
        arguments = command(folder, "--output", output, weights=weights)
        assert "could not be written" in self.refused(arguments, capsys, output)

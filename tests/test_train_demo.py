import sys
from pathlib import Path

import pytest
from PIL import Image

import train_demo
from demo import digits
from tests.run_folders import events
from train_demo import CONFIGS, with_defaults

DEMO = str(CONFIGS / "demo.yaml")
SMALL = [
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.limit_predict_batches=1",
    "--trainer.accelerator=cpu",
    "--data.init_args.batch_size=8",
]


def run(*words: str) -> None:
    train_demo.main(list(words))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_demo.py"])
    monkeypatch.setattr(digits, "SPLIT_SIZES", (4984, 8, 8))  # few images to explain


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([], ["fit", "--config", DEMO]),
        (["--config", "x.yaml"], ["fit", "--config", "x.yaml"]),
        (["-c", "x.yaml"], ["fit", "-c", "x.yaml"]),
        (["--config=x.yaml"], ["fit", "--config=x.yaml"]),
        (["fit"], ["fit", "--config", DEMO]),
        (["test", "--ckpt_path", "a"], ["test", "--config", DEMO, "--ckpt_path", "a"]),
        (["--data.root", "fit"], ["fit", "--config", DEMO, "--data.root", "fit"]),
        (["--data.root", "test"], ["fit", "--config", DEMO, "--data.root", "test"]),
        (["--help"], ["--help"]),
    ],
)
def test_completes_the_command_line(given, meant):
    assert with_defaults(given) == meant


def test_the_demo_from_the_first_picture_to_the_last(capsys, caplog):
    run(*SMALL, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1")
    assert "GPU available" in caplog.text
    assert "litlogger" not in caplog.text  # Lightning's tip to install it
    said = capsys.readouterr().out
    folder = Path("logs/demo/version_0")
    found = events(folder)
    assert [event.step for event in found.Images("vitx/maps")] == [0, 1, 3]
    assert {"val/accuracy", "train/loss", "vitx/grad_rollout/pointing"} <= set(found.Tags()["scalars"])
    checkpoint = next((folder / "checkpoints").glob("*.ckpt"))
    for words in (str(checkpoint), f"--logdir {folder}", "val/accuracy", "after_training.png"):
        assert words in said
    assert Image.open(folder / "after_training.png").width < 400

    run("test", *SMALL, "--ckpt_path", str(checkpoint))
    assert "test/accuracy" in capsys.readouterr().out
    run("validate", *SMALL, "--ckpt_path", str(checkpoint))
    assert "val/accuracy" in capsys.readouterr().out
    run("predict", *SMALL, "--ckpt_path", str(checkpoint))


def test_the_shipped_weights_know_their_task():
    module = train_demo.Classifier(
        10, weights="demo/letters.safetensors", model_options={"img_size": 64, "patch_size": 8, "depth": 4}
    )
    assert module.model.pos_embed.abs().sum() > 0
    assert (CONFIGS.parent / "demo" / "letters.safetensors").stat().st_size < 8e6


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model.weights=absent.safetensors"], "there is no weights file absent.safetensors"),
        (["--model.model_name=deit_smal"], "timm has no model 'deit_smal'"),
        (
            ["--trainer.callbacks+=vitx.callbacks.RolloutCallback", "--trainer.callbacks.num_images=0"],
            "num_images must be a whole number from 1",
        ),
        (["--model.nope=3"], "--model.nope"),
        (["--model.model_options.depth=3"], "holds weights of another model"),
    ],
)
def test_says_what_is_wrong_in_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*SMALL, *words)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert sentence in error

"""The callback for Hugging Face's Trainer, in whole trainings."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import vitx
from tests import run_folders
from tests.played_runs import open_run
from tests.processes import run_together
from tests.training import assert_same
from tests.weights_and_biases import end, history
from vitx import VitxError
from vitx.pictures import render

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
from vitx.callbacks.huggingface import RolloutCallback  # noqa: E402

NAMES = ("cat", "dog", "owl")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
PROCESSOR = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)


class Pictures(Dataset):
    """PIL images of one color each, with classes; the collator turns them into tensors."""

    def __init__(self, count=16):
        shades = np.random.default_rng(count).integers(0, 255, (count, 3), np.uint8)
        shades[1] = 0, 255, 0  # each channel reaches black or white, as in photographs
        self.images = [Image.new("RGB", (40, 40), tuple(map(int, shade))) for shade in shades]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"picture": self.images[index], "label": index % 3}


def collate(examples):
    pixels = PROCESSOR([example["picture"] for example in examples], return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": torch.tensor([example["label"] for example in examples])}


def model(layers):
    torch.manual_seed(0)
    size = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32}
    drops = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    names = {
        "id2label": dict(enumerate(NAMES)),
        "label2id": {name: index for index, name in enumerate(NAMES)},
    }
    config = transformers.ViTConfig(num_hidden_layers=layers, patch_size=8, **size, **drops, **names)
    return transformers.ViTForImageClassification(config)


def trainer(folder, callbacks=(), data=None, layers=2, **options):
    """Return a Trainer of two epochs with four steps each."""
    defaults = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "remove_unused_columns": False}
    defaults |= {"use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": 1}
    defaults |= {"disable_tqdm": True}
    return transformers.Trainer(
        model=model(layers),
        args=transformers.TrainingArguments(str(folder), **defaults | options),
        train_dataset=Pictures(16),
        eval_dataset=Pictures(8) if data is None else data,
        data_collator=collate,
        processing_class=PROCESSOR,
        callbacks=list(callbacks),
    )


def watched(folder, callback=(), **options):
    made = trainer(folder, **options)
    made.add_callback(RolloutCallback(made, **{"on_error": "raise"} | dict(callback)))
    return made


files = run_folders.steps


class Outcome(transformers.TrainerCallback):
    """A callback that keeps the optimizer's state and the next random numbers before they are released."""

    def on_train_end(self, args, state, control, model, optimizer, **_):
        self.found = {name: value.clone() for name, value in model.state_dict().items()}
        for index, kept in optimizer.state_dict()["state"].items():
            self.found |= {f"optimizer, {index}.{name}": value for name, value in kept.items()}
        self.found |= {f"mode {name}": torch.tensor(part.training) for name, part in model.named_modules()}
        names = ("loss", "eval_loss")
        losses = [row[name] for row in state.log_history for name in names if name in row]
        self.found |= {"losses": torch.tensor(losses), "random": torch.rand(3)}


WORKERS = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
SETTINGS = {
    "plain": {},
    "bf16": {"bf16": True},
    "accumulating, clipped": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 3},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "workers": {"dataloader_num_workers": 1},
    "persistent workers": WORKERS | {"eval_strategy": "epoch"},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager", "layers": 1},
}


def check_same(folder, callback, **options):
    """Assert that a training is the same with the callback; return the Trainer that had it."""
    outcomes = Outcome(), Outcome()
    trainer(folder, callbacks=outcomes[:1], **options).train()
    made = watched(folder, callback, callbacks=outcomes[1:], **options)
    made.train()
    assert_same(*(one.found for one in outcomes))
    return made


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_training_is_the_same(setting, tmp_path):
    check_same(tmp_path, {"every_n_steps": 1, "num_images": (2, 8)}, **setting)
    assert files(tmp_path)[:3] == [0, 1, 2]


def test_given_images_do_not_become_those_of_the_evaluation(tmp_path):
    """The Trainer keeps the loader that its persistent workers read."""
    losses = []
    for make in (trainer, partial(watched, callback={"images": Pictures(5), "every_n_epochs": 1})):
        made = make(tmp_path, eval_strategy="epoch", **WORKERS)
        made.train()
        losses.append([row["eval_loss"] for row in made.state.log_history if "eval_loss" in row])
        assert len(made.accelerator._dataloaders) == 2
    assert losses[0] == losses[1]
    assert len(made.callback_handler.callbacks[-1].state_dict()["maps"]["rollout"]) == 5


def in_each_rank(folder):
    made = check_same(folder, {"every_n_steps": 1, "num_images": 5}, ddp_backend="gloo")
    assert made.args.world_size == 2


@pytest.mark.slow
def test_two_processes_share_the_images(tmp_path):
    run_together(2, in_each_rank, tmp_path)
    assert files(tmp_path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [0, 4, 8]),
        ({"at_start": False}, [4, 8]),
        ({"every_n_epochs": None}, [0, 8]),
        ({"every_n_epochs": 2}, [0, 8]),
        ({"every_n_epochs": None, "every_n_steps": 3}, [0, 3, 6, 8]),
    ],
)
def test_fires_when_told(options, steps, tmp_path):
    watched(tmp_path, {"num_images": 1} | options).train()
    assert files(tmp_path) == steps


def test_the_trainers_own_run_of_tensorboard_holds_pictures_and_numbers(tmp_path):
    made = watched(tmp_path, {"num_images": 2}, report_to=["tensorboard"], eval_strategy="epoch")
    made.train()
    (folder,) = (tmp_path / "runs").iterdir()
    found = run_folders.events(folder)
    for points in (found.Images("vitx/maps"), found.Scalars("vitx/rollout/entropy")):
        assert [point.step for point in points] == [0, 4, 8]
    assert [point.step for point in found.Scalars("train/loss")] == list(range(1, 9))
    assert files(folder) == [0, 4, 8], "they are not in the folder of the run"
    assert not list(tmp_path.rglob("*.png"))
    accuracy = open_run(folder / "vitx").numbers["eval_loss"]
    assert list(accuracy) == [4, 8], "each evaluation belongs to the firing before it"


def test_the_trainers_own_run_of_weights_and_biases(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    watched(tmp_path / "out", {"num_images": 2}, report_to=["wandb"]).train()
    end(wandb)
    (run,) = tmp_path.glob("wandb/offline-run-*")
    rows = history(run)
    for name in ("vitx/rollout/entropy", "vitx/maps/height"):
        assert [row["train/global_step"] for row in rows if name in row] == [0, 4, 8]
    assert len([row for row in rows if "train/loss" in row]) == 8


def test_the_trainers_own_run_of_mlflow(tmp_path, mlflow):
    mlflow.create_experiment("watched", f"{tmp_path}/artifacts")
    mlflow.set_experiment("watched")
    watched(tmp_path / "out", {"num_images": 2, "every_n_epochs": None}, report_to=["mlflow"]).train()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("watched").experiment_id])
    history = client.get_metric_history(run.info.run_id, "vitx/rollout/entropy")
    assert [point.step for point in history] == [0, 8], "the last is written as its run has ended"
    kept = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert len([path for path in kept if "~maps" in path]) == 4


def test_images_labels_names_and_colors(tmp_path, monkeypatch, capsys):
    seen = []
    grid = render.grid
    monkeypatch.setattr(render, "grid", lambda *args, **kwargs: seen.append(args) or grid(*args, **kwargs))
    made = watched(tmp_path, {"num_images": 4})
    made.train()
    columns, captions = seen[0]
    data = Pictures(8)
    shown = torch.stack([torch.from_numpy(np.array(data.images[place])[:32, :32]) for place in (1, 3, 5, 7)])
    assert (columns["input"].int() - shown.int()).abs().max() <= 2, "the colors are not true"
    assert [caption.label for caption in captions] == [NAMES[place % 3] for place in (1, 3, 5, 7)]
    said = capsys.readouterr().err
    assert (
        said.count("RolloutCallback watches 4 of 8 images of Pictures; images: item 'pixel_values' of") == 1
    )
    assert "; class names: 3; colors: mean 0.5, 0.4, 0.3 and std 0.2, 0.3, 0.25 undone; " in said


def test_the_maps_are_those_of_the_core(tmp_path):
    made = watched(tmp_path, {"num_images": 8})
    made.train()
    images = collate([Pictures(8)[place] for place in range(8)])["pixel_values"]
    maps = run_folders.firing(tmp_path, 8)
    for method in ("rollout", "grad_rollout"):
        expected = vitx.explain(made.model, images, method).maps
        assert torch.equal(torch.from_numpy(maps[method]), expected.half())


def test_one_of_several_sets_and_a_given_one(tmp_path):
    sets = {"few": Pictures(3), "many": Pictures(6)}
    callback = {"num_images": 8, "dataloader_idx": "many"}
    made = watched(tmp_path / "named", callback, data=sets)
    made.train()
    assert len(made.callback_handler.callbacks[-1].state_dict()["maps"]["rollout"]) == 6
    made = watched(tmp_path / "given", {"num_images": 8, "images": Pictures(5)})
    made.train()
    assert len(made.callback_handler.callbacks[-1].state_dict()["maps"]["rollout"]) == 5


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path):
    watched(tmp_path, save_strategy="epoch").train()
    whole = files(tmp_path)
    again = watched(tmp_path, save_strategy="epoch")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert whole == [0, 4, 8]
    assert files(tmp_path / "version_1") == [0, 4, 8], "what was shown before the stop is shown again"
    assert "vitx/rollout/drift" in again.callback_handler.callbacks[-1].state_dict()["scalars"]


def test_the_best_model_can_be_chosen_by_a_number(tmp_path):
    best = {"metric_for_best_model": "vitx/grad_rollout/entropy", "greater_is_better": False}
    saved = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    made = watched(tmp_path, **best, **saved)
    made.add_callback(transformers.EarlyStoppingCallback(9))
    made.train()
    assert 0 < made.state.best_metric < 1
    assert made.state.best_model_checkpoint


def test_is_shown_in_an_evaluation_alone_if_asked(tmp_path):
    for asked in (False, True):
        found = watched(tmp_path, {"on_validate": asked}).evaluate()
        assert len(files(tmp_path)) == int(asked)
        assert ("eval_vitx/rollout/entropy" in found) == asked


@pytest.mark.usefixtures("failing")
def test_an_error_is_said_once_and_the_training_goes_on(tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        methods = ["rollout", "failing"]
        made = watched(tmp_path, {"on_error": "warn", "methods": methods, "every_n_steps": 1})
        made.train()
    sentences = [str(one.message) for one in said if "RolloutCallback" in str(one.message)]
    assert sentences == ["RolloutCallback shows no failing method at step 0: RuntimeError: no map today"]
    assert made.state.global_step == 8
    assert len(files(tmp_path)) == 9


def test_says_what_is_wrong(tmp_path):
    with pytest.raises(VitxError, match=r"needs the Trainer, found NoneType: call trainer\.add_callback"):
        RolloutCallback(None)
    with pytest.raises(VitxError, match="num_images must be a whole number"):
        RolloutCallback(trainer(tmp_path), num_images=0)
    without = watched(tmp_path)
    without.eval_dataset = None
    with pytest.raises(VitxError, match="there is no validation set: give images"):
        without.train()

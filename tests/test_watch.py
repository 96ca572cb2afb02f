"""Watches in custom training loops: the training stays the same bit for bit, and all they see is written."""

import copy
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_loader, create_transform, resolve_data_config
from timm.utils import random_seed
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler
from torch.utils.tensorboard import SummaryWriter

import vitx
from tests import run_folders
from tests.lightning_models import IMAGE, SmallClassifier, samples
from tests.models import checkpointed
from tests.played_runs import open_run
from tests.processes import run_together
from tests.run_folders import events, kept
from tests.test_loggers import end, history
from tests.test_no_trace import assert_same
from vitx import VitxError, Watch
from vitx.runs.folder import read_facts

IMAGES = torch.randn(3, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """A ViT with dropout, drop path and attention dropout, followed by BatchNorm."""

    def __init__(self):
        super().__init__()
        whole = SmallClassifier()
        self.vit, self.norm, self.head = whole.vit, whole.norm, whole.head

    def forward(self, images):
        return self.head(self.norm(self.vit(images)))


def compiled(net):
    if torch.__version__.startswith("2.6"):
        pytest.skip("torch 2.6 fails to compile this module, with the watch and without")
    del net.vit.blocks[1:]
    return torch.compile(net, backend="aot_eager")  # without inductor, which needs a C++ compiler


def frozen(net):
    net.vit.requires_grad_(False).eval()
    return net


def accelerated(net):
    return accelerator(mixed_precision="bf16").prepare(net)


def accelerator(**options):
    """Return a new Accelerator, without the state of an earlier one in the process, as of a Trainer."""
    package = pytest.importorskip("accelerate", reason="accelerate is not installed")
    package.state.AcceleratorState._reset_state(reset_partial_state=True)
    package.state.GradientState._reset_state()
    return package.Accelerator(cpu=True, **options)


@dataclass
class Setting:
    """One test case: settings of the loop and of its watch."""

    watch: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module], nn.Module] = lambda net: net
    autocast: bool = False
    accumulate: int = 1
    average: bool = False
    loader: dict[str, Any] = field(default_factory=dict)
    data: Any = None


SETTINGS = {
    "dropout and BatchNorm": Setting(),
    "bf16 by autocast": Setting(autocast=True),
    "accumulating 3 batches": Setting(accumulate=3),
    "a compiled model": Setting(prepare=compiled),
    "EMA": Setting(average=True),
    "EMA, explained": Setting(average=True, watch={"weights": "ema"}),
    "a frozen backbone in eval mode": Setting(prepare=frozen),
    "gradient checkpointing": Setting(prepare=lambda net: checkpointed(net.vit) or net),
    "bf16 throughout": Setting(prepare=lambda net: net.to(torch.bfloat16)),
    "prepared by Accelerate, in bf16": Setting(prepare=accelerated),
    "loaders with workers": Setting(loader={"num_workers": 1}),
    "given images": Setting(data=IMAGES),
    "one image of each class": Setting(watch={"per_class": True}),
    "no saved maps": Setting(watch={"save_maps": False}),
}


class Averaging(nn.Module):
    """A model with the running average of its weights."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    def forward(self, images):
        return self.net(images)


def train(setting: Setting, folder: Path | None) -> dict[str, torch.Tensor]:
    """Train for two epochs of four batches, watched if there is a folder; return all that results."""
    torch.manual_seed(1)
    np.random.seed(1)
    model = setting.prepare(Net())
    model = Averaging(model) if setting.average else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    data = DataLoader(samples(16), batch_size=4, shuffle=True, **setting.loader)
    held_out = DataLoader(samples(8, seed=1), batch_size=4, **setting.loader)
    seen = held_out if setting.data is None else setting.data
    options = {"num_images": (2, 8), "on_error": "raise"} | setting.watch
    watch = Watch(model, seen, log_dir=folder, **options) if folder else None
    found, kind = {}, next(model.parameters()).dtype
    for step in range(8):
        if watch and step == 0:
            watch(0)
        if step % 4 == 0:
            batches = iter(data)
        images, labels, _ = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.autocast):
            loss = F.cross_entropy(model(images.to(kind)).float(), labels)
        (loss / setting.accumulate).backward()
        if (step + 1) % setting.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        if setting.average:
            model.average.update_parameters(model.net)
        found[f"loss at step {step}"] = loss.detach()
        if watch:
            assert watch(step + 1), "nothing was found"
    found |= {f"weight {name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"optimizer, {index}.{name}": value for name, value in state.items()}
    found |= {f"gradient {name}": p.grad for name, p in model.named_parameters()}
    found |= {f"mode {name}": torch.tensor(part.training) for name, part in model.named_modules()}
    found |= {f"learns {name}": torch.tensor(p.requires_grad) for name, p in model.named_parameters()}
    found |= {"the next random numbers": torch.rand(3), "numpy's": torch.tensor(np.random.rand(3))}
    return found


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_training_is_the_same(setting, tmp_path):
    watched = train(setting, tmp_path)
    assert_same(train(setting, None), watched)
    assert steps(tmp_path) == list(range(9))


class Photos(Dataset):
    """A data set of pictures, whose transform is set by timm's `create_loader`."""

    transform = None

    def __len__(self):
        return 16

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        return self.transform(Image.fromarray(pixels)), index % 3


def train_as_timm(folder: Path | None, loader: dict[str, Any]) -> tuple[str, torch.Tensor]:
    """Train as timm's own train.py; return a hash of the weights, and the next random numbers."""
    random_seed(42, 0)
    model, device = Net(), torch.device("cpu")
    options = {"batch_size": 4, "num_workers": 1, "device": device} | loader
    data = create_loader(Photos(), (3, IMAGE, IMAGE), is_training=True, **options)
    held_out = create_loader(Photos(), (3, IMAGE, IMAGE), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = Watch(model, held_out, folder, on_error="raise") if folder else None
    for epoch in range(2):
        assert watch is None or watch(epoch)
        model.train()
        for images, labels in data:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            for images, _ in held_out:
                model(images)
    weights = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    return sha256(weights).hexdigest(), torch.rand(3)


@pytest.mark.parametrize(
    "loader", [{}, {"persistent_workers": False}, {"use_multi_epochs_loader": True}], ids=str
)
def test_a_training_with_the_loaders_of_timm_is_the_same(loader, tmp_path):
    (plain, drawn), (watched, drawn_then) = (train_as_timm(one, loader) for one in (None, tmp_path))
    assert plain == watched
    assert torch.equal(drawn, drawn_then)
    assert steps(tmp_path) == [0, 1]


def steps(folder):
    found = events(folder)
    shown = [event.step for event in found.Images("vitx/maps")]
    assert shown == [event.step for event in found.Scalars("vitx/rollout/entropy")]
    return shown


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def loader():
    return DataLoader(samples(8, seed=1), batch_size=4)


def test_the_numbers_are_those_of_the_core(net, loader, tmp_path):
    numbers = Watch(net, loader, tmp_path, num_images=4)(0)
    images = torch.stack([loader.dataset[place][0] for place in (1, 3, 5, 7)])
    maps = vitx.explain(net, images, "grad_rollout").maps
    assert numbers["vitx/grad_rollout/entropy"] == pytest.approx(vitx.metrics.entropy(maps).mean().item())
    assert 0 < numbers["vitx/grad_rollout/pointing"] < 1


DATA = {
    "a loader": lambda: DataLoader(samples(8), sampler=SubsetRandomSampler([1, 5])),
    "a data set": lambda: samples(8),
    "a tensor": lambda: IMAGES,
    "several loaders": lambda: {"one": DataLoader(samples(8)), "two": DataLoader(samples(4))},
    "batches of one's own": lambda: BATCHES,
    "a list of samples": lambda: [{"image": image, "label": 1} for image in IMAGES],
    "one batch": lambda: [torch.cat([IMAGES, IMAGES]), torch.arange(6) % 3],
    "a batch with names": lambda: {"pixel_values": IMAGES, "labels": torch.arange(3)},
    "an array": lambda: IMAGES.numpy(),
}


class Batches:
    def __iter__(self):
        return iter([(IMAGES, torch.tensor([0, 1, 2]))])


BATCHES = Batches()


@pytest.mark.parametrize(
    ("data", "count"), list(zip(DATA.values(), [2, 8, 3, 8, 3, 3, 6, 3, 3], strict=True)), ids=DATA
)
def test_what_images_are_taken_from(data, count, net, tmp_path):
    watch = Watch(net, data(), tmp_path, logger=False, on_error="raise")
    assert watch(0)
    assert len(watch.state_dict()["maps"]["rollout"]) == count
    assert (tmp_path / "vitx" / "maps.png").exists()


def test_image_files_go_through_the_models_own_transform(tmp_path):
    photo, model = Image.effect_noise((60, 40), 80).convert("RGB"), timm.create_model("test_vit")
    photo.save(tmp_path / "photo.png")
    watch = Watch(model, [tmp_path / "photo.png"], tmp_path, on_error="raise")
    assert watch(0)
    images = create_transform(**resolve_data_config(model=model))(photo)[None]
    wanted = vitx.explain(model, images, "grad_rollout").maps
    assert torch.equal(watch.state_dict()["maps"]["grad_rollout"], wanted)


def test_a_batch_transform_of_given_images(net, tmp_path):
    watch = Watch(
        net, IMAGES, tmp_path, batch_transform=lambda batch: (2 * batch, [0, 1, 2]), on_error="raise"
    )
    watch(0)
    maps = vitx.explain(net, 2 * IMAGES, "grad_rollout").maps
    assert torch.equal(watch.state_dict()["maps"]["grad_rollout"], maps)


def test_places_of_a_data_set(net, tmp_path):
    watch = Watch(net, samples(8), tmp_path, images=[6, 2], on_error="raise")
    watch(0)
    assert watch.state_dict()["places"] == (6, 2)


def test_fires_once_for_each_step_and_every_n(net, loader, tmp_path):
    watch = Watch(net, loader, tmp_path, every_n_steps=3, on_error="raise")
    fired = [step for step in (0, 1, 2, 3, 3, 4, 6) if watch(step)]
    assert fired == steps(tmp_path) == [0, 3, 6]


class Masked(Net):
    """A model that hides half of the patches at random, as masked autoencoders do."""

    def forward(self, images):
        tokens = self.vit.pos_embed[:, 1:] + self.vit.patch_embed(images)
        count = tokens.shape[1]
        kept = torch.rand(len(images), count, device=images.device).argsort(1)[:, : count // 2, None]
        tokens = self.vit.blocks(tokens.gather(1, kept.expand(-1, -1, tokens.shape[2])))
        return self.head(self.norm(self.vit.norm(tokens).mean(1)))


def test_a_model_that_hides_patches_at_random_hides_the_same_ones_again(loader, tmp_path):
    watch = Watch(Masked(), loader, tmp_path, on_error="raise")
    watch(step=0)
    torch.rand(7)  # a training draws numbers meanwhile
    numbers = watch(step=1)
    assert {n for n in numbers if n.endswith("drift")}
    assert all(number < 1e-6 for name, number in numbers.items() if name.endswith("drift"))


def test_a_resumed_run_goes_on_where_it_stopped(net, loader, tmp_path):
    watch = Watch(net, loader, tmp_path, on_error="raise")
    watch(0)
    watch(5)
    torch.save(watch.state_dict(), tmp_path / "state.pt")
    watch(7)  # before it is killed
    again = Watch(net, loader, tmp_path, on_error="raise")
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert not again(5), "it was shown before the stop"
    assert "vitx/rollout/drift" in again(7)
    assert steps(tmp_path) == [0, 5, 7], "a step is shown twice"
    assert run_folders.steps(tmp_path) == [0, 5, 7]


def test_a_closed_watch_has_seen_its_training_end(net, loader, tmp_path):
    with Watch(net, loader, tmp_path / "whole", on_error="raise") as watch:
        watch(0)
    assert read_facts(tmp_path / "whole" / "vitx")["ended"]
    found = events(tmp_path / "whole")
    assert [event.step for event in found.Images("vitx/overview")] == [0]
    watch.close()  # may be called twice
    with pytest.raises(VitxError, match="this watch is closed"):
        watch(1)
    with suppress(ZeroDivisionError), Watch(net, loader, tmp_path / "broken") as watch:
        watch(0)
        _ = 1 / 0
    assert not read_facts(tmp_path / "broken" / "vitx").get("ended")


def test_a_second_run_does_not_mix_with_the_first(net, loader, tmp_path, capsys):
    for count in (3, 2):
        watch = Watch(net, loader, tmp_path / "run", on_error="raise")
        for step in range(count):
            watch(step)
    assert run_folders.steps(tmp_path / "run") == steps(tmp_path / "run") == [0, 1, 2]
    assert run_folders.steps(tmp_path / "run-1") == steps(tmp_path / "run-1") == [0, 1]
    assert capsys.readouterr().err.count("run holds another run") == 1


def test_what_others_wrote_in_the_same_folder_stays(net, loader, tmp_path):
    with SummaryWriter(tmp_path) as own:
        own.add_scalar("loss", 1.0, 7)
    Watch(net, loader, tmp_path, on_error="raise")(0)
    assert [point.step for point in events(tmp_path).Scalars("loss")] == [7]


class Own:
    """A custom logger."""

    def __init__(self):
        self.numbers, self.pictures = [], []

    def log_metrics(self, metrics, step):
        self.numbers.append((step, sorted(metrics)[0]))

    def log_image(self, key, images, step):
        self.pictures.append((step, key))


def test_several_places_to_write_to(net, loader, tmp_path):
    writer, own = SummaryWriter(tmp_path / "run"), Own()
    watch = Watch(net, loader, logger=[writer, own], on_error="raise")
    watch(3)
    writer.close()
    assert steps(tmp_path / "run") == [3]
    assert own.pictures == [(3, "vitx/maps")]
    assert own.numbers == [(3, "vitx/grad_rollout/energy")]
    assert kept(tmp_path) == tmp_path / "run" / "vitx", "the folder is that of the writer"


def test_the_trackers_of_an_accelerator(net, loader, tmp_path):
    tracking = accelerator(log_with="tensorboard", project_dir=tmp_path)
    tracking.init_trackers("run")
    net, prepared = tracking.prepare(net, loader)
    Watch(net, prepared, tmp_path, logger=tracking, on_error="raise")(2)
    tracking.end_training()
    assert steps(tmp_path / "run") == [2]


def test_a_run_of_weights_and_biases(net, loader, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    quiet = wandb.Settings(console="off", silent=True)
    run = wandb.init(mode="offline", dir=tmp_path, settings=quiet)
    watch = Watch(net, loader, tmp_path, logger=run, on_error="raise")
    for step in (4, 9):
        run.log({"loss": 1.0})
        watch(step)
    end(wandb)
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    rows = history(folder)
    for name in ("vitx/rollout/entropy", "vitx/maps/height"):
        assert [row["vitx/step"] for row in rows if name in row] == [4, 9]
    assert len([row for row in rows if "loss" in row]) == 2


def test_a_folder_that_cannot_be_written_is_said_and_the_loop_goes_on(net, loader, tmp_path):
    (tmp_path / "file").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="Watch cannot write to"):
        assert Watch(net, loader, tmp_path / "file")(0), "the numbers are lost"


def test_a_run_of_mlflow(net, loader, tmp_path, mlflow):
    experiment = mlflow.create_experiment("watched", f"{tmp_path}/artifacts")
    with mlflow.start_run(experiment_id=experiment) as run:
        Watch(net, loader, tmp_path, logger=mlflow, on_error="raise")(4)
        mlflow.flush_artifact_async_logging()  # outside of a run, this would start another one
    client = mlflow.MlflowClient()
    (entropy,) = client.get_metric_history(run.info.run_id, "vitx/rollout/entropy")
    assert entropy.step == 4
    assert client.list_artifacts(run.info.run_id, "images")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "a watch needs a place to write to"),
        ({"log_dir": "x", "at_start": False}, "at_start is for callbacks: a watch fires when it is called"),
        ({"log_dir": "x", "methods": ["saliency"]}, "there is no method 'saliency'"),
        ({"log_dir": "x", "data": "."}, r"'\.' is a folder: give image files in a list, or a data set"),
        ({"log_dir": "x", "data": Path("a.jpg")}, r"'a\.jpg' is a path: give image files in a list"),
        ({"log_dir": "x", "data": 42}, "images must be a tensor, a data set"),
        ({"log_dir": "x", "data": IMAGES, "images": [1]}, "images selects from data sets or loaders, and"),
        ({"log_dir": "x", "data": IMAGES, "dataloader_idx": 4}, "dataloader_idx selects from data sets or"),
        ({"log_dir": "x", "data": None}, "a watch needs images: give a validation loader"),
        ({"log_dir": "x", "log_di": "y"}, r"Watch has no option 'log_di': did you mean log_dir\?"),
        ({"log_dir": "x", "logger": object()}, "a logger must be a SummaryWriter, .* found object"),
        ({"log_dir": "x", "model": "deit"}, "must be a torch.nn.Module, found str"),
        ({"log_dir": "x", "weights": "ema"}, "needs averaged weights"),
        ({"log_dir": "x", "normalization": ([0.5] * 2, [1.0])}, "mean has 2 values for 3 channels"),
    ],
)
def test_says_what_is_wrong(options, sentence, net, loader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VitxError, match=sentence):
        Watch(**{"model": net, "data": loader, "on_error": "raise"} | options)(0)


def test_a_step_is_a_whole_number(net, loader, tmp_path):
    with pytest.raises(VitxError, match="step must be a whole number, found 'a'"):
        Watch(net, loader, tmp_path)("a")


def test_an_explanation_that_fails_is_said_and_the_loop_goes_on(net, tmp_path):
    watch = Watch(net, torch.rand(2, 5, IMAGE, IMAGE), tmp_path)
    with pytest.warns(UserWarning, match="shows nothing at step 0: the model refused .* got 5 channels"):
        assert not watch(0)
    assert not watch(1)


def test_nothing_is_said_of_the_colors_of_a_spectrogram(tmp_path, capsys):
    package = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = package.ASTForAudioClassification(package.ASTConfig(**sizes, max_length=96, num_mel_bins=64))
    sounds = [{"input_values": torch.randn(96, 64), "labels": number % 2} for number in range(3)]
    watch = Watch(model, DataLoader(sounds, 3), tmp_path, on_error="raise")
    watch(0)
    assert "color" not in capsys.readouterr().err
    found = open_run(tmp_path)
    assert "color" not in found.facts["note"]
    assert len(np.unique(found.pixels)) > 200


def test_says_at_first_what_was_found_where_nobody_listens(net, loader, tmp_path, capsys):
    Watch(net, loader, tmp_path, num_images=2)(0)
    said = capsys.readouterr().err
    assert said.startswith("Watch watches 2 of 8 images of TensorDataset; images: item 0 of a batch; ")
    assert said.endswith(f"; pictures: {tmp_path}; maps: {tmp_path / 'vitx'}\n")


WATCHED = {"num_images": 5, "on_error": "raise"}


def in_each_rank(folder: Path) -> None:
    """Run all checks that need two processes in one go, as starting them takes long."""
    torch.distributed.init_process_group("gloo")
    shares_the_images(folder)
    if not torch.__version__.startswith("2.6"):  # its fully_shard does not run on a CPU
        runs_a_sharded_model_in_step(folder)


def runs_a_sharded_model_in_step(folder: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    for part in (*net.vit.blocks, net):
        fully_shard(part)
    assert Watch(net, DataLoader(samples(8, seed=1)), folder / "sharded", **WATCHED)(0)


def shares_the_images(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Net())
    sampler = torch.utils.data.distributed.DistributedSampler(samples(8, seed=1), shuffle=False)
    loader = DataLoader(samples(8, seed=1), batch_size=2, sampler=sampler)
    outcomes = []
    for watched in (False, True):
        torch.manual_seed(rank)
        net = copy.deepcopy(model)
        watch = Watch(net, loader, folder / "two", **WATCHED) if watched else None
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        if watch:
            numbers = watch(0)
        for step in range(2):
            images, labels, _ = next(iter(loader))
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            if watch:
                numbers = watch(step + 1)
        outcomes.append({**net.state_dict(), "random": torch.rand(2)})
    assert_same(*outcomes)
    everywhere = [None, None]
    torch.distributed.all_gather_object(everywhere, dict(numbers))
    assert everywhere[0] == everywhere[1]
    assert "vitx/rollout/drift" in numbers


@pytest.mark.slow
def test_two_processes(tmp_path):
    run_together(2, in_each_rank, tmp_path)
    assert steps(tmp_path / "two") == [0, 1, 2]
    torch.manual_seed(0)
    Watch(Net(), DataLoader(samples(8, seed=1)), tmp_path / "one", **WATCHED)(0)
    one, two = (run_folders.firing(tmp_path / kind, 0) for kind in ("one", "two"))
    assert {name: array.tobytes() for name, array in one.items()} == {n: a.tobytes() for n, a in two.items()}
    if (tmp_path / "sharded").exists():
        sharded = run_folders.firing(tmp_path / "sharded", 0)
        assert all(np.allclose(one[name], sharded[name], rtol=1e-3, atol=1e-6) for name in one)

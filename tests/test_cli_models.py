"""Models as people have them, explained by `vitx explain` and from Python."""

import json
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import tifffile
import timm
import torch
import transformers
from lightning.fabric import Fabric
from PIL import Image
from safetensors.torch import load_file, save_file

import vitx
from tests import models
from tests.explain_command import NAME, OPTIONS
from tests.hugging_face import hugging_face
from vitx import VitxError
from vitx.cli import main
from vitx.models.named import load_hugging_face
from vitx.models.own import load_own

SIZED = ["--input-options", "size=32", "mean=0.4", "std=0.2"]
OWN = f"""
import timm, torch
import lightning.pytorch as pl

class Net(torch.nn.Module):
    def __init__(self, backbone, classes=3):
        super().__init__()
        self.backbone, self.classifier = backbone, torch.nn.Linear(48, classes)

    def forward(self, images):
        return self.classifier(self.backbone(images))

class Module(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images)

def backbone():
    return timm.create_model("{NAME}", num_classes=0, **{OPTIONS})

def net(classes=3):
    return Net(backbone(), classes)

def nothing():
    return 3

class OneNumber(Net):
    def forward(self, images):
        return super().forward(images)[:, 0]

def one_number():
    return OneNumber(backbone(), 1)
"""
BACKBONE, MADE = {"class_path": "own.backbone"}, {"class_path": "own.net"}
NET = {"class_path": "own.Net", "init_args": {"backbone": BACKBONE}}


@pytest.fixture(scope="module")
def belongings(tmp_path_factory):
    """Yield a folder with modules, weights, models and pictures of many kinds."""
    made = tmp_path_factory.mktemp("models")
    (made / "own.py").write_text(OWN)
    sys.path.insert(0, str(made))
    import own

    torch.manual_seed(0)
    net = models.spread(own.net())
    save_file(net.state_dict(), made / "net.safetensors")
    state = {name: value for name, value in net.state_dict().items() if name.startswith("backbone.")}
    save_file(state, made / "bare.safetensors")
    save_file(
        state | {"mlp.0.weight": torch.ones(9, 48)} | {"mlp.2.weight": torch.ones(3, 9)},
        made / "mlp.safetensors",
    )
    torch.save(own.Module(net).state_dict(), made / "module.pth")
    timm_folder(made / "timm_folder")
    trainer = pl.Trainer(barebones=True)
    trainer.strategy.connect(own.Module(net))
    trainer.save_checkpoint(made / "net.ckpt")
    for channels in (1, 13):
        model = timm.create_model(NAME, in_chans=channels, num_classes=3, **OPTIONS)
        save_file(model.state_dict(), made / f"{channels}.safetensors")
    hugging_face(
        made / "hf", id2label={0: "cat", 1: "dog", 2: "owl"}, label2id={"cat": 0, "dog": 1, "owl": 2}
    )
    hugging_face(made / "gray", num_channels=1)
    hugging_face(made / "headless", "bare")
    hugging_face(made / "without", processor=False)
    Image.new("RGB", (60, 40), (200, 30, 30)).save(made / "x.png")
    Image.new("L", (60, 40), 90).save(made / "gray.png")
    bands(made)
    yield made
    sys.path.remove(str(made))
    del sys.modules["own"]


def timm_folder(folder):
    """Write the config that timm saves to a folder or to the hub."""
    folder.mkdir()
    model = timm.create_model(NAME, **OPTIONS)
    config = {"architecture": NAME, "pretrained_cfg": model.pretrained_cfg, "model_args": OPTIONS}
    (folder / "config.json").write_text(json.dumps(config))


def bands(folder):
    """Save the same 13 bands in four ways, and some arrays that are refused."""
    whole = np.random.default_rng(0).integers(0, 256, (13, 40, 50)).astype(np.uint8)
    np.save(folder / "bytes.npy", whole)
    np.save(folder / "words.npy", whole.astype(np.uint16) * 257)
    np.save(folder / "last.npy", whole.transpose(1, 2, 0).astype(np.float32) / 255)
    tifffile.imwrite(folder / "bytes.tif", whole)
    np.save(folder / "few.npy", whole[:5])
    np.save(folder / "signed.npy", whole.astype(np.int16))
    np.save(folder / "gaps.npy", np.where(whole == 3, np.nan, whole))
    (folder / "broken.npy").write_bytes((folder / "bytes.npy").read_bytes()[:500])


def timm_model(name, **options):
    return ["--model", NAME, "--weights", name, "--model-options", json.dumps(OPTIONS | options)]


@pytest.fixture
def explained(belongings, tmp_path, monkeypatch, capsys):
    """Return a function that runs the command in the folder, and returns (status, text, output folder)."""
    monkeypatch.chdir(belongings)

    def run(*words):
        output = tmp_path / "maps"
        try:
            status = main(["explain", *map(str, words), "--output", str(output)])
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr()
        return status, said.out + said.err, output

    return run


MANY = timm_model("13.safetensors", in_chans=13)
BARE = timm_model("bare.safetensors")
WRONG = 'x.png --model own:net --model-options {"classes":{"class_path":"a.b","args":1}}'


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "own:net", "--weights", "net.safetensors"],
        ["--model", "own:net", "--weights", "net.ckpt", *SIZED],
        ["--model", "own:Net", "--weights", "net.safetensors", "--model-options", {"backbone": BACKBONE}],
        ["--model", "own:Module", "--weights", "net.ckpt", "--model-options", {"net": NET}],
        ["--model", "own:Module", "--weights", "module.pth", "--model-options", {"net": NET}],  # not a .ckpt
        ["--model", "timm_folder", "--weights", "net.safetensors"],
        timm_model("net.safetensors"),  # the file holds the head next to the backbone
    ],
)
def test_ways_to_one_model(explained, belongings, words):
    words = [json.dumps(word) if isinstance(word, dict) else word for word in words]
    status, said, output = explained("x.png", *words, "--method", "evidence", "--save", "maps")
    assert status == 0, said
    import own

    model = own.net().eval()
    model.load_state_dict(vitx.models.checkpoints.read_weights(belongings / "net.safetensors"))
    prepare = vitx.inputs.prepared.preprocessing_of(
        model, mean=[0.4] if SIZED[0] in words else None, std=[0.2] if SIZED[0] in words else None
    )
    wanted = vitx.explain(model, prepare(Image.open("x.png"))[None], "evidence")
    with np.load(output / "x.png.npz") as arrays:
        assert np.allclose(arrays["logits"], wanted.logits[0], rtol=1e-4, atol=1e-5)
        assert np.allclose(arrays[f"evidence_{int(wanted.target)}"], wanted.maps[0], rtol=1e-3, atol=1e-6)


def test_a_module_of_the_working_folder_leaves_no_trace(belongings, tmp_path, monkeypatch):
    """`sys.path` is restored both after success and after an error."""
    (tmp_path / "mine.py").write_text("def net():\n    import beside\n    return beside.Made()")
    (tmp_path / "beside.py").write_text("from torch.nn import Identity as Made")
    monkeypatch.chdir(tmp_path)
    before = sys.path.copy()
    load_own("mine:net")
    with pytest.raises(VitxError, match="there is no class or function mine:absent"):
        load_own("mine:absent")
    assert sys.path == before
    for name in ("mine", "beside"):
        del sys.modules[name]


def test_hugging_face_is_named_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(VitxError, match=r"need transformers: pip install transformers$"):
        load_hugging_face(str(tmp_path))


def test_one_number_for_each_picture(explained):
    """An output (B,) distinguishes two classes."""
    status, said, output = explained("x.png", "gray.png", "--model", "own:one_number", "--save", "json")
    assert status == 0, said
    assert json.loads((output / "x.png.json").read_text())["prediction"] in (0, 1)


@pytest.mark.parametrize("words", [BARE, ["--model", "headless"]])
def test_a_backbone_alone_has_no_prediction(explained, words):
    status, said, output = explained("x.png", *words, "--save", "json")
    assert status == 0
    assert "x.png: features, no classes" in said
    assert "only rollout is shown: the model has no head" in said
    assert json.loads((output / "x.png.json").read_text())["prediction"] is None


@pytest.mark.parametrize(("file", "level"), [("x.png", 81), ("gray.png", 90)])
@pytest.mark.parametrize(
    ("words", "mean", "std"),
    [(timm_model("1.safetensors", in_chans=1), 0.449, 0.226), (["--model", "gray"], 0.4, 0.2)],
)
def test_one_channel(explained, belongings, words, mean, std, file, level):
    status, said, output = explained(file, *words, "--save", "maps")
    assert status == 0, said
    if words[1] == NAME:
        model = timm.create_model(NAME, in_chans=1, num_classes=3, **OPTIONS)
        model.load_state_dict(load_file(belongings / "1.safetensors"))
    else:
        model = transformers.ViTForImageClassification.from_pretrained("gray")
    wanted = vitx.explain(model, torch.full((1, 1, 32, 32), (level / 255 - mean) / std))
    with np.load(output / f"{file}.npz") as arrays:
        assert np.allclose(arrays["logits"], wanted.logits[0], rtol=1e-4, atol=1e-5)
        assert np.allclose(arrays["rollout"], wanted.maps[0], rtol=1e-3, atol=1e-6)


def test_many_channels(explained):
    files = ["bytes.npy", "words.npy", "last.npy", "bytes.tif"]
    words = [*MANY, "--input-options", "mean=0.5", "std=0.25", "--method", "evidence", "--save", "maps"]
    status, said, output = explained(*files, *words)
    assert status == 0, said
    first, *others = (np.load(output / f"{file}.npz") for file in files)
    for other in others:
        assert np.allclose(first["logits"], other["logits"], atol=1e-4)


def test_hugging_face(explained, belongings):
    status, said, output = explained(
        "x.png", "--model", "hf/", "--method", "evidence", "--target", "owl", "--save", "json"
    )
    assert status == 0, said
    facts = json.loads((output / "x.png.json").read_text())
    assert facts["maps"][0]["target_name"] == "owl"
    model = transformers.ViTForImageClassification.from_pretrained(belongings / "hf").eval()
    found = vitx.explain(model, "x.png", "evidence", target=2)  # from Python, with the same processor
    processor = transformers.AutoImageProcessor.from_pretrained(belongings / "hf")
    wanted = processor(images=Image.open("x.png"), return_tensors="pt")["pixel_values"]
    assert torch.equal(found.images, wanted)
    assert found.logits[0].softmax(-1)[2].item() == pytest.approx(
        facts["maps"][0]["target_probability"], abs=1e-4
    )
    assert (found.pixels() == torch.tensor([200, 30, 30])).all()


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
@pytest.mark.parametrize("method", ["rollout", "evidence"])
def test_what_fabric_set_up(belongings, precision, method):
    torch.manual_seed(0)
    plain = timm.create_model(NAME, num_classes=3, **OPTIONS).eval()
    wanted = vitx.explain(plain, belongings / "x.png", method, target=None if method == "rollout" else 1)
    model = Fabric(accelerator="cpu", devices=1, precision=precision).setup(plain)
    found = vitx.explain(model, belongings / "x.png", method, target=None if method == "rollout" else 1)
    assert torch.allclose(found.logits, wanted.logits, atol=0.05)
    # If all evidence is negative, a map is relative to its smallest patch, which is rounded, too.
    one, other = ((e.maps if e.signed is None else e.signed) for e in (found, wanted))
    assert torch.allclose(one, other, atol=0.05 * other.abs().max())
    tensor = vitx.explain(model, wanted.images, "rollout")  # the model casts its input
    assert tensor.maps.shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("x.png --model own:nothing", "own:nothing must make a torch.nn.Module, found int"),
        ("x.png --model own:absent", "there is no class or function own:absent"),
        ("x.png --model own.net", "timm has no model 'own.net'"),
        ("x.png --model own:net --model-options a=1", "own:net could not be made: TypeError"),
        ("x.png --model own:Module --weights net.ckpt", "give it by --model-options"),
        (["x.png", *timm_model("net.safetensors", a=MADE)], "does not take these options"),
        (WRONG, "next to class_path, only init_args is allowed"),
        (["x.png", *timm_model("mlp.safetensors")], "which is not a single linear layer"),
        (["x.png", *BARE, "--method", "gae"], "the model has no head, and gae explains"),
        ("x.png --model someone/absent", "could not be fetched from the hub, which does not answer"),
        ("x.png --model hf-hub:someone/absent", "could not be fetched from the hub"),
        ("x.png --model without", "holds no image processor"),
        ("x.png --model hf --input-options mean=0.5", "leave out --input-options mean"),
        ("x.png --model hf --weights net.ckpt", "leave out --weights"),
        ("x.png --model hf --model-options a=1", "--model-options are only for timm models"),
        (["x.png", *MANY, *SIZED], "has three channels at most"),
        (["bytes.npy", *MANY], "mean has 3 values, and the model takes 13 channels"),
        (["few.npy", *MANY, *SIZED], "few.npy is 5 x 40 x 50: the model takes 13 channels"),
        (["signed.npy", *MANY, *SIZED], "holds int16 numbers, whose range is unknown"),
        (["gaps.npy", *MANY, *SIZED], "holds NaN or infinite values"),
        (["broken.npy", *MANY, *SIZED], "could not be read, it may be damaged"),
    ],
)
def test_refusals(explained, words, sentence):
    status, said, output = explained(*(words.split() if isinstance(words, str) else words))
    assert status == 2
    assert sentence in said
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert not output.exists()

"""Models by name, and weights from files of every kind."""

import os

import lightning.pytorch as pl
import pytest
import timm
import torch
from safetensors.torch import save_file

from demo.tuning import load_weights
from vitx import VitxError
from vitx.models.checkpoints import create_model, model_of_weights, read_weights
from vitx.models.own import load_own

NAME = "deit_tiny_patch16_224"
SMALL = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}


def trained(classes=7, **overrides):
    torch.manual_seed(3)
    return timm.create_model(NAME, num_classes=classes, **(SMALL | overrides))


def same(model, other):
    own, wanted = model.state_dict(), other.state_dict()
    return own.keys() == wanted.keys() and all(torch.equal(own[name], wanted[name]) for name in own)


class Module(pl.LightningModule):
    def __init__(self, classes, extra=None):
        super().__init__()
        self.save_hyperparameters()
        self.net = trained(classes)
        self.metric = torch.nn.Linear(2, 2)

    def forward(self, images):
        return self.net(images)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def lightning_checkpoint(path, **arguments):
    module = Module(**arguments)
    trainer = pl.Trainer(logger=False, barebones=True)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return module


@pytest.mark.parametrize("prefix", ["", "model.", "module.encoder.vit.", "model._orig_mod."])
@pytest.mark.parametrize("kind", ["safetensors", "pth", "ckpt"])
def test_weights_are_found_in_every_file(tmp_path, kind, prefix):
    model = trained()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    path = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if kind == "pth" else {"state_dict": state, "epoch": 3}, path)
    assert same(model_of_weights(NAME, path, SMALL), model)


def test_what_stands_beside_the_model_in_a_checkpoint_is_left_out(tmp_path):
    module = lightning_checkpoint(tmp_path / "a.ckpt", classes=5)
    assert same(model_of_weights(NAME, tmp_path / "a.ckpt", SMALL), module.net)


def test_weights_of_another_model_are_told_in_counts(tmp_path):
    torch.save(trained(depth=3, embed_dim=24).state_dict(), tmp_path / "a.pth")
    own = len(trained().state_dict())
    with pytest.raises(VitxError) as error:
        model_of_weights(NAME, tmp_path / "a.pth", SMALL)
    said = str(error.value)
    assert f"of another model than this one of {own} tensors: {own - 1} of another shape (" in said
    assert "(cls_token is (1, 1, 24) and not (1, 1, 48)), 12 unknown (blocks.2." in said


def test_weights_at_another_image_size(tmp_path):
    source = trained()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model = model_of_weights(NAME, tmp_path / "a.pth", SMALL | {"img_size": 64})
    assert model.pos_embed.shape == (1, 17, 48)
    assert torch.equal(model.pos_embed[:, 0], source.pos_embed[:, 0])  # of the class token
    corners = [model.pos_embed[0, place] for place in (1, 4, 13, 16)]
    for corner, wanted in zip(corners, source.pos_embed[0, 1:], strict=True):
        assert torch.cosine_similarity(corner, wanted, dim=0) > 0.9


def test_weights_of_another_kind_of_model(tmp_path):
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "a.pth")
    with pytest.raises(VitxError, match="holds weights of another model"):
        model_of_weights(NAME, tmp_path / "a.pth", SMALL)


def test_a_head_of_another_size_stays_as_it_is(tmp_path):
    source = trained(classes=5)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model = trained(classes=9)
    head = model.head.weight.clone()
    load_weights(model, tmp_path / "a.pth")
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_no_code_is_run_unless_trusted(tmp_path):
    path, proof = tmp_path / "a.pth", tmp_path / "was run"
    torch.save({"state_dict": trained().state_dict(), "more": Harmful(str(proof))}, path)
    with pytest.raises(VitxError, match="would run code when read"):
        read_weights(path)
    assert not proof.exists()
    assert read_weights(path, trust=True)
    assert proof.exists()


@pytest.mark.parametrize("held", [lambda model: model, lambda model: {"model": model, "epoch": 3}])
def test_a_whole_model_is_read_if_trusted(tmp_path, held):
    torch.save(held(trained()), tmp_path / "a.pth")
    with pytest.raises(VitxError, match=r"allow this \(--trust\)"):
        model_of_weights(NAME, tmp_path / "a.pth", SMALL)
    assert same(model_of_weights(NAME, tmp_path / "a.pth", SMALL, trust=True), trained())


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.ckpt"])
def test_what_holds_no_weights(tmp_path, name):
    (tmp_path / name).write_text("no weights")
    with pytest.raises(VitxError, match="holds no weights that can be read"):
        read_weights(tmp_path / name)


def test_no_file(tmp_path):
    with pytest.raises(VitxError, match="there is no weights file"):
        read_weights(tmp_path / "absent.pth")


class TestCreate:
    def test_near_names_are_suggested(self):
        with pytest.raises(VitxError, match=r"no model 'deit_tinny_patch16_224'; .*deit_tiny_patch16_224"):
            create_model("deit_tinny_patch16_224", False, None)

    def test_the_beginning_of_a_name(self):
        with pytest.raises(
            VitxError, match="similar names: deit_tiny_distilled_patch16_224, deit_tiny_patch"
        ):
            create_model("deit_tiny", False, None)

    def test_a_name_like_no_other(self):
        with pytest.raises(VitxError, match="similar names: none"):
            create_model("zzzzzzzzzzzzzzzzzzzzzzzzz", False, None)

    def test_unknown_options(self):
        with pytest.raises(VitxError, match=r"does not take these options: .*nope"):
            create_model(NAME, False, None, {"nope": 3})

    def test_the_size_is_declared(self):
        assert create_model(NAME, False, None, SMALL).pretrained_cfg["input_size"] == (3, 32, 32)


class TestModule:
    PATH = f"{__name__}:Module"

    def test_is_loaded_with_its_arguments(self, tmp_path):
        module = lightning_checkpoint(tmp_path / "a.ckpt", classes=5)
        found = load_own(self.PATH, tmp_path / "a.ckpt")
        assert same(found, module)
        assert found.hparams["classes"] == 5

    def test_arguments_can_be_given(self, tmp_path):
        lightning_checkpoint(tmp_path / "a.ckpt", classes=5)
        assert load_own(self.PATH, tmp_path / "a.ckpt", {"extra": 4}).hparams["extra"] == 4

    def test_no_code_is_run_unless_trusted(self, tmp_path):
        proof = tmp_path / "was run"
        lightning_checkpoint(tmp_path / "a.ckpt", classes=5)
        content = torch.load(tmp_path / "a.ckpt", weights_only=False)
        torch.save(content | {"more": Harmful(str(proof))}, tmp_path / "a.ckpt")
        with pytest.raises(VitxError, match="would run code"):
            load_own(self.PATH, tmp_path / "a.ckpt")
        assert not proof.exists()
        load_own(self.PATH, tmp_path / "a.ckpt", trust=True)
        assert proof.exists()

    @pytest.mark.parametrize(
        ("path", "sentence"),
        [
            ("Module", "names no class"),
            ("absent_package:Module", "there is no class or function absent_package:Module"),
            ("torch.nn:Absent", "there is no class"),
            ("torch.nn:Linear", "Linear could not be made: TypeError"),
        ],
    )
    def test_no_such_class(self, tmp_path, path, sentence):
        lightning_checkpoint(tmp_path / "a.ckpt", classes=5)
        with pytest.raises(VitxError, match=sentence):
            load_own(path, tmp_path / "a.ckpt")

    def test_another_modules_checkpoint(self, tmp_path):
        lightning_checkpoint(tmp_path / "a.ckpt", classes=5)
        with pytest.raises(VitxError, match=r"could not be loaded .* RuntimeError: .*size mismatch"):
            load_own(self.PATH, tmp_path / "a.ckpt", {"classes": 6})

    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(VitxError, match="there is no weights file"):
            load_own(self.PATH, tmp_path / "absent.ckpt")

"""The model that is explained, for LightningModules as people write them."""

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from transformers import ViTConfig, ViTForImageClassification

import vitx
from tests.lightning_models import IMAGE, SmallClassifier, averaging, fit, samples
from tests.modules import Around
from vitx import VitxError
from vitx.callbacks import RolloutCallback
from vitx.watch.calling import call_of

IMAGES = samples(3, seed=7).tensors[0]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Run in a temporary folder, since pictures go to the folder that the run is started in."""
    monkeypatch.chdir(tmp_path)


class Seen(RolloutCallback):
    """A callback that keeps its maps and those of `vitx.explain` for the same weights, at each firing."""

    def __init__(self, expected, **options):
        super().__init__(images=IMAGES, on_error="raise", every_n_epochs=None, **options)
        self.expected, self.pairs = expected, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self._fire(trainer, pl_module, trainer.global_step)
        with torch.no_grad():
            explanation = vitx.explain(self.expected(trainer, pl_module), IMAGES, "grad_rollout")
        self.pairs.append((self.state_dict()["maps"]["grad_rollout"], explanation.maps))


def assert_explains(expected, module=SmallClassifier, *beside, **options):
    callback = Seen(expected, **options)
    fit(*beside, callback, module=module, max_epochs=1, limit_train_batches=2)
    assert len(callback.pairs) == 2
    for found, wanted in callback.pairs:
        assert torch.equal(found, wanted), "the maps differ"


class NoForward(SmallClassifier):
    """A module that calls its parts in its steps and does not implement `forward`."""

    forward = pl.LightningModule.forward

    def logits(self, images):
        return SmallClassifier.forward(self, images)

    def training_step(self, batch, _):
        return F.cross_entropy(self.logits(batch[0]), batch[1])

    def validation_step(self, batch, _):
        pass


class NeedsAge(SmallClassifier):
    def forward(self, images, age):
        return super().forward(images) * age[:, None]

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0], torch.ones(len(batch[0]))), batch[1])

    def validation_step(self, batch, _):
        pass


class HuggingFace(SmallClassifier):
    def __init__(self):
        super().__init__()
        self.vit = ViTForImageClassification(
            ViTConfig(
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=48,
                image_size=IMAGE,
                patch_size=8,
                num_labels=3,
            )
        )

    def forward(self, pixel_values):
        return self.vit(pixel_values=pixel_values).logits


class Lora(SmallClassifier):
    def __init__(self):
        super().__init__()
        self.vit = get_peft_model(self.vit, LoraConfig(r=2, target_modules=["qkv"], lora_dropout=0.1))


class OwnEma(SmallClassifier):
    """A module that averages its backbone itself."""

    kind = staticmethod(AveragedModel)

    def __init__(self):
        super().__init__()
        self.vit.reset_classifier(3)
        self.head = nn.Identity()
        self.norm = nn.Identity()
        self.ema = self.kind(self.vit)

    def on_train_batch_end(self, *_):
        (self.ema.update_parameters if hasattr(self.ema, "update_parameters") else self.ema.update)(self.vit)


class TimmEma(OwnEma):
    kind = ModelEmaV3


def test_the_forward_of_the_module():
    assert_explains(lambda _, module: module)


def test_a_forward_fn_where_there_is_no_forward():
    logits = NoForward.logits
    assert_explains(lambda _, module: Around(logits, module), NoForward, forward_fn=logits)


@pytest.mark.parametrize("module", [HuggingFace, Lora])
def test_models_of_other_libraries(module):
    assert_explains(lambda _, found: found, module)


def test_lora_changes_what_is_seen():
    """The adapter is explained together with its base model."""
    module = Lora()
    before = vitx.explain(module, IMAGES, "grad_rollout").maps
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert not torch.allclose(before, vitx.explain(module, IMAGES, "grad_rollout").maps)


def test_averaged_weights_of_lightnings_callback():
    average = averaging(0.5)
    assert_explains(lambda *_: average._average_model.module, SmallClassifier, average, weights="ema")


@pytest.mark.parametrize("module", [OwnEma, TimmEma])
def test_averaged_weights_of_the_module(module):
    assert_explains(lambda _, found: found.ema.module, module, weights="ema")


def test_averaged_weights_are_other_weights():
    with pytest.raises(AssertionError, match="the maps differ"):
        assert_explains(lambda _, module: module, SmallClassifier, averaging(0.9), weights="ema")


class Ages(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"image": samples(8).tensors[0][index], "age": torch.tensor(float(index)), "label": index % 3}


def test_what_a_forward_asks_for_by_name_is_taken_from_the_batch():
    callback = RolloutCallback(num_images=4, on_error="raise", every_n_epochs=None)
    data = DataLoader(samples(8), batch_size=4), DataLoader(Ages(), batch_size=3)
    _, module = fit(callback, module=NeedsAge, data=data, max_steps=2)
    ages, images = torch.tensor([1.0, 3, 5, 7]), samples(8).tensors[0][1::2]

    found = callback.state_dict()["maps"]["grad_rollout"]
    bound = Around(lambda module, x: module(x, ages), module)
    assert torch.allclose(found, vitx.explain(bound, images, "grad_rollout").maps)


@pytest.mark.parametrize(
    ("module", "options", "sentence"),
    [
        (NoForward, {}, "NoForward.forward is not implemented: give forward_fn"),
        (NeedsAge, {}, "NeedsAge.forward takes more than images, and it was not seen how .* 'age': give for"),
        (SmallClassifier, {"forward_fn": lambda module, images, age: None}, "forward_fn takes more than im"),
        (SmallClassifier, {"weights": "ema"}, "needs averaged weights"),
    ],
)
def test_says_what_is_missing(module, options, sentence):
    with pytest.raises(VitxError, match=sentence):
        fit(RolloutCallback(images=IMAGES, on_error="raise", **options), module=module)


class TakesKeywords(SmallClassifier):
    def forward(self, **inputs):
        return super().forward(inputs["image"])


class TakesAge(SmallClassifier):
    def forward(self, images, age):
        return super().forward(images) * age[:, None]


@pytest.mark.parametrize(
    ("kind", "name", "inputs"),
    [
        (SmallClassifier, "0", {"1": torch.zeros(2)}),
        (HuggingFace, "pixel_values", {"labels": torch.zeros(2)}),
        (TakesKeywords, "image", {}),
        (TakesAge, "image", {"age": torch.ones(2), "label": torch.zeros(2)}),
        (TakesAge, "0", {"1.age": torch.ones(2), "2": torch.zeros(2)}),
    ],
)
def test_calls_a_module_in_its_usual_form(kind, name, inputs):
    module = kind().eval()
    found = call_of(module, None, None, name, inputs)(IMAGES[:2])
    expected = module(IMAGES[:2]) if kind is HuggingFace else SmallClassifier.forward(module, IMAGES[:2])
    assert torch.equal(found, expected)


def test_gives_what_is_in_a_batch_by_its_name_where_the_training_does():
    class Named(SmallClassifier):
        def forward(self, input_ids=None, pixel_values=None, mask=None, labels=None):
            assert labels is None, "of the loss, not of the output"
            return SmallClassifier.forward(self, pixel_values * mask) + input_ids.sum()

    inputs = {"input_ids": torch.ones(2), "mask": torch.tensor([2.0]), "labels": torch.ones(2), "1": IMAGES}
    module = Named().eval()
    found = call_of(module, None, None, "pixel_values", inputs, by_name=True)(IMAGES[:2])
    assert torch.equal(found, module(torch.ones(2), IMAGES[:2], 2))


def test_never_takes_the_next_item_for_what_a_forward_asks_for():
    with pytest.raises(VitxError, match="not seen how your step passes 'age'"):
        call_of(TakesAge(), None, None, "0", {"1": torch.ones(2)})


def test_says_what_failed():
    class TakesText(SmallClassifier):
        def forward(self, text):
            return text.split()

    with pytest.raises(
        VitxError, match=r"TakesText.forward failed on images of .*: give forward_fn=lambda .*said"
    ):
        call_of(TakesText(), None, None, "image", {})(IMAGES[:2])
    mistaken = call_of(TakesText(), lambda module, images: {}[images.ndim], None, "image", {})
    with pytest.raises(
        VitxError, match=r"^forward_fn failed on images of shape \(2, .*\) \(it said KeyError: 4\)$"
    ):
        mistaken(IMAGES[:2])

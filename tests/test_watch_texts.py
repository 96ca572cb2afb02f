"""Watched trainings with texts, captions, words and other images as targets."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import vitx
from tests import texts, vision_language
from tests.lightning_models import fit
from tests.played_runs import open_run
from vitx import VitxError
from vitx.callbacks import RolloutCallback
from vitx.callbacks.huggingface import RolloutCallback as OfTrainer
from vitx.targets import answer, similar_to, text, word

transformers = pytest.importorskip("transformers")
CAPTIONS = torch.tensor([[1, 4, word, 2, *[0] * 12] for word in (5, 6, 7, 5, 6, 7)])
IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def tokens(words):
    """Return the token ids of texts, as a tokenizer of open_clip does."""
    return CAPTIONS[[["a cat", "a dog"].index(word) for word in words]]


class Pairs(Dataset):
    """A data set of images with their captions, in a mapping or as a pair."""

    def __init__(self, named=True):
        self.named = named

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        if not self.named:
            return IMAGES[index], CAPTIONS[index]
        return {"pixel_values": IMAGES[index], "input_ids": CAPTIONS[index]}


class Contrastive(pl.LightningModule):
    """A module that fine-tunes a model of open_clip on pairs."""

    def __init__(self):
        super().__init__()
        self.clip = texts.open_clip_model()

    def training_step(self, batch, _):
        images, words = self.clip.encode_image(batch[0]), self.clip.encode_text(batch[1])
        similar = F.normalize(images, dim=1) @ F.normalize(words, dim=1).T
        return F.cross_entropy(10 * similar, torch.arange(len(images)))

    def validation_step(self, batch, _):
        self.log("val/loss", self.training_step(batch, 0))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def trained(folder, target):
    """Train for one step under the callback, and return the module as it was before, and the run."""
    torch.manual_seed(0)
    module = Contrastive()
    before = copy.deepcopy(module).eval()
    watching = RolloutCallback([0, 2, 4], methods=("evidence",), target=target, on_error="raise")
    loader = DataLoader(Pairs(named=False), 3)
    logger = pl.loggers.CSVLogger(folder)
    fit(watching, module=module, data=(loader, loader), max_steps=1, default_root_dir=folder, logger=logger)
    return before, open_run(folder)


TARGETS = {
    "caption": ("caption", text(CAPTIONS[[0, 2, 4]], maps="own"), "features"),
    "texts": (text("a cat", "a dog", tokenizer=tokens), text(CAPTIONS[:2], maps="nearest"), "class"),
    "text": (text("a cat", tokenizer=tokens), text(CAPTIONS[:1]), "features"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_training_of_open_clip(name, tmp_path):
    """Each image has the map of its own caption, of the nearest text, or of the only one."""
    target, alone, kind = TARGETS[name]
    module, run = trained(tmp_path, target)
    wanted = vitx.explain(module, IMAGES[[0, 2, 4]], "evidence", target=alone)
    assert torch.allclose(torch.from_numpy(run.maps["evidence"][0]), wanted.maps, atol=1e-3)
    assert run.facts["kind"] == kind
    assert run.facts["class_names"] == (["a cat", "a dog"] if name == "texts" else None)
    assert run.facts["target"] == ("caption" if name == "caption" else "text")


def one_step(folder, **more):
    """Return settings of a Trainer that trains for one step, and saves and reports nothing."""
    alone = {"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    return transformers.TrainingArguments(folder, **alone, **more)


def with_loss(examples):
    named = {name: torch.stack([one[name] for one in examples]) for name in examples[0]}
    return {**named, "return_loss": True}


def test_a_training_of_hugging_face(tmp_path):
    model = copy.deepcopy(texts.built("CLIP"))
    before = copy.deepcopy(model).eval()
    arguments = one_step(tmp_path, per_device_train_batch_size=3)
    trainer = transformers.Trainer(
        model, arguments, data_collator=with_loss, train_dataset=Pairs(), eval_dataset=Pairs()
    )
    options = {"methods": ("evidence",), "target": "caption", "on_error": "raise"}
    trainer.add_callback(OfTrainer(trainer, images=[0, 2, 4], **options))
    trainer.train()
    own = text(CAPTIONS[[0, 2, 4]], maps="own")
    wanted = vitx.explain(before, IMAGES[[0, 2, 4]], "evidence", target=own).maps
    run = open_run(tmp_path)
    assert torch.allclose(torch.from_numpy(run.maps["evidence"][0]), wanted, atol=1e-3)


def trained_by_name(model, rows, target, folder):
    """Train a Hugging Face model for one step under the callback, and return the last maps."""
    arguments = one_step(
        folder, per_device_train_batch_size=2, remove_unused_columns=False, learning_rate=0.0
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    options = {"methods": ("evidence",), "target": target, "on_error": "raise"}
    trainer.add_callback(OfTrainer(trainer, images=[0, 2], **options))
    trainer.train()
    return torch.from_numpy(open_run(folder).maps["evidence"][-1])


def test_a_training_shows_where_a_word_comes_from(tmp_path):
    """The word is read where the answer begins, of the model or of a module that contains it."""
    model = copy.deepcopy(vision_language.built("LLaVA"))
    given = vision_language.FAMILIES["LLaVA"][1]
    ids = torch.cat([given["input_ids"], torch.tensor([[9, 2]])], 1)[0]
    labels = torch.where(torch.arange(len(ids)) < len(ids) - 2, -100, ids)
    pixels = vision_language.pictures(4, 3, 32, 32)
    rows = [{"pixel_values": one, "input_ids": ids, "labels": labels} for one in pixels]
    asked = {"pixel_values": pixels[[0, 2]], "input_ids": ids[None, :-2].expand(2, -1)}
    wanted = vitx.explain(model, inputs=asked, method="evidence", target=word(8)).maps
    assert torch.allclose(trained_by_name(model, rows, word(8), tmp_path), wanted, atol=1e-3)

    loader, several = DataLoader(rows, 2), [{**row, "pixel_values": pixels[:2]} for row in rows]
    inside, options = torch.nn.ModuleList([model]), {"methods": ["evidence"], "on_error": "raise"}
    watch = vitx.Watch(inside, loader, tmp_path / "w", target=word(8), **options)
    assert "vitx/evidence/entropy" in watch(0)
    watch = vitx.Watch(model, DataLoader(several, 2), tmp_path / "s", target=word(8), on_error="raise")
    with pytest.raises(VitxError, match="a word needs one picture for each prompt"):
        watch(0)
    for target in (word(8, 9), answer()):
        with pytest.raises(VitxError, match=r"ask for one word during training|give one word"):
            vitx.Watch(model, loader, tmp_path, target=target)


def test_a_training_shows_what_is_like_another_picture(tmp_path):
    """This also works for a model whose head hides its features."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**small, image_size=32, patch_size=8, num_labels=3)
    model = transformers.ViTForImageClassification(config)
    rows = [{"pixel_values": one, "labels": torch.tensor(0)} for one in IMAGES[:4]]
    target = similar_to(IMAGES[5])
    wanted = vitx.explain(model, IMAGES[[0, 2]], "evidence", target=target).maps[::2]
    assert torch.allclose(trained_by_name(model, rows, target, tmp_path), wanted, atol=1e-3)


def first_text(logits):
    return logits[:, 0]


def test_a_loader_of_mappings_gives_a_model_what_it_names(tmp_path):
    """Each batch is passed as `inputs` would be."""
    model, loader = texts.built("CLIP"), DataLoader(Pairs(), 3)
    found = vitx.explain(model, loader, "evidence", target=first_text)
    for start in (0, 3):
        given = {"pixel_values": IMAGES[start:][:3], "input_ids": CAPTIONS[start:][:3]}
        wanted = vitx.explain(model, inputs=given, method="evidence", target=first_text)
        assert torch.allclose(found.maps[start:][:3], wanted.maps, atol=1e-6)
        assert torch.equal(found.logits[start:][:3], wanted.logits)
    own = vitx.explain(model, loader, "evidence", target=text(*CAPTIONS, maps="own"))
    wanted = vitx.explain(model, IMAGES, "evidence", target=text(*CAPTIONS, maps="own"))
    assert torch.allclose(own.maps, wanted.maps, atol=1e-6)
    watch = vitx.Watch(model, loader, tmp_path, target=first_text, methods=["evidence"], on_error="raise")
    assert "vitx/evidence/entropy" in watch(0)


def test_says_where_there_is_no_caption(tmp_path):
    watch = vitx.Watch(texts.built("CLIP"), IMAGES, tmp_path, target="caption", on_error="raise")
    with pytest.raises(VitxError, match='target="caption" needs the token ids of a caption for each image'):
        watch(0)
    with pytest.raises(VitxError, match='target must be "predicted", "label", "caption", a class, a func'):
        vitx.Watch(texts.built("CLIP"), IMAGES, tmp_path, target="words")

"""A fine-tuning of CLIP that is watched: given texts, and the caption of each image."""

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import vitx
from tests import run_folders, texts
from vitx import VitxError
from vitx.callbacks import RolloutCallback
from vitx.callbacks.huggingface import RolloutCallback as OfTrainer
from vitx.runs.saved import read_run
from vitx.targets import text

transformers = pytest.importorskip("transformers")
CAPTIONS = torch.tensor([[1, 4, word, 2, *[0] * 12] for word in (5, 6, 7, 5, 6, 7)])
IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def tokens(words):
    """A tokenizer, as open_clip has them."""
    return CAPTIONS[: len(words)]


class Pairs(Dataset):
    """Images with their captions, in a mapping or as a pair."""

    def __init__(self, named=True):
        self.named = named

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        if not self.named:
            return IMAGES[index], CAPTIONS[index]
        return {"pixel_values": IMAGES[index], "input_ids": CAPTIONS[index]}


class Contrastive(pl.LightningModule):
    """Fine-tunes a model of open_clip on pairs."""

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
    """Trains for a step under the callback, and returns the module as it was before, and the run."""
    torch.manual_seed(0)
    module = Contrastive()
    before = copy.deepcopy(module).eval()
    watching = RolloutCallback([0, 2, 4], methods=("evidence",), target=target, on_error="raise")
    trainer = pl.Trainer(
        max_steps=1,
        default_root_dir=folder,
        logger=pl.loggers.CSVLogger(folder),
        callbacks=[watching],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    loader = DataLoader(Pairs(named=False), 3)
    trainer.fit(module, loader, loader)
    return before, read_run(run_folders.kept(Path(folder)))


TARGETS = {
    "caption": ("caption", text(CAPTIONS[[0, 2, 4]], maps="own"), "features"),
    "texts": (text("a cat", "a dog", tokenizer=tokens), text(CAPTIONS[:2], maps="nearest"), "class"),
    "text": (text("a cat", tokenizer=tokens), text(CAPTIONS[:1]), "features"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_training_of_open_clip(name, tmp_path):
    """Each image has the map of its own caption, of the text that it is nearest to, or of the only one."""
    target, alone, kind = TARGETS[name]
    module, run = trained(tmp_path, target)
    wanted = vitx.explain(module, IMAGES[[0, 2, 4]], "evidence", target=alone)
    assert torch.allclose(torch.from_numpy(run.maps.maps["evidence"][0]), wanted.maps, atol=1e-3)
    assert run.facts["kind"] == kind
    assert run.facts["class_names"] == (["a cat", "a dog"] if name == "texts" else None)
    assert run.facts["target"] == ("caption" if name == "caption" else "text")


def with_loss(examples):
    named = {name: torch.stack([one[name] for one in examples]) for name in examples[0]}
    return {**named, "return_loss": True}


def test_a_training_of_hugging_face(tmp_path):
    model = copy.deepcopy(texts.built("CLIP"))
    before = copy.deepcopy(model).eval()
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=3,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(
        model, arguments, data_collator=with_loss, train_dataset=Pairs(), eval_dataset=Pairs()
    )
    options = {"methods": ("evidence",), "target": "caption", "on_error": "raise"}
    trainer.add_callback(OfTrainer(trainer, images=[0, 2, 4], **options))
    trainer.train()
    own = text(CAPTIONS[[0, 2, 4]], maps="own")
    wanted = vitx.explain(before, IMAGES[[0, 2, 4]], "evidence", target=own).maps
    run = read_run(run_folders.kept(tmp_path))
    assert torch.allclose(torch.from_numpy(run.maps.maps["evidence"][0]), wanted, atol=1e-3)


def test_says_where_there_is_no_caption(tmp_path):
    watch = vitx.Watch(texts.built("CLIP"), IMAGES, tmp_path, target="caption", on_error="raise")
    with pytest.raises(VitxError, match='target="caption" needs the token ids of a caption for each image'):
        watch(0)
    with pytest.raises(VitxError, match='target must be "predicted", "label", "caption", a class, a func'):
        vitx.Watch(texts.built("CLIP"), IMAGES, tmp_path, target="words")

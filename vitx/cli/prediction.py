"""Many pictures through Lightning's `Trainer.predict`: shared among devices, each one exactly once."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitx.cli.subject import Subject
from vitx.errors import VitxError
from vitx.explanation import Explanation
from vitx.methods import Methods, find_method
from vitx.pictures import read_picture
from vitx.preprocessing import Preprocessing

Write = Callable[[Path, list[Explanation]], None]
_MANY = 64  # pictures; for fewer, starting processes that read them takes longer than reading


class Pictures(Dataset[dict[str, Any]]):
    """Image files, prepared; one that cannot be read is a sentence that says why."""

    def __init__(self, files: Sequence[Path], prepare: Preprocessing, most_pixels: int) -> None:
        self.files, self.prepare, self.most_pixels = files, prepare, most_pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> dict[str, Any]:
        try:
            picture = read_picture(self.files[place], self.most_pixels)
            return {"place": place, "image": self.prepare(picture)}
        except VitxError as error:
            return {"place": place, "error": str(error)}


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Makes a batch of those that could be read: images (B, C, H, W), their places, and the errors."""
    good = [sample for sample in samples if "image" in sample]
    return {
        "images": torch.stack([sample["image"] for sample in good]) if good else None,
        "places": [sample["place"] for sample in good],
        "errors": {sample["place"]: sample["error"] for sample in samples if "error" in sample},
    }


class Explainer(pl.LightningModule):
    """Explains batches.

    Args:
        subject: the model, and how it wants its images.
        methods: the options of each method, by its name.
        targets: the classes; None is the predicted one.
    """

    def __init__(self, subject: Subject, methods: Methods, targets: Sequence[int | None]) -> None:
        super().__init__()
        self.model = subject.model  # as a part of the module, it goes to the device
        self.subject, self.targets = subject, targets
        self.for_a_class = {name: methods[name] for name in methods if find_method(name).gradient}
        self.plain = {name: methods[name] for name in methods if name not in self.for_a_class}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Explanation]:
        """Returns the explanations of a batch, on the CPU: first those by methods without a class."""
        images: Tensor | None = batch["images"]
        if images is None:
            return []
        first, *others = self.targets
        found = self.subject.explain(images, self.plain | self.for_a_class, first)
        explanations = list(found.values())
        for target in others if self.for_a_class else ():
            explanations += self.subject.explain(images, self.for_a_class, target).values()
        shown = images.cpu()
        return [replace(explanation.cpu(), images=shown) for explanation in explanations]


class Writer(BasePredictionWriter):
    """Writes what was found in each picture as soon as it was found.

    Args:
        files: the pictures.
        begin: is called once before them, by one process for all.
        write: is given a picture's file and its explanations.
    """

    def __init__(self, files: Sequence[Path], begin: Callable[[], None], write: Write) -> None:
        super().__init__("batch")
        self.files, self.begin, self.write = files, begin, write
        self.errors: dict[int, str] = {}

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepares what is written to."""
        if trainer.is_global_zero:
            self.begin()

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Writes the pictures of a batch one by one, and remembers those that could not be read."""
        self.errors |= batch["errors"]
        for row, place in enumerate(batch["places"]):
            self.write(self.files[place], [explanation[row : row + 1] for explanation in prediction])

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells every rank what the others could not read."""
        if trainer.world_size > 1:
            parts: list[dict[int, str]] = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, self.errors)
            self.errors = {place: error for part in parts for place, error in part.items()}


def predict(
    explainer: Explainer,
    files: Sequence[Path],
    prepare: Preprocessing,
    begin: Callable[[], None],
    write: Write,
    *,
    most_pixels: int,
    batch_size: int,
    workers: int | None,
    progress: bool,
    **settings: Any,
) -> tuple[dict[int, str], bool]:
    """Explains all pictures.

    Args:
        explainer: explains a batch.
        files: the pictures.
        prepare: how the model wants them.
        begin: is called before the first one, by one process for all.
        write: is given each picture's file and its explanations.
        most_pixels: a larger picture is refused.
        batch_size: pictures explained at once on each device.
        workers: processes that read pictures, on each device; None: as many as help.
        progress: show how far it is.
        **settings: of Lightning's Trainer: `accelerator`, `devices`, `num_nodes`, `strategy`.

    Returns:
        By its place, why a picture could not be read; and whether this process is to speak for all.
    """
    if workers is None:
        workers = min(4, (os.cpu_count() or 1) // 2) if len(files) >= _MANY else 0
    loader: DataLoader[Any] = DataLoader(
        Pictures(files, prepare, most_pixels),
        batch_size=1 if prepare.keep_aspect else batch_size,
        num_workers=workers,
        collate_fn=collate,
    )
    writer = Writer(files, begin, write)
    with _quiet():
        trainer = _trainer(callbacks=[writer], enable_progress_bar=progress, **settings)
        try:
            trainer.predict(explainer, loader, return_predictions=False)
        except SystemExit as stop:  # what Lightning makes of an interrupt
            raise KeyboardInterrupt from stop
    return writer.errors, trainer.is_global_zero


def _trainer(**settings: Any) -> pl.Trainer:
    try:
        return pl.Trainer(
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            inference_mode=False,
            **settings,
        )
    except (ImportError, RuntimeError, TypeError, ValueError, MisconfigurationException) as error:
        said = " ".join(str(error).split())
        raise VitxError(f"Lightning's Trainer does not take these settings: {said}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what Lightning says of its own set-up."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        logger.setLevel(level)

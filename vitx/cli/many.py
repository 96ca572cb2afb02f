"""Many pictures through a model on one device: read beside it, explained batch by batch."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vitx.cli.delivery import Delivery
from vitx.cli.found import Asked, Finding, findings
from vitx.cli.subject import Subject
from vitx.cli.threads import give_way, one_thread
from vitx.errors import VitxError
from vitx.inputs.preprocessing import Preprocessing
from vitx.methods import Methods, find_method
from vitx.models.prediction import Target, difference
from vitx.pictures.colours import draw

_MANY = 64  # pictures; for fewer, starting processes takes longer than what they would do
_MOST_READERS, _MOST_WRITERS = 8, 16


class Pictures(Dataset[dict[str, Any]]):
    """Image files, prepared, and as they are shown; one that cannot be read is a sentence that says why."""

    def __init__(self, files: Sequence[Path], prepare: Preprocessing, most_pixels: int) -> None:
        self.files, self.prepare, self.most_pixels = files, prepare, most_pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> dict[str, Any]:
        try:
            with one_thread():
                picture = self.prepare.read(self.files[place], self.most_pixels)
                image = self.prepare(picture)
                scale = (self.prepare.mean, self.prepare.std)
                given = scale if isinstance(picture, Image.Image) else None  # whose range is known
                pixels, note = draw(image[None], self.prepare.channels, [scale], given=given)
            return {"place": place, "image": image, "pixels": pixels[0], "note": note}
        except VitxError as error:
            return {"place": place, "error": str(error)}


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Makes a batch of those that could be read: images (B, C, H, W), as they are shown, and the errors."""
    good = [sample for sample in samples if "image" in sample]
    return {
        "images": torch.stack([sample["image"] for sample in good]) if good else None,
        "pixels": torch.stack([sample["pixels"] for sample in good]) if good else None,
        "notes": [sample["note"] for sample in good],
        "places": [sample["place"] for sample in good],
        "errors": {sample["place"]: sample["error"] for sample in samples if "error" in sample},
    }


def loader_of(
    files: Sequence[Path], prepare: Preprocessing, most_pixels: int, batch_size: int, readers: int
) -> DataLoader[Any]:
    """Returns what reads the pictures, in other processes if there are any."""
    return DataLoader(
        Pictures(files, prepare, most_pixels),
        batch_size=1 if prepare.keep_aspect else batch_size,
        num_workers=readers,
        collate_fn=collate,
        worker_init_fn=_begin,
    )


def _begin(_: int) -> None:
    give_way()


def helpers(pictures: int, devices: int = 1) -> tuple[int, int]:
    """How many processes read and how many write for each device, if nobody says.

    Drawing and writing take about twice as long as reading.
    """
    if pictures < _MANY:
        return 0, 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // devices)
    return max(1, min(_MOST_READERS, cores // 4)), max(2, min(_MOST_WRITERS, cores // 2))


class Explainer:
    """Explains batches.

    Args:
        subject: the model, and how it wants its images.
        methods: the options of each method, by its name.
        targets: the classes; None is the predicted one.
        against: the class that each of them is held against, or None.
    """

    def __init__(
        self, subject: Subject, methods: Methods, targets: Sequence[int | None], against: int | None = None
    ) -> None:
        self.subject, self.targets, self.against = subject, targets, against
        self.for_a_class = {name: methods[name] for name in methods if find_method(name).gradient}
        self.plain = {name: methods[name] for name in methods if name not in self.for_a_class}

    def __call__(self, batch: dict[str, Any], files: Sequence[Path]) -> Iterator[Finding]:
        """Yields what is found in each picture of a batch: first the maps of methods without a class."""
        images: Tensor | None = batch["images"]
        if images is None:
            return iter(())
        first, *others = self.targets
        asked = self._asked(images, self.plain | self.for_a_class, first)
        for target in others if self.for_a_class else ():
            asked += self._asked(images, self.for_a_class, target)
        return findings(batch, asked, files)

    def _asked(self, images: Tensor, methods: Methods, target: int | None) -> list[Asked]:
        weight = next(self.subject.model.parameters(), images)
        images = images.to(weight.device, weight.dtype)
        score: Target = target
        if target is not None and self.against is not None:
            score = difference(target, self.against)
        found = self.subject.explain(images, methods, score)
        return [
            Asked(one.cpu(), target, self.against if name in self.for_a_class else None)
            for name, one in found.items()
        ]


def predict(
    explainer: Explainer,
    files: Sequence[Path],
    loader: DataLoader[Any],
    deliver: Callable[[int], Delivery],
    *,
    device: torch.device,
    progress: bool,
) -> dict[int, str]:
    """Explains all pictures on one device.

    Args:
        explainer: explains a batch.
        files: the pictures.
        loader: reads them.
        deliver: returns what is given the findings, in order; its processes begin after those that read.
        device: where the model runs.
        progress: show how far it is, on a terminal.

    Returns:
        By its place, why a picture could not be read.
    """
    errors: dict[int, str] = {}
    begun = False
    batches = _batches(loader)
    delivery = deliver(1)
    try:
        explainer.subject.model.to(device)
        with progress_bar(len(files), progress) as bar:
            for batch in batches:
                errors |= batch["errors"]
                for finding in explainer(batch, files):
                    if not begun:  # nothing is written for a model that cannot be explained
                        delivery.begin()
                        begun = True
                    delivery.add(finding)
                bar.update(len(batch["places"]) + len(batch["errors"]))
        delivery.finish()
    finally:
        delivery.close()
    return errors


def progress_bar(count: int, shown: bool) -> Any:
    """Returns tqdm's, on a terminal alone: it says images a second, also where one takes longer."""
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} images [{elapsed}<{remaining}, {rate_noinv_fmt}]"
    return tqdm(total=count, unit=" images", bar_format=form, disable=None if shown else True)


def _batches(loader: DataLoader[Any]) -> Iterator[dict[str, Any]]:
    """Begins to read, and says in a sentence if a process that reads is ended."""
    batches = iter(loader)

    def found() -> Iterator[dict[str, Any]]:
        try:
            yield from batches
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise VitxError(
                "a process that reads pictures was killed, perhaps because memory ran out: continue "
                "with --resume, and fewer of them by --workers"
            ) from error

    return found()


def one_device(options: Any) -> torch.device | None:
    """Returns the one device that the options mean; None where the pictures are shared among several.

    Raises:
        VitxError: There is no such device.
    """
    started = max(int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "SLURM_NTASKS"))
    kinds = {"auto": ("cuda", "mps", "cpu"), "gpu": ("cuda", "mps")}
    known = kinds.get(options.accelerator, (options.accelerator,))
    alone = options.devices == "1" and options.num_nodes == 1 and options.strategy == "auto" and started == 1
    if not alone or not set(known) <= {"cuda", "mps", "cpu"}:
        return None
    for kind in known:
        if kind == "cpu" or getattr(torch, kind).is_available():
            return torch.device(kind)
    raise VitxError(f"there is no {options.accelerator} that torch can use here: take --accelerator cpu")

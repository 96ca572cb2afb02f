"""Many pictures through a model: read in threads beside it, explained batch by batch, and delivered."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from vitx.attribution import find_method, telling
from vitx.cli.asking import Asked
from vitx.cli.delivery import Delivery, Tell, give_way
from vitx.cli.findings import Finding, Map, Picture
from vitx.cli.model import Subject
from vitx.cli.output import Output
from vitx.errors import VitxError, in_words
from vitx.explanation import Explanation
from vitx.pictures.captions import classes_said
from vitx.pictures.colors import draw
from vitx.pictures.overview import Overview

_MOST_READERS, _MOST_WRITERS = 8, 16


@dataclass(frozen=True)
class Place:
    """A process: its device, its rank among all, and the number of devices on its machine."""

    device: torch.device
    rank: int = 0
    world: int = 1
    devices: int = 1

    def threads(self, workers: int | None) -> tuple[int, int]:
        """Return how many threads read, by default as the cores allow, and how many draw and write."""
        if workers is not None:
            return workers, 2 * workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = max(1, cores // self.devices)
        return min(_MOST_READERS, max(1, cores // 4)), min(_MOST_WRITERS, max(2, cores // 2))


@dataclass(frozen=True)
class Explainer:
    """Answer questions about batches of pictures, by all methods."""

    subject: Subject
    questions: Sequence[Asked]

    def __call__(self, pictures: Sequence[Picture]) -> Iterator[Finding]:
        """Yield the finding in each picture of a batch."""
        if not pictures:
            return
        images = torch.stack([picture.image for picture in pictures if picture.image is not None])
        images = images.to(next(self.subject.model.parameters(), images))
        answers: list[tuple[Asked, Explanation]] = []
        for asked in self.questions:
            methods = self.subject.methods
            if answers and not asked.name:  # maps of no class are there
                methods = {name: methods[name] for name in methods if find_method(name).gradient}
            found = (
                self.subject.explain(images, methods, asked.target(self.subject, images)) if methods else {}
            )
            answers += [
                (asked, (one if one.paired else one.without_images()).cpu()) for one in found.values()
            ]
        answers.sort(key=lambda one: not one[0].name and bool(find_method(one[1].method).gradient))
        logits = answers[0][1].logits.cpu()
        logits = logits[:: len(logits) // len(pictures)].reshape(len(pictures), -1)
        for row, picture in enumerate(pictures):
            maps = tuple(_map(asked, found, row) for asked, found in answers)
            yield Finding(**vars(picture) | {"image": None}, logits=logits[row], maps=maps)

    def page(self, files: Sequence[Path]) -> Any:
        """Return the page of some pictures, by the method that tells most, for the first question."""
        images, name = self.subject.batch(files), telling(self.subject.methods)
        target = self.questions[0].target(self.subject, images)
        found = self.subject.explain(images, {name: self.subject.methods[name]}, target)[name]
        return found.view(self.subject.short_names)


def _map(asked: Asked, found: Explanation, row: int) -> Map:
    width = 1 + found.paired
    target = None if found.target is None else int(found.target[row * width])
    if target is None and not asked.name and find_method(found.method).gradient:
        target = asked.index  # explained by a function or a text
    return Map(asked, found[row * width : (row + 1) * width], target)


def predict(
    explainer: Explainer,
    files: Sequence[Path],
    output: Output,
    *,
    batch_size: int = 8,
    workers: int | None = None,
    tell: Tell | None = None,
    overview: Overview | None = None,
    place: Place,
) -> dict[int, str]:
    """Explain the share of this process, and return, by its place, why a picture could not be read.

    Args:
        explainer: explains a batch.
        files: all pictures.
        output: takes the findings.
        batch_size: pictures that are explained at once.
        workers: threads that read; None: as the cores allow.
        tell: is called for each picture; None: a bar shows the progress.
        overview: gathers all pictures.
        place: of this process.
    """
    subject = explainer.subject
    subject.model.to(place.device)
    readers, writers = place.threads(workers)
    size = 1 if subject.prepare.keep_aspect else batch_size
    errors: dict[int, str] = {}
    numbers = range(place.rank, len(files), place.world)
    share = [files[number] for number in numbers]
    begun = place.world > 1  # where another process may be the first to find something
    if begun:
        output.begin(share, place.rank == 0)

    def read(number: int) -> Picture | str:
        try:
            return read_picture(number, files[number], subject)
        except VitxError as error:
            return str(error)
        except Exception as error:  # what prepares it may be the user's
            return f"{files[number]} could not be prepared: {in_words(error)}"

    with (
        Delivery(output, writers, 4 * writers + 2 * size, tell) as delivery,
        progress_bar(len(files), tell is None and place.rank == 0) as bar,
        closing(_ahead(read, numbers, size, readers)) as batches,
    ):
        for batch in batches:
            errors |= {number: found for number, found in batch.items() if isinstance(found, str)}
            for finding in explainer([found for found in batch.values() if isinstance(found, Picture)]):
                if not begun:  # nothing is written for a model that cannot be explained
                    output.begin(share)
                    begun = True
                if overview is not None:
                    _gather(overview, finding, subject)
                delivery.add(finding)
            bar.update(min(len(batch) * place.world, len(files) - bar.n))  # as if all were equally fast
        delivery.finish()
    return errors


def _gather(overview: Overview, finding: Finding, subject: Subject) -> None:
    """Add a picture to the overview, by the method that tells most and the class of its map."""
    assert finding.pixels is not None
    method = telling([one.found.method for one in finding.maps])
    found = next(one.found for one in finding.maps if one.found.method == method)
    name = classes_said(found.logits[:1], found.target, subject.short_names)[0] if subject.classes else None
    overview.add(finding.pixels, found.maps[0], name)


def read_picture(number: int, file: Path, subject: Subject) -> Picture:
    """Read a picture and prepare it, or raise a VitxError."""
    prepare = subject.prepare
    picture = prepare.read(file, subject.max_pixels)
    image, scale = prepare(picture), (prepare.mean, prepare.std)
    given = scale if isinstance(picture, Image.Image) else None  # whose range is known
    pixels, note = draw(image[None], prepare.channels, [scale], given=given)
    return Picture(number, file, image, pixels[0], note)


def _ahead(
    read: Callable[[int], Any], numbers: Sequence[int], size: int, threads: int
) -> Generator[dict[int, Any], None, None]:
    """Read in threads, in order and a little ahead, and yield batches."""
    with ThreadPoolExecutor(threads, initializer=give_way) as pool:
        left = iter(numbers)
        begun: deque[tuple[int, Future[Any]]] = deque()
        count = size + 2 * threads
        try:
            while True:
                begun.extend((number, pool.submit(read, number)) for number in islice(left, count))
                if not begun:
                    return
                batch = [begun.popleft() for _ in range(min(size, len(begun)))]
                count = len(batch)
                yield {number: future.result() for number, future in batch}
        finally:
            pool.shutdown(cancel_futures=True)


def progress_bar(count: int, shown: bool) -> Any:
    """Return tqdm's, on a terminal alone: in images a second, also where one takes longer."""
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} images [{elapsed}<{remaining}, {rate_noinv_fmt}]"
    return tqdm(total=count, unit=" images", bar_format=form, disable=None if shown else True)

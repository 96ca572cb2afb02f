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

from vitx.attribution import Methods, find_method
from vitx.cli.delivery import Delivery
from vitx.cli.found import Finding, Map, Picture
from vitx.cli.output import Output
from vitx.cli.questions import Asking
from vitx.cli.subject import Subject
from vitx.cli.threads import give_way
from vitx.errors import VitxError, in_words
from vitx.explanation import Explanation
from vitx.inputs.preprocessing import Preprocessing
from vitx.models.prediction import Target, difference
from vitx.pictures.colors import draw
from vitx.targets import Question

_MOST_READERS, _MOST_WRITERS = 8, 16


@dataclass(frozen=True)
class Pace:
    """How many pictures are in hand at once.

    Attributes:
        batch_size: how many the model explains at once.
        readers: threads that read; None: as the cores allow.
        writers: threads that draw and write; None: as the cores allow.
        most_pixels: a larger picture is refused; None: as its kind has it.
    """

    batch_size: int = 8
    readers: int | None = None
    writers: int | None = None
    most_pixels: int | None = None

    def threads(self, devices: int) -> tuple[int, int]:
        """Returns how many read and how many write for each of the devices of this machine.

        Drawing and writing take about twice as long as reading.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = max(1, cores // devices)
        readers, writers = min(_MOST_READERS, cores // 4), min(_MOST_WRITERS, cores // 2)
        return self.readers or max(1, readers), self.writers or max(2, writers)


@dataclass(frozen=True)
class Place:
    """Where a process computes: on which device, as which of all processes; `devices` are on this machine."""

    device: torch.device
    rank: int = 0
    world: int = 1
    devices: int = 1


class Explainer:
    """Explains batches.

    Args:
        subject: the model, and how it wants its images.
        methods: the options of each method, by its name.
        targets: the classes; None is the predicted one.
        against: the class that each of them is held against, or None.
        questions: in place of classes.
    """

    def __init__(
        self,
        subject: Subject,
        methods: Methods,
        targets: Sequence[int | None],
        against: int | None = None,
        questions: Sequence[Asking] = (),
    ) -> None:
        self.subject, self.methods, self.targets = subject, methods, targets
        self.against, self.questions = against, questions
        self.for_a_class = {name: methods[name] for name in methods if find_method(name).gradient}
        self.plain = {name: methods[name] for name in methods if name not in self.for_a_class}

    def __call__(self, pictures: Sequence[Picture]) -> Iterator[Finding]:
        """Yields what is found in each picture of a batch: first the maps of methods without a class."""
        if not pictures:
            return
        images = torch.stack([picture.image for picture in pictures if picture.image is not None])
        weight = next(self.subject.model.parameters(), images)
        images = images.to(weight.device, weight.dtype)
        if self.questions:
            yield from self._answers(pictures, images)
            return
        first, *others = self.targets
        asked = [(first, one) for one in self._explained(images, self.plain | self.for_a_class, first)]
        for target in others if self.for_a_class else ():
            asked += [(target, one) for one in self._explained(images, self.for_a_class, target)]
        logits = asked[0][1].logits.reshape(len(pictures), -1).numpy()
        for row, one in enumerate(pictures):
            maps = tuple(self._map(found, target, row) for target, found in asked)
            yield Finding(**vars(one) | {"image": None}, logits=logits[row], maps=maps)

    def _answers(self, pictures: Sequence[Picture], images: torch.Tensor) -> Iterator[Finding]:
        """Yields what answers the questions of each picture."""
        methods, answers = self.plain | self.for_a_class, []
        for one in self.questions:
            found = self.subject.explain(images, methods, one.put(self.subject, images))
            answers += [(one.name, explanation.without_images().cpu()) for explanation in found.values()]
        logits = answers[0][1].logits.reshape(len(pictures), -1).numpy()
        for row, picture in enumerate(pictures):
            maps = tuple(_answer(name, found, row) for name, found in answers)
            yield Finding(**vars(picture) | {"image": None}, logits=logits[row], maps=maps)

    def first(self, images: torch.Tensor) -> Explanation:
        """Explains prepared images, (B, C, H, W), by the first method, for what is asked for first."""
        name, options = next(iter(self.methods.items()))
        put = self.questions[0].put(self.subject, images) if self.questions else self._score(self.targets[0])
        return self.subject.explain(images, {name: options}, put)[name]

    def _explained(self, images: torch.Tensor, methods: Methods, target: int | None) -> list[Explanation]:
        found = self.subject.explain(images, methods, self._score(target))
        return [explanation.without_images().cpu() for explanation in found.values()]

    def _score(self, target: int | None) -> Target | Question:
        if target is not None and self.subject.texts is not None:
            return self.subject.texts.at(target)
        return target if target is None or self.against is None else difference(target, self.against)

    def _map(self, found: Explanation, asked: int | None, row: int) -> Map:
        against = self.against if found.method in self.for_a_class else None
        hidden = against is not None or self.subject.texts is not None  # by a target function, or a question
        target = asked if hidden and found.method in self.for_a_class else None
        if found.target is not None:
            target = int(found.target[row])
        said = None if found.captions is None else found.captions[row]
        return Map(found.method, target, asked, **_arrays(found, row), against=against, said=said)


def _answer(question: str, found: Explanation, row: int) -> Map:
    box = None if found.boxes is None else tuple(found.boxes[row].tolist())
    said = found.captions[row] if found.captions else ""
    return Map(found.method, None, None, **_arrays(found, row), question=question, said=said, box=box)


def _arrays(found: Explanation, row: int) -> dict[str, Any]:
    named = {"values": found.maps, "signed": found.signed, "sinks": found.sinks}
    return {name: None if one is None else one[row].numpy() for name, one in named.items()}


def predict(
    explainer: Explainer,
    files: Sequence[Path],
    output: Output,
    pace: Pace,
    tell: Callable[[Path, str, list[Path]], None] | None,
    place: Place,
) -> dict[int, str]:
    """Explains the pictures that are this process's share.

    Args:
        explainer: explains a batch.
        files: all pictures.
        output: what is found goes there.
        pace: how many pictures are in hand at once.
        tell: is given each picture, what is said of it and its files; None: a bar shows how far it is.
        place: where this process computes.

    Returns:
        By its place, why a picture could not be read.
    """
    explainer.subject.model.to(place.device)
    prepare, (readers, writers) = explainer.subject.prepare, pace.threads(place.devices)
    size = 1 if prepare.keep_aspect else pace.batch_size
    errors: dict[int, str] = {}
    numbers = range(place.rank, len(files), place.world)
    share = [files[number] for number in numbers]
    begun = place.world > 1  # where another process may be the first to find something
    if begun:
        output.begin(share, place.rank == 0)

    def read(number: int) -> Picture | str:
        try:
            return read_picture(number, files[number], prepare, pace.most_pixels)
        except VitxError as error:
            return str(error)
        except Exception as error:  # what prepares it may be the user's
            return f"{files[number]} could not be prepared: {in_words(error)}"

    with (
        Delivery(output, writers, 4 * writers + 2 * size, tell) as delivery,
        progress_bar(len(files), tell is None and place.rank == 0) as bar,
        closing(ahead(read, numbers, size, readers)) as batches,
    ):
        for batch in batches:
            errors |= {number: found for number, found in batch.items() if isinstance(found, str)}
            for finding in explainer([found for found in batch.values() if isinstance(found, Picture)]):
                if not begun:  # nothing is written for a model that cannot be explained
                    output.begin(share)
                    begun = True
                delivery.add(finding)
            bar.update(min(len(batch) * place.world, len(files) - bar.n))  # as if all were equally fast
        delivery.finish()
    return errors


def read_picture(number: int, file: Path, prepare: Preprocessing, most_pixels: int | None = None) -> Picture:
    """Reads a picture, and prepares it.

    Raises:
        VitxError: It cannot be read.
    """
    picture = prepare.read(file, most_pixels)
    image = prepare(picture)
    scale = (prepare.mean, prepare.std)
    given = scale if isinstance(picture, Image.Image) else None  # whose range is known
    pixels, note = draw(image[None], prepare.channels, [scale], given=given)
    return Picture(number, file, image, pixels[0], note)


def ahead(
    read: Callable[[int], Any], numbers: Sequence[int], size: int, threads: int
) -> Generator[dict[int, Any], None, None]:
    """Reads in threads, in order and a little ahead, and yields what was read in batches."""
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
    """Returns tqdm's, on a terminal alone: it says images a second, also where one takes longer."""
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} images [{elapsed}<{remaining}, {rate_noinv_fmt}]"
    return tqdm(total=count, unit=" images", bar_format=form, disable=None if shown else True)


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

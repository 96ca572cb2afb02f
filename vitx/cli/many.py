"""Pipeline for many pictures: read in threads, explained in batches, drawn and written in threads."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from tqdm import tqdm

from vitx.attribution import find_method, telling
from vitx.cli.asking import Request
from vitx.cli.findings import NOTHING, Finding, Map
from vitx.cli.folder import Output
from vitx.cli.model import Subject
from vitx.errors import VitxError, failure
from vitx.explanation import Explanation
from vitx.pictures.captions import classes_said
from vitx.pictures.colors import draw
from vitx.pictures.overview import Overview

SHARD = 256  # pictures in a file
_FEW = 20  # pictures that are reported one by one, without a progress bar
_MOST_READERS = 8
Item = TypeVar("Item")
Result = TypeVar("Result")


def explained(
    subject: Subject, questions: Sequence[Request], pictures: Sequence[Finding]
) -> Iterator[Finding]:
    """Answer questions about a batch of pictures by all methods, and yield the finding in each picture."""
    if not pictures:
        return
    images = subject.move(torch.stack([picture.image for picture in pictures]))
    answers: list[tuple[Request, Explanation]] = []
    for asked in questions:
        methods = subject.methods
        if answers and not asked.name:  # methods without a class have run
            methods = {name: methods[name] for name in methods if find_method(name).gradient}
        target = asked.put(subject, images)
        found = subject.explain(images, methods, target) if methods else {}
        small = (one if one.paired else one.without_images() for one in found.values())
        answers += [(asked, one.cpu()) for one in small]
    answers.sort(key=lambda one: not one[0].name and bool(find_method(one[1].method).gradient))
    logits = answers[0][1].logits
    logits = logits[:: len(logits) // len(pictures)].reshape(len(pictures), -1)
    for row, picture in enumerate(pictures):
        maps = []
        for asked, one in answers:
            own = one[row * (1 + one.paired) : (row + 1) * (1 + one.paired)]
            maps.append(Map(asked if asked.name or find_method(one.method).gradient else Request(), own))
        yield replace(picture, image=NOTHING, logits=logits[row], maps=tuple(maps))


def predict(
    questions: Sequence[Request],
    files: Sequence[Path],
    output: Output,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    *,
    devices: int = 1,  # on this machine
    batch_size: int = 8,
    workers: int | None = None,  # reading threads; by default, chosen from the number of cores
    overview: Overview | None = None,
) -> dict[int, str]:
    """Explain the share of one of several processes, and return index -> error for unreadable pictures."""
    subject = output.product.subject
    subject.model.to(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    readers = workers or min(_MOST_READERS, max(1, cores // devices // 4))
    size = 1 if subject.prepare.keep_aspect else batch_size
    tell = len(files) <= _FEW
    errors: dict[int, str] = {}
    numbers = range(rank, len(files), world)
    bar = tqdm(total=len(files), unit="image", disable=None if rank == 0 and not tell else True)

    def read(number: int) -> Finding | None:
        try:
            with failure(f"{files[number]} could not be prepared"):  # preprocessing may be user code
                return read_picture(number, files[number], subject)
        except VitxError as error:
            errors[number] = str(error)
        return None

    def findings() -> Iterator[Finding]:
        with bar, closing(_in_threads(read, numbers, readers, size + 2 * readers)) as pictures:
            while batch := [*islice(pictures, size)]:
                yield from explained(subject, questions, [one for one in batch if one is not None])
                bar.update(min(len(batch) * world, len(files) - bar.n))  # if all are equally fast

    def tasks() -> Iterator[Callable[[], str | None]]:
        found, kept = findings(), list[Finding]()
        # A single process writes nothing before the first finding: the model may turn out unsupported.
        first = [*islice(found, int(world == 1))]
        if first or world > 1:
            output.begin([files[number] for number in numbers], rank == 0)
        for finding in chain(first, found):
            if overview is not None:
                _gather(overview, finding, subject)
            if output.product.kinds or tell:
                yield partial(output.write, finding)
            if output.wants_shard(finding.file):
                kept.append(replace(finding, pixels=NOTHING))
            if len(kept) == SHARD:
                yield partial(output.write_shard, kept)
                kept = []
        if kept:
            yield partial(output.write_shard, kept)

    ahead = 2 * readers if tell else 8 * readers + 2 * size
    with closing(_in_threads(lambda task: task(), tasks(), 2 * readers, ahead)) as written:
        for said in written:
            if tell and said:
                print(said)
    return errors


def _gather(overview: Overview, finding: Finding, subject: Subject) -> None:
    """Add a picture to the overview, with its class and a map, by a class-specific method if there is one."""
    method = telling([one.found.method for one in finding.maps])
    found = next(one.found for one in finding.maps if one.found.method == method)
    name = classes_said(found.logits[:1], found.target, subject.short_names)[0] if subject.classes else None
    overview.add(finding.pixels, found.maps[0], name)


def read_picture(number: int, file: Path, subject: Subject) -> Finding:
    """Read a picture and prepare it, or raise a VitxError."""
    prepare, picture = subject.prepare, subject.prepare.read(file)
    image, scale = prepare(picture), (prepare.mean, prepare.std)
    given = scale if isinstance(picture, Image.Image) else None  # its value range is known
    pixels, note = draw(image[None], prepare.channels, [scale], given=given)
    return Finding(number, file, image, pixels[0], note)


def _in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int
) -> Generator[Result, None, None]:
    """Call a function in threads, on up to `ahead` items in advance, and yield the results in order.

    If the generator is closed early, calls that have begun finish, and the rest are canceled.
    """
    # Torch is single-threaded in each of them: with too many threads, those of the model would stall.
    with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

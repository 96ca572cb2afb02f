"""The findings in one picture: drawn, written as JSON, or stored as arrays."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitx.attribution import title_of
from vitx.cli.asking import Request
from vitx.cli.model import Subject
from vitx.errors import failure
from vitx.explanation import Explanation
from vitx.files import encode, savez, write_or_say
from vitx.pictures.captions import Caption, Names, captions_of, shares_of
from vitx.pictures.drawing import draw_layers
from vitx.pictures.render import Picture
from vitx.pictures.views import Layer, slices_of

NOTHING = torch.empty(0)


@dataclass(frozen=True)
class Map:
    """One map of a picture."""

    asked: Request  # empty if it is about a class and the method is not class-specific
    found: Explanation  # of this picture alone

    @property
    def target(self) -> int | None:
        """The class of the map, or the text; None if it has none."""
        return self.asked.index if self.found.target is None else int(self.found.target[0])

    @property
    def said(self) -> str:
        """The answer in words, or ""."""
        return self.found.captions[0] if self.found.captions else ""

    def arrays(self, target: object, signed: bool) -> dict[str, NDArray[Any]]:
        """Return the map as name -> array; in the name, the class is called `target`."""
        key = self.found.method if self.target is None else f"{self.found.method}_{target}"
        key = key if self.asked.against is None else f"{key}_not_{self.asked.against}"
        key = f"{self.found.method}_{self.asked.name}" if self.asked.name else key
        values = (self.found.signed if signed and self.found.signed is not None else self.found.maps).numpy()
        return {key: values[0]} | ({f"{key}_other": values[1]} if self.found.paired else {})


@dataclass(frozen=True)
class Finding:
    """A picture that was read and, once it is explained, what was found in it."""

    place: int  # index among all pictures
    file: Path
    image: Tensor  # the model's input, (C, H, W); empty once it is explained
    pixels: Tensor  # (H, W, 3) uint8, or (T, H, W, 3) for clips and volumes; empty once it is drawn
    note: str  # about its colors
    logits: Tensor = NOTHING  # (classes,)
    maps: tuple[Map, ...] = ()  # one for each method and question

    @property
    def texts(self) -> str:
        """The similarities of the texts that were asked for, or ""."""
        return ", ".join(dict.fromkeys(one.said for one in self.maps if one.said and one.target is not None))


@dataclass(frozen=True)
class Product:
    """The files to write for each picture."""

    subject: Subject
    kinds: tuple[str, ...]  # some of `vitx.files.PICTURES`, ".npz" for raw maps, ".json" for the prediction
    signed: bool = False  # also show evidence against the class

    def write(self, finding: Finding, paths: Sequence[Path]) -> str:
        """Write the files of one picture, one for each kind, and return a line about it."""
        with failure(f"{finding.file} could not be drawn"):  # such as an image of an unusual shape
            for path, kind in zip(paths, self.kinds, strict=True):
                write_or_say(path, self._writer(kind, finding, paths))
        return "; ".join(filter(None, (str(self._caption(finding)), self._question(finding))))

    def _writer(self, kind: str, finding: Finding, paths: Sequence[Path]) -> Callable[[BinaryIO], Any]:
        if kind == ".npz":
            arrays = {"logits": finding.logits.numpy()}
            for one in finding.maps:
                arrays |= one.arrays(one.target, self.signed)
            return partial(savez, arrays=arrays)
        if kind == ".json":
            facts = json.dumps(self._facts(finding, paths), ensure_ascii=False).encode()
            return lambda file: file.write(facts)
        return partial(encode, picture=self.drawn(finding), suffix=kind)

    def write_shard(self, path: Path, names: Sequence[str], found: Sequence[Finding]) -> None:
        """Write the names and maps of several pictures into one file."""
        arrays: dict[str, NDArray[Any]] = {"files": np.array(names)}
        arrays["logits"] = np.stack([finding.logits.numpy() for finding in found])
        for maps in zip(*(finding.maps for finding in found), strict=True):
            called = "predicted" if maps[0].asked.index is None else maps[0].asked.index
            each = [one.arrays(called, self.signed) for one in maps]
            if maps[0].target is not None:
                arrays[f"{next(iter(each[0]))}_target"] = np.array([one.target for one in maps])
            arrays |= {name: np.stack([one[name] for one in each]) for name in each[0]}
        write_or_say(path, partial(savez, arrays=arrays))

    def drawn(self, finding: Finding) -> Picture:
        """Draw the input next to the maps, (height, width, 3) uint8."""
        first = finding.maps[0]
        pixels = first.found.pixels() if first.found.paired else finding.pixels[None]
        return draw_layers(
            pixels,
            self._layers(finding),
            [self._caption(finding)],
            slices_of(tuple(pixels.shape[1:-1]), len(self.subject.prepare.mean)),
            ("" if first.asked.name else self._question(finding), finding.note),  # others are in titles
            signed=self.signed,
            paired=first.found.paired,
        )

    def _layers(self, finding: Finding) -> dict[str, Layer]:
        """Return title -> map. A title has the method, the question or both, as needed to tell maps apart."""
        methods = len({one.found.method for one in finding.maps}) > 1
        several = len({one.target for one in finding.maps} - {None}) > 1
        shares, layers = shares_of(finding.logits), {}
        for one in finding.maps:
            found, said = one.found, one.said if one.asked.name else ""
            if one.target is not None and several:
                said = f"for {self.subject.name(one.target)}, {shares[one.target]:.0%}"
            title = f"{title_of(found.method)} {said}".strip() if methods or not said else said
            layers[title] = Layer(found.maps, found.signed, found.boxes, found.sinks)
        return layers

    def _caption(self, finding: Finding) -> Caption:
        if finding.texts:
            return Caption(finding.texts)
        if self.subject.classes < 2:
            return Caption("" if finding.maps[0].asked.name else "features, no classes")
        return captions_of(finding.logits[None], class_names=self.subject.short_names)[0]

    def _question(self, finding: Finding) -> str:
        """Return the question in words; "" if it is about texts or a single class."""
        if finding.texts:
            return ""
        if finding.maps[0].asked.name:
            return "; ".join(dict.fromkeys(one.said for one in finding.maps if one.said))
        name = self.subject.name
        asked = {one.target: one.asked.against for one in finding.maps}
        ours = " or ".join(name(one) for one, other in asked.items() if one is not None and other is not None)
        return "".join(f"why {ours} and not {name(one)}" for one in {*asked.values()} if one is not None)

    def _facts(self, finding: Finding, paths: Sequence[Path]) -> dict[str, Any]:
        names, maps = self.subject.class_names, list[dict[str, Any]]()
        shares = shares_of(finding.logits) if self.subject.classes > 1 else None
        for one in finding.maps:
            name, share = _known(one.target, names, shares)
            facts: dict[str, Any] = {"method": one.found.method, "target": one.target}
            facts |= {"target_name": name, "target_probability": share}
            if one.asked.name:
                box = None if one.found.boxes is None else one.found.boxes[0].tolist()
                facts |= {"question": one.asked.name, "said": one.said or None, "box": box}
            elif one.said and one.target is not None:
                facts["said"] = one.said
            if (other := one.asked.against) is not None:
                facts |= {"against": other, "against_name": names and names[other]}
            maps.append(facts)
        best = None if shares is None else int(shares.argmax())
        name, share = _known(best, names, shares)
        said = {"file": str(finding.file), "prediction": best, "name": name, "probability": share}
        return said | {"maps": maps, "files": [str(path) for path in paths]}


def _known(index: int | None, names: Names, shares: Tensor | None) -> tuple[str | None, float | None]:
    """Return the full name and the probability of a class, or None for what is unknown."""
    if index is None:
        return None, None
    name = None if names is None else names[index]
    return name, None if shares is None else round(shares[index].item(), 6)

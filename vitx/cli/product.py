"""What `vitx explain` makes of a picture: drawn, told as JSON, or kept as arrays."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitx.attribution import title_of
from vitx.cli.found import Finding, Map
from vitx.errors import VitxError, in_words
from vitx.files import encode, savez, write_or_say
from vitx.models.classes import short
from vitx.pictures import render
from vitx.pictures.captions import Caption, captions_of
from vitx.pictures.views import Layer, laid_out, slices_of, tile_width


@dataclass(frozen=True)
class Product:
    """What is made of a picture.

    Attributes:
        class_names: the full name of each class, or None.
        picture: the suffix of the pictures, one of `vitx.files.PICTURES`; None: none are drawn.
        maps: whether the raw maps of each picture are written, too.
        json: whether the prediction is written, too.
        signed: whether what speaks against the class is shown, too.
        predicts: whether the model tells classes apart, so that there is something to say.
        channels: how many the model takes.
    """

    class_names: tuple[str, ...] | None
    picture: str | None
    maps: bool
    json: bool
    signed: bool = False
    predicts: bool = True
    channels: int = 3

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Those of the files of a picture."""
        return (
            *((".npz",) if self.maps else ()),
            *((".json",) if self.json else ()),
            *((self.picture,) if self.picture else ()),
        )

    def write(self, finding: Finding, paths: Sequence[Path]) -> str:
        """Writes the files of one picture, and returns what is said of it.

        Args:
            finding: what was found.
            paths: where each of `suffixes` goes.

        Raises:
            VitxError: One of them cannot be written.
        """
        try:
            self._write(finding, paths)
        except VitxError:
            raise
        except Exception as error:  # each format has its own kinds
            raise VitxError(f"{finding.file} could not be drawn: {in_words(error)}") from error
        return "; ".join(filter(None, (str(self._caption(finding)), self._question(finding))))

    def _write(self, finding: Finding, paths: Sequence[Path]) -> None:
        for path, suffix in zip(paths, self.suffixes, strict=True):
            if suffix == ".npz":
                named = {one.key: self._values(one) for one in finding.maps}
                write_or_say(path, partial(savez, arrays={"logits": finding.logits, **named}))
            elif suffix == ".json":
                said = json.dumps(self._facts(finding, paths), ensure_ascii=False).encode()
                write_or_say(path, lambda file, said=said: file.write(said))  # type: ignore[misc]
            else:
                write_or_say(path, partial(encode, picture=self.drawn(finding), suffix=suffix))

    def write_shard(self, path: Path, names: Sequence[str], found: Sequence[Finding]) -> None:
        """Writes the maps of several pictures into one file.

        Args:
            path: of the file.
            names: what each picture is called.
            found: what was found in each, in the same order.

        Raises:
            VitxError: The file cannot be written.
        """
        arrays: dict[str, NDArray[Any]] = {
            "files": np.array(names),
            "logits": np.stack([finding.logits for finding in found]),
        }
        for maps in zip(*(finding.maps for finding in found), strict=True):
            first = maps[0]
            name = first.method
            if first.target is not None:
                name = first.key if first.asked is not None else f"{name}_predicted"
                arrays[f"{name}_target"] = np.array([one.target for one in maps])
            name = first.key if first.question else name
            arrays[name] = np.stack([self._values(one) for one in maps])
        write_or_say(path, partial(savez, arrays=arrays))

    def drawn(self, finding: Finding) -> NDArray[np.uint8]:
        """Draws the input beside the maps, (height, width, 3) uint8."""
        assert finding.pixels is not None
        pixels = finding.pixels[None]
        layers = dict(zip(self.columns(finding), map(_layer, finding.maps), strict=True))
        slices = slices_of(tuple(pixels.shape[1:-1]), self.channels)
        columns, marks = laid_out(pixels, layers, slices, signed=self.signed)
        legend = render.legend("inferno", signed=self.signed)
        captions = [self._caption(finding)]
        question = "" if finding.maps[0].question else self._question(finding)  # which titles say
        note = "; ".join(filter(None, (question, finding.note, marks)))
        return render.grid(columns, captions, tile_width=tile_width(columns, slices), note=note, **legend)

    def columns(self, finding: Finding) -> list[str]:
        """Returns a title for each map: the method, and the class where there are several."""
        several_methods = len({one.method for one in finding.maps if one.target is not None}) > 1
        several_targets = len({one.target for one in finding.maps} - {None}) > 1
        titles = []
        several_ways = len({one.method for one in finding.maps}) > 1
        for one in finding.maps:
            title = title_of(one.method)
            if one.question:
                title = f"{title}, {one.said}" if several_ways else f"{one.said}"
            if one.target is not None and several_targets:
                named = f"for {self._short_name(one.target)}, {_shares(finding)[one.target]:.0%}"
                title = f"{title} {named}" if several_methods else named
            titles.append(title)
        return titles

    def _caption(self, finding: Finding) -> Caption:
        if finding.said:
            return Caption(finding.said)
        if not self.predicts:
            return Caption("" if finding.maps[0].question else "features, no classes")
        return captions_of(torch.from_numpy(finding.logits)[None], class_names=self._short_names)[0]

    def _question(self, finding: Finding) -> str:
        """What the maps answer that is not what one class has, or nothing."""
        if finding.said:
            return ""
        if finding.maps[0].question:
            return "; ".join(dict.fromkeys(one.said for one in finding.maps if one.said))
        asked = {one.target: one.against for one in finding.maps if one.against is not None}
        if not asked:
            return ""
        other = self._short_name(next(iter(asked.values())))
        ours = " or ".join(self._short_name(target) for target in asked if target is not None)
        return f"why {ours} and not {other}"

    def _facts(self, finding: Finding, paths: Sequence[Path]) -> dict[str, Any]:
        """Returns what the JSON says."""
        shares = _shares(finding)
        best = int(shares.argmax()) if self.predicts else None

        def known(index: int | None) -> tuple[str | None, float | None]:
            if index is None:
                return None, None
            return self._full_name(index), round(shares[index].item(), 6) if self.predicts else None

        maps: list[dict[str, Any]] = []
        for one in finding.maps:
            name, share = known(one.target)
            facts = {"method": one.method, "target": one.target, "target_name": name}
            facts |= {} if one.said is None or one.target is None else {"said": one.said}
            maps.append(facts | {"target_probability": share})
            if one.question:
                maps[-1] |= {"question": one.question, "said": one.said, "box": one.box}
            if one.against is not None:
                maps[-1] |= {"against": one.against, "against_name": self._full_name(one.against)}
        name, share = known(best)
        said = {"file": str(finding.file), "prediction": best, "name": name, "probability": share}
        return said | {"maps": maps, "files": [str(path) for path in paths]}

    def _values(self, one: Map) -> NDArray[np.floating[Any]]:
        return one.signed if self.signed and one.signed is not None else one.values

    def _full_name(self, index: int) -> str | None:
        return None if self.class_names is None else self.class_names[index]

    def _short_name(self, index: int) -> str:
        return str(index) if self._short_names is None else self._short_names[index]

    @cached_property
    def _short_names(self) -> list[str] | None:
        return None if self.class_names is None else [short(name) for name in self.class_names]


def _layer(one: Map) -> Layer:
    arrays = one.values, one.signed, None if one.box is None else np.array(one.box), one.sinks
    return Layer(*(None if array is None else torch.from_numpy(array)[None] for array in arrays))  # type: ignore[arg-type]


def _shares(finding: Finding) -> Tensor:
    """The probability of each class; of one logit, that of not being and of being it."""
    logits = torch.from_numpy(finding.logits).float()
    return logits.softmax(-1) if len(logits) > 1 else torch.cat([1 - logits.sigmoid(), logits.sigmoid()])

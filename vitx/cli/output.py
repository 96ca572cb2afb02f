"""What `vitx explain` writes for each picture, whole or not at all."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vitx import render
from vitx.captions import captions_of
from vitx.cli.subject import Subject
from vitx.errors import VitxError
from vitx.explanation import Explanation
from vitx.files import savez, write_or_say, write_png
from vitx.methods import title_of

_SETTINGS = "vitx.json"
_ALL = "explanations.jsonl"
_TILE_WIDTH = 224


@dataclass(frozen=True)
class Product:
    """What is made of a picture.

    Attributes:
        subject: the model that it was shown to.
        maps: whether the raw maps are written, too.
        json: whether the prediction is written, too.
        signed: whether what speaks against the class is shown, too.
    """

    subject: Subject
    maps: bool
    json: bool
    signed: bool = False

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Those of the files, the last one written last."""
        return (*((".npz",) if self.maps else ()), *((".json",) if self.json else ()), ".png")

    def columns(self, found: Sequence[Explanation]) -> list[str]:
        """Returns a title for each map: the method, and the class where there are several."""
        several_methods = len({e.method for e in found if _target(e) is not None}) > 1
        several_targets = len({_target(explanation) for explanation in found} - {None}) > 1
        return [self._title(explanation, several_methods, several_targets) for explanation in found]

    def _title(self, explanation: Explanation, several_methods: bool, several_targets: bool) -> str:
        method = title_of(explanation.method)
        target = _target(explanation)
        if target is None or not several_targets:
            return method
        share = explanation.logits[0].softmax(-1)[target].item()
        named = f"for {self.subject.name(target)}, {share:.0%}"
        return f"{method} {named}" if several_methods else named

    def picture(self, found: Sequence[Explanation]) -> Any:
        """Draws the input beside the maps, (height, width, 3) uint8."""
        columns = {"input": found[0].pixels()}
        for title, explanation in zip(self.columns(found), found, strict=True):
            columns[title] = explanation.signed_overlays() if self.signed else explanation.overlays()
        captions = captions_of(found[0].logits, class_names=self.subject.short_names)
        if self.signed:
            legend = render.SIGNED
            return render.grid(columns, captions, tile_width=_TILE_WIDTH, colormap=legend[0], ends=legend[1])
        return render.grid(columns, captions, tile_width=_TILE_WIDTH)

    def facts(self, file: Path, found: Sequence[Explanation], files: Sequence[Path]) -> dict[str, Any]:
        """Returns what the JSON says."""
        shares = found[0].logits[0].softmax(-1)
        best = int(shares.argmax())
        return {
            "file": str(file),
            "prediction": best,
            "name": self._full_name(best),
            "probability": round(shares[best].item(), 6),
            "maps": [
                {
                    "method": explanation.method,
                    "target": target,
                    "target_name": None if target is None else self._full_name(target),
                    "target_probability": None if target is None else round(shares[target].item(), 6),
                }
                for explanation in found
                for target in [_target(explanation)]
            ],
            "files": [str(path) for path in files],
        }

    def _full_name(self, index: int) -> str | None:
        names = self.subject.class_names
        return None if names is None else names[index]


class Output:
    """A folder with the files of each picture, named as the picture is.

    Args:
        folder: made if need be.
        files: the pictures; where they are below the folder that holds them all is kept.
        product: what is made of each.
        settings: how, in words.
    """

    def __init__(self, folder: Path, files: Sequence[Path], product: Product, settings: str) -> None:
        self.folder, self.files, self.product, self.settings = folder, files, product, settings
        self._note = folder / _SETTINGS
        parents = {str(file.absolute().parent) for file in files}
        self._above: Path | None = None
        with suppress(ValueError):  # there are no pictures, or they are on several drives
            self._above = Path(os.path.commonpath(parents))

    def check(self) -> None:
        """Raises a VitxError if what is there was made with other settings."""
        if self._note.is_file() and self._note.read_text("utf-8") != self.settings:
            raise VitxError(
                f"the maps in {self.folder} were made with other options, see {self._note}: take another "
                "--output, or leave out --resume"
            )

    def begin(self) -> None:
        """Writes down how the maps are made.

        Raises:
            VitxError: The folder cannot be written to.
        """
        self._put(self._note, self.settings.encode())

    def take_back(self) -> None:
        """Removes what `begin` wrote, and the folder if nothing else is in it."""
        self._note.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def paths(self, file: Path) -> list[Path]:
        """Returns the files that a picture becomes, the last one written last."""
        place = file.absolute()
        within = place.relative_to(self._above) if self._above else Path(*place.parts[1:])
        target = self.folder / within
        return [target.with_name(target.name + suffix) for suffix in self.product.suffixes]

    def is_done(self, file: Path) -> bool:
        """Whether all files of a picture are there: each is whole, as it was written at once."""
        return all(path.is_file() for path in self.paths(file))

    def write(self, file: Path, found: list[Explanation], says: bool = False) -> None:
        """Writes the files of one picture.

        Args:
            file: the picture.
            found: its explanations, one for each map.
            says: tell it on the console.
        """
        paths = self.paths(file)
        for path in paths:
            if path.suffix == ".npz":
                write_or_say(path, partial(savez, arrays=self._arrays(found)))
            elif path.suffix == ".json":
                facts = self.product.facts(file, found, paths)
                self._put(path, json.dumps(facts, ensure_ascii=False).encode())
            else:
                write_png(path, self.product.picture(found))
        if says:
            best = captions_of(found[0].logits, class_names=self.product.subject.short_names)[0]
            print(f"{file}: {best}, see {paths[-1]}")

    def join_json(self) -> None:
        """Writes what the JSON of all pictures says into one file, a line for each."""
        names = [path for file in self.files for path in self.paths(file) if path.suffix == ".json"]
        lines = [path.read_bytes() for path in names if path.is_file()]
        self._put(self.folder / _ALL, b"".join(line + b"\n" for line in lines))

    def _arrays(self, found: Sequence[Explanation]) -> dict[str, Any]:
        """The raw maps, each (h, w), by method and class, and the logits."""
        arrays = {"logits": found[0].logits[0].numpy()}
        for explanation in found:
            target = _target(explanation)
            name = explanation.method if target is None else f"{explanation.method}_{target}"
            shown = explanation.signed if self.product.signed else None
            arrays[name] = (explanation.maps if shown is None else shown)[0].numpy()
        return arrays

    def _put(self, path: Path, content: bytes) -> None:
        write_or_say(path, lambda opened: opened.write(content))


def _target(explanation: Explanation) -> int | None:
    return None if explanation.target is None else int(explanation.target[0])

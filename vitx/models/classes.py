"""Class names of a model, and the lookup of a class by name."""

import difflib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from vitx.errors import VitxError, failure


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read class names from a file, one per line."""
    with failure(f"the class names could not be read from {path}"):
        return tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())


@lru_cache
def known_class_names(classes: int) -> tuple[str, ...] | None:
    """Return the class names of ImageNet-1k, from timm, for 1,000 classes; None for other numbers."""
    if classes != 1000:
        return None
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_descriptions())


def declared_names(model: object) -> tuple[str, ...] | None:
    """Return the class names of a Hugging Face model; None if it has none, or placeholders (LABEL_0)."""
    known = getattr(getattr(model, "config", None), "id2label", None)
    if not known or any(name == f"LABEL_{index}" for index, name in known.items()):
        return None
    return tuple(str(known[index]) for index in sorted(known))


def find_class(target: str, classes: int, names: Sequence[str] | None) -> int:
    """Return the index of a class, given by its number, its name, or one of the synonyms in its name."""
    wanted = _forms(target)[0]
    found = [index for index, name in enumerate(names or ()) if wanted in _forms(name)]
    if len(found) > 1:
        numbers = " or ".join(map(str, found))
        raise VitxError(f"{len(found)} classes are called {target!r}: name one by its number, {numbers}")
    if found:
        return found[0]
    if target.strip().removeprefix("-").isdecimal():
        if 0 <= int(target) < classes:
            return int(target)
        raise VitxError(f"there is no class {target}: the model has classes 0 to {classes - 1}")
    if names is None:
        raise VitxError(f"the class names are unknown, so {target!r} cannot be found: give its number")
    known = {form: name for name in names for form in _forms(name)}
    inside = [name for form, name in known.items() if wanted and wanted in form]
    near = [known[match] for match in difflib.get_close_matches(wanted, known, n=5, cutoff=0.6)]
    hints = list(dict.fromkeys(repr(short(name)) for name in near + inside))[:5]
    hint = f"did you mean {' or '.join(hints)}?" if hints else "give its number"
    raise VitxError(f"there is no class {target!r}: {hint}")


def short(name: str) -> str:
    """Return the first synonym in a class name, such as "tabby" of "tabby, tabby cat"."""
    return name.split(",")[0].strip()


def _forms(name: str) -> list[str]:
    """Return a name and each of its synonyms, in lower case and with single spaces."""
    return [" ".join(part.lower().split()) for part in (name, *name.split(","))]

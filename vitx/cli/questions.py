"""The options that ask for something else than a class: a patch, a region, the objects of a detector."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitx.cli.formatting import add, check_least
from vitx.cli.subject import PREDICTED, Subject
from vitx.errors import VitxError
from vitx.targets import Question, best_queries, query, region, token

_DEFAULTS = {"patch": None, "region": None, "objects": None}


@dataclass(frozen=True)
class Asking:
    """A question of each picture.

    Attributes:
        name: what its map is called among the arrays of a picture.
        put: from the model and its images, (B, C, H, W), to the target.
    """

    name: str
    put: Callable[[Subject, Tensor], Question]


def add_questions(group: Any) -> None:
    """Adds the options."""
    patch = "where this patch looks: its row and column in the map, from 0"
    add(group, "--patch", "N", patch, int, nargs="+")
    part = "a class in a part of a segmentation: the class, and x0 y0 x1 y1 in pixels of what the model takes"
    add(group, "--region", "N", part, float, nargs="+")
    add(group, "--objects", "N", "the N surest objects of a detector, each map with its box", int)


def asked(options: Any) -> list[Asking]:
    """Returns the questions that the options ask, or raises a VitxError if they do not fit together."""
    check_least(options, objects=1)
    given = [name for name in _DEFAULTS if options[name] is not None]
    if len(given) > 1 or (given and (options.target != [PREDICTED] or options.against is not None)):
        others = [*given[1:], *(["target"] if options.target != [PREDICTED] else []), "against"]
        raise VitxError(f"--{given[0]} is a question of its own: leave out --{others[0]}")
    if options.patch is not None:
        _check_count("patch", options.patch, 2, "a row and a column")
        return [_always(f"patch_{options.patch[0]}_{options.patch[1]}", token(*options.patch))]
    if options.region is not None:
        _check_count("region", options.region, 5, "a class, and x0 y0 x1 y1")
        cls, *box = options.region
        return [_always(f"region_{int(cls)}", region(int(cls), box=box))]
    return [_object(number) for number in range(options.objects or 0)]


def _check_count(name: str, given: Sequence[float], count: int, what: str) -> None:
    if len(given) != count:
        raise VitxError(f"--{name} takes {what}, found {' '.join(f'{one:g}' for one in given)}")


def _always(name: str, question: Question) -> Asking:
    return Asking(name, lambda subject, images: question)


def _object(number: int) -> Asking:
    """Asks for one of the surest objects of each picture."""

    def put(subject: Subject, images: Tensor) -> Question:
        found = next(iter(subject.explain(images, {"rollout": {}}).values()))
        if found.objects is None:
            raise VitxError(f"--objects takes a detector, and the model puts out {tuple(found.logits.shape)}")
        return query(best_queries(found, number + 1)[:, number])

    return Asking(f"object_{number + 1}", put)

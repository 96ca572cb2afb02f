"""Options that choose the question about each picture: a class, a text, another picture, or a part of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitx.attribution import Methods, find_method
from vitx.cli.model import PREDICTED, Subject
from vitx.cli.options import add, check_least
from vitx.errors import VitxError
from vitx.inputs.reading import find_picture
from vitx.models.prediction import difference
from vitx.passes import Target
from vitx.targets import Text, best_queries, query, region, similar_to, token

_OTHERS = ("similar_to", "patch", "region", "objects")  # questions other than a class or a text


@dataclass(frozen=True)
class Request:
    """A request of the command: one question about each picture."""

    target: Target = None
    index: int | None = None  # of a class or a text; None for the predicted class and other questions
    against: int | None = None  # the class or text to compare with
    name: str = ""  # of another question, in the names of arrays
    object: int | None = None  # instead of a target: rank of a detected object by confidence, from 0

    def put(self, subject: Subject, images: Tensor) -> Target:
        """Return the target for some images, (B, C, H, W)."""
        if self.object is None:
            return self.target
        found = subject.explain(images, {"rollout": {}})["rollout"]
        if found.objects is None:
            raise VitxError(f"--objects needs a detector, but the model returns {tuple(found.logits.shape)}")
        return query(best_queries(found, self.object + 1)[:, self.object])


def add_questions(group: Any) -> None:
    """Add these options to a group."""
    add(group, "--against", "CLASS", "why --target (or --text), and not this: the difference of their scores")
    add(group, "--text", "TEXT", "texts that a CLIP compares with the picture; one map for each", nargs="+")
    add(group, "--similar-to", "FILE", "what makes the picture like this one; both get a map")
    add(group, "--patch", ("ROW", "COLUMN"), "where this patch of the map looks, from 0", int, nargs=2)
    part = "a class in a part of a segmentation, in pixels of the model's input"
    add(group, "--region", ("CLASS", "X0", "Y0", "X1", "Y1"), part, float, nargs=5)
    add(group, "--objects", "N", "the N surest objects of a detector, each map with its box", int)


def check_questions(options: Any) -> bool:
    """Check the options, and return whether they ask about something other than classes and texts."""
    check_least(options, objects=1)
    given = [name for name in ("text", *_OTHERS) if options[name] is not None]
    given += ["target"] if options.target != [PREDICTED] else []
    other = bool(given) and given[0] in _OTHERS
    given += ["against"] if other and options.against is not None else []
    if len(given) > 1:
        first, second = (name.replace("_", "-") for name in given[:2])
        raise VitxError(f"--{first} cannot be combined with other questions: leave out --{second}")
    return other


def questions_of(options: Any, subject: Subject) -> list[Request]:
    """Return the questions that the options ask: at least one."""
    if options.text is not None:
        texts = Text(*options.text, against=options.against, tokenizer=subject.tokenizer)
        other = None if options.against is None else len(options.text)
        return [Request(texts.at(place), place, other) for place in range(len(options.text))]
    if options.similar_to is not None:
        file = find_picture(options.similar_to, subject.prepare.suffixes)
        return [Request(similar_to(subject.batch([file])), name="similar")]
    if options.patch is not None:
        row, column = options.patch
        return [Request(token(row, column), name=f"patch_{row}_{column}")]
    if options.region is not None:
        cls, *box = options.region
        return [Request(region(int(cls), box=box), name=f"region_{int(cls)}")]
    if options.objects is not None:
        return [Request(name=f"object_{place + 1}", object=place) for place in range(options.objects)]
    targets = dict.fromkeys(map(subject.find_class, options.target))
    if options.against is None:
        return [Request(one, one) for one in targets]
    against = subject.find_class(options.against)
    if against is None or None in targets:
        raise VitxError("--against compares two classes: name both, as in --target dog --against wolf")
    if against in targets:
        raise VitxError(f"--target and --against are the same class, {subject.name(against)}: name two")
    return [Request(difference(one, against), one, against) for one in targets if one is not None]


def check_target(targets: Sequence[str], methods: Methods, against: str | None = None) -> None:
    """Raise a VitxError if a class is asked for but no method explains classes."""
    asked = [f"--target {target}" for target in targets if target != PREDICTED]
    asked += ["--against"] if against is not None else []
    if asked and not any(find_method(name).gradient for name in methods):
        given = f"{asked[0]} needs a method for classes, not {' or '.join(methods)}"
        raise VitxError(f"{given}: add --method evidence")

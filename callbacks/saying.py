"""What the callback says: once, and where it is heard."""

import re
import warnings
from pathlib import Path

import lightning.pytorch as pl
from lightning_utilities.core import rank_zero

from vitx.callbacks.explaining import Explainer
from vitx.callbacks.images import Samples
from vitx.colours import Colours
from vitx.methods import title_of


def warn(sentence: str) -> None:
    """Warns, on rank 0; through Lightning's logger where a project silences warnings."""
    if _silenced(sentence):
        rank_zero.rank_zero_only(rank_zero.log.warning)(sentence)
    else:
        rank_zero.rank_zero_warn(sentence)


def inform(sentence: str) -> None:
    """Says what went well, on rank 0."""
    rank_zero.rank_zero_info(sentence)


def _silenced(sentence: str) -> bool:
    """Whether the filters of `warnings` ignore it; those of a module or a line are none of ours."""
    for action, message, category, module, line in warnings.filters:
        about_us = issubclass(UserWarning, category) and not (module or line)
        if about_us and (message is None or re.match(message, sentence)):
            return action == "ignore"
    return False


def first_words(
    samples: Samples, explainer: Explainer, colours: Colours, trainer: pl.Trainer, folder: Path
) -> str:
    """Says what was found: which images, how they are shown, what names the classes, where pictures are."""
    if samples.out_of is not None:
        images = f"{len(samples)} of {samples.out_of:,} images"
    elif samples.places is None and samples.source:
        images = f"the first {len(samples)} images, as their places cannot be known"
    else:
        images = f"{len(samples)} images"
    of = f" of {samples.source}" if samples.source else ""
    shown = ", ".join(title_of(name) for name in explainer.explained)
    known = f"{len(samples.class_names)} names of classes" if samples.class_names else "no names of classes"
    where = ", ".join(type(logger).__name__ for logger in trainer.loggers) or str(folder)
    hint = "; the model puts out features: methods of a score need a target function" * explainer.classless
    return f"watches {images}{of} by {shown}: {colours}; {known}; pictures in {where}{hint}"

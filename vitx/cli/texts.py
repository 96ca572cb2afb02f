"""The texts that pictures are compared with, and the model that compares them."""

from pathlib import Path
from typing import Any

import torch

import vitx
from vitx.cli.subject import Subject, check_sizes
from vitx.errors import VitxError
from vitx.models.clip import load_open_clip
from vitx.models.hub import load_towers
from vitx.targets import Text


def load_towers_of(options: Any) -> Subject:
    """Loads the model that compares images with the texts that the options say.

    Raises:
        VitxError: They do not say one model, or it cannot be loaded or explained so.
    """
    if (options.hf is None) == (options.open_clip is None):
        raise VitxError("--text needs a model of images and texts: either --hf NAME, or --open-clip NAME")
    other = [name for name in ("model", "factory", "checkpoint", "module") if options[name] is not None]
    other += ["class_names"] if options.class_names is not None else []
    if other:
        raise VitxError(f"--{other[0].replace('_', '-')} does not go with --text: leave it out")
    check_sizes(options, "--hf" if options.hf else "--open-clip")
    if options.hf is not None:
        if options.weights is not None:
            raise VitxError("--hf has weights of its own: leave out --weights")
        model, prepare, tokenizer = load_towers(options.hf, options.trust)
    else:
        weights = None if options.weights is None else Path(options.weights)
        model, prepare, tokenizer = load_open_clip(options.open_clip, weights, options.trust)
    texts = Text(options.text, against=options.against, tokenizer=tokenizer, maps="nearest")
    trial = torch.zeros(1, *prepare.shape, dtype=next(model.parameters()).dtype)
    vitx.explain(model.eval(), trial, target=texts)  # tells before any image is read what cannot be explained
    names = (*options.text, *([options.against] if options.against is not None else []))
    return Subject(model, prepare, len(options.text), names, texts)

"""`vitx ask`: what in a picture makes a vision-language model say a word."""

import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser
from torch import Tensor

import vitx
from vitx.attribution import find_method, methods
from vitx.cli.formatting import HelpFormatter, add
from vitx.errors import VitxError
from vitx.files import png_path, write_png
from vitx.inputs.reading import find_pictures
from vitx.models.hub import load_answering
from vitx.pictures import render
from vitx.pictures.captions import Caption
from vitx.targets import Question, answer, word

_TILE = 224  # pixels
DESCRIPTION = """\
Ask a vision-language model about a picture: what makes it say a word?

  vitx ask cat.jpg --hf my_llava/ --prompt "What is in the picture?"
  vitx ask cat.jpg --hf my_llava/ --prompt "What is in the picture?" --word dog cat
  vitx ask before.jpg after.jpg --hf my_qwen/ --prompt "What has changed?"

Without --word, the model answers, and each word of its answer has a map; with it, each of those words at the
place where the answer would begin. Several pictures are those of one prompt. The file gets a row for each
picture, or for each part of it that the model sees by itself, and a column for each word.
"""


def parser() -> ArgumentParser:
    """Returns what reads the options of the command."""
    made = ArgumentParser(description=DESCRIPTION, formatter_class=HelpFormatter)
    add(made, "paths", "PATH", "image files, all of one prompt", nargs="+")
    add(made, "--hf", "NAME", "a model of Hugging Face: a folder, or a name on the hub", required=True)
    add(made, "--prompt", "TEXT", "what the model is asked", required=True)
    add(made, "--word", "WORD", "words that it might say (default: those of its answer)", nargs="+")
    add(made, "--method", "NAME", f"one of {', '.join(methods())}", default="evidence")
    add(made, "--most-tokens", "N", "how long the answer may be", int, default=20)
    add(made, "--trust", "", "also run code that comes with the model")
    add(made, "--output", "FILE", "the PNG file to write", default="vitx-ask.png")
    return made


def run(options: Any) -> int:
    """Runs the command and returns its exit status."""
    path = png_path(options.output)
    find_method(options.method)
    if options.most_tokens < 1:
        raise VitxError(f"--most-tokens must be at least 1, found {options.most_tokens}")
    pictures = find_pictures(options.paths)
    model, processor = load_answering(options.hf, options.trust)
    target: Question = answer(options.prompt, processor, most_tokens=options.most_tokens)
    if options.word:
        target = word(*options.word, prompt=options.prompt, processor=processor)
    found = vitx.explain(model.eval(), [*pictures], options.method, target=target)
    write_png(path, drawn(found, options.prompt, [picture.name for picture in pictures]))
    for said in dict.fromkeys(found.captions or ()):
        print(said)
    print(f"see {options.output}")
    return 0


def drawn(found: vitx.Explanation, prompt: str, names: Sequence[str]) -> Any:
    """Draws a row for each picture and a column for each word, (height, width, 3) uint8.

    Args:
        found: for each word, the maps of all pictures, or of the parts that a model sees by themselves.
        prompt: stands above the only picture, or below several.
        names: of the pictures.
    """
    captions = list(found.captions or ())
    rows = next((place for place, one in enumerate(captions) if one != captions[0]), len(captions))
    overlays = found.overlays()
    columns: dict[str, Tensor] = {"input": found.pixels()[:rows]}
    for place in range(0, len(captions), rows):
        columns[_title(captions[place], columns)] = overlays[place : place + rows]
    if rows == 1:
        return render.grid(columns, [Caption(prompt)], tile_width=_TILE)
    parts = names if len(names) == rows else [f"part {number} of {rows}" for number in range(1, rows + 1)]
    return render.grid(columns, [Caption(part) for part in parts], tile_width=_TILE, note=prompt)


def _title(caption: str, taken: dict[str, Tensor]) -> str:
    """Returns a word and how likely it is, which no other column is called."""
    title = re.sub(r": \S+ \(", " (", caption).replace('"', "")
    while title in taken:
        title += " "
    return title

"""Ask a vision-language model about a picture: what makes it say a word?

  vitx ask cat.jpg --model my_llava/ --prompt "What is in the picture?"
  vitx ask cat.jpg --model my_llava/ --prompt "What is in the picture?" --word dog cat
  vitx ask before.jpg after.jpg --model hf-hub:my/qwen --prompt "What has changed?"

Without --word, the model answers, and each word of its answer gets a map. With --word, each given word gets
one, as the beginning of the answer. Several pictures belong to one prompt. The file has a row for each
picture, or for each part of it that the model sees separately, and a column for each word.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

import vitx
from vitx.attribution import find_method, methods
from vitx.cli.folder import write_and_say
from vitx.cli.options import add, check_least
from vitx.files import png_path
from vitx.inputs.reading import find_pictures
from vitx.models.named import load_answering
from vitx.pictures import render
from vitx.pictures.captions import Caption
from vitx.targets import Question, answer, word

_TILE = 224  # pixels


def add_options(command: Any) -> None:
    """Add the options of the command."""
    add(command, "paths", "PATH", "image files, all for one prompt", nargs="+")
    add(command, "--model", "NAME", "a model of Hugging Face: a folder, or hf-hub:NAME", required=True)
    add(command, "--prompt", "TEXT", "the question for the model", required=True)
    add(command, "--word", "WORD", "words that it might answer (default: those of its answer)", nargs="+")
    add(command, "--method", "NAME", f"one of {', '.join(methods())}", default="evidence")
    add(command, "--max-tokens", "N", "the most tokens of an answer", int, default=20)
    add(command, "--trust", "", "also run code that comes with the model")
    add(command, "--output", "FILE", "the PNG file to write", default="vitx-ask.png")


def run(options: Any) -> int:
    """Run the command and return its exit status."""
    path = png_path(options.output)
    find_method(options.method)
    check_least(options, max_tokens=1)
    pictures = find_pictures(options.paths)
    model, processor = load_answering(options.model.removeprefix("hf-hub:"), options.trust)
    target: Question = answer(options.prompt, processor, most_tokens=options.max_tokens)
    if options.word:
        target = word(*options.word, prompt=options.prompt, processor=processor)
    found = vitx.explain(model.eval(), [*pictures], options.method, target=target)
    for said in dict.fromkeys(found.captions or ()):
        print(said)
    return write_and_say(path, _drawn(found, options.prompt, [picture.name for picture in pictures]))


def _drawn(found: vitx.Explanation, prompt: str, names: Sequence[str]) -> render.Picture:
    """Draw a row for each picture or part of it; the prompt is above a single row, or below several."""
    captions = list(found.captions or ())
    rows = next((place for place, one in enumerate(captions) if one != captions[0]), len(captions))
    overlays = found.overlays()
    columns: dict[str, Tensor] = {"input": found.pixels()[:rows]}
    for place in range(0, len(captions), rows):
        title = re.sub(r": \S+ \(", " (", captions[place]).replace('"', "")  # the word and its probability
        while title in columns:
            title += " "
        columns[title] = overlays[place : place + rows]
    if rows == 1:
        return render.grid(columns, [Caption(prompt)], tile_width=_TILE)
    parts = names if len(names) == rows else [f"part {number} of {rows}" for number in range(1, rows + 1)]
    return render.grid(columns, [Caption(part) for part in parts], tile_width=_TILE, note=prompt)

"""See what a Vision Transformer looks at.

vitx explain cat.jpg --model deit_tiny_patch16_224         what does it look at in this picture?
vitx explain cat.jpg --model ... --target tabby            what speaks for this class?
vitx explain photos/ --model ... --overview                what do many pictures share?
vitx explain cat.jpg --model my_clip/ --text "a cat"       what makes it like this text?
vitx ask cat.jpg --model my_llava/ --prompt "What is it?"  what makes it answer so?
vitx sweep cat.jpg --model ...                             which options suit this model?
vitx compare cat.jpg --weights a.pth b.pth --model ...     what changed between two checkpoints?
vitx sanity cat.jpg dog.jpg --model ...                    do the maps show what the model has learned?
vitx timelapse logs/demo/version_0                         how did it learn to look there?
vitx report logs/demo/version_0                            the same on one page
vitx report logs/                                          how do my trainings differ?
"""

import os
import re
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentError

from vitx.cli.options import new_name, new_parser
from vitx.errors import VitxError
from vitx.inputs.reading import SUFFIXES
from vitx.version import __version__

# Each names a module with `add_options(command)` and `run(options)`, whose docstring is the help text.
COMMANDS = {
    "explain": "explain pictures, one or a million",
    "ask": "explain what a vision-language model answers",
    "sweep": "show one picture under every head fusion and several discard ratios",
    "compare": "show one picture through several models or checkpoints",
    "sanity": "make the model random, layer by layer: do its maps follow?",
    "timelapse": "make a film of one training, or of several side by side",
    "report": "put one training on a page, or compare several",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its status: 0, 1 if a part was skipped, 2 for bad input, 130 if interrupted."""
    parser = new_parser(__doc__, prog="vitx", version=__version__, exit_on_error=False)
    commands = parser.add_subcommands(dest="command", title="commands")
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Only the requested command is imported.
    command: Any = import_module(f"vitx.cli.{words[0]}") if words and words[0] in COMMANDS else None
    own = new_parser(command.__doc__ if command else "")
    if command:
        command.add_options(own)
    for name, help in COMMANDS.items():
        commands.add_subcommand(name, own if name in words[:1] else new_parser(""), help=help)
    if not words:
        parser.print_help(sys.stderr)
        return 2
    try:
        options = parser.parse_args(words)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\b")  # about odd metadata
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # from Lightning
            status: int = command.run(options[options.command])
        sys.stdout.flush()
    except (ArgumentError, VitxError) as error:
        said = new_name(words, vars(own.get_defaults())) if isinstance(error, ArgumentError) else ""
        print(f"error: {said or _one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed again at exit
        return 1
    except KeyboardInterrupt:
        more = ": all files are complete; vitx explain --resume continues" if words[0] == "explain" else ""
        print(f"interrupted{more}", file=sys.stderr)
        return 130
    return status


def _one_line(error: Exception) -> str:
    said = " ".join(str(error).split())
    if said.startswith("the following arguments are required"):  # such as "explain.paths, explain.model"
        said = re.sub(r"\w+\.(path|image|run)s?\b", lambda found: found[1].upper(), said)
        said = re.sub(r"\w+\.(\w+)", r"--\1", said)
    if "nrecognized arguments" in said and any(suffix in said.lower() for suffix in SUFFIXES):
        dash = "put file names that begin with a dash after a lone --"
        said += f"; {dash if ': -' in said else 'name pictures first, and only one for sweep and compare'}"
    return said

"""The command `vitx report`: a training on one page, or several compared."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from vitx.cli.comparison import draw_comparison
from vitx.cli.formatting import HelpFormatter, add, check_least
from vitx.cli.places import add_places, open_places
from vitx.cli.single import draw_run
from vitx.cli.threads import one_thread
from vitx.errors import VitxError
from vitx.files import write_or_say

DESCRIPTION = """\
Put a training on one HTML page: settings, curves, and each image with a slider over the steps, wrong but
confident ones first. Or compare several: the settings that differ, the last numbers, the curves, and the same
images under each training, all moved by one slider. The page needs no network and no other file.

  vitx report logs/demo/version_0 --output report.html
  vitx report logs/                                              compare all runs below it
  vitx report logs/demo logs/shortcut --steps 100                more steps on the slider
  vitx report logs/ --only 'vit_*'                               some of them

A run is a training with vitx's callback or watch, whatever its logger. Its folder `vitx` holds all of it.
"""


def parser() -> ArgumentParser:
    """Returns the options of the command."""
    options = ArgumentParser(description=DESCRIPTION, formatter_class=HelpFormatter)
    add_places(options)
    add(options, "--output", "FILE", "where to write the page", default="report.html")
    add(options, "--steps", "N", "most steps on each slider, evenly spaced", int, default=20)
    return options


@one_thread()
def run(options: Namespace) -> int:
    """Writes the page and says where."""
    check_least(options, steps=1)
    output = Path(options.output)
    if output.is_dir():
        raise VitxError(f"--output is the folder {output}: give the name of a file in it")
    runs, left_out = open_places(options)
    if len(runs) == 1:
        ((name, only),) = runs.items()
        page = draw_run(name, only, options.steps)
    else:
        page = draw_comparison(runs, left_out, options.steps)
    written = page.encode()
    write_or_say(output, lambda file: file.write(written))
    print(f"{output}  {len(written) / 1e6:.1f} MB")
    return int(bool(left_out))

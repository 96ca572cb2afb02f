"""The command `vitx report`: a training on one page, or several compared."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from vitx.cli.comparison import draw_comparison
from vitx.cli.formatting import HelpFormatter
from vitx.cli.places import ONLY, RUN, open_places, say_left_out
from vitx.cli.single import draw_run
from vitx.cli.threads import one_thread
from vitx.errors import VitxError
from vitx.files import write_or_say
from vitx.runs.finding import with_pictures

DESCRIPTION = """\
Write one HTML page about a training: its settings and curves, the first and the last pictures, and each image
with a slider over the steps, wrong but confident ones first. Of several trainings, compare them on one page:
what differs in their settings, their last numbers, their curves, and the same images under each of them,
moved by one slider. The page needs no network and no other file.

  vitx report logs/demo/version_0 --output report.html
  vitx report logs/                                              all runs below it, compared
  vitx report logs/demo logs/shortcut --steps 100                more steps on the slider
  vitx report wandb/                                             what Weights & Biases left on the disk
  vitx report mlflow.db --only 'vit_*'                           some runs of a store of MLflow

A run is a training with vitx's callback. It is read where it was logged: in a log folder of TensorBoard or of
Lightning's CSVLogger, in a folder of Weights & Biases (with `pip install wandb`), or in a store of MLflow
(with `pip install mlflow`), be it a data base, a folder, or an address as sqlite:///mlflow.db. With
`save_maps: true` all is drawn anew from the maps; without it, the logged pictures are taken apart, and the
images keep their order.
"""


def parser() -> ArgumentParser:
    """Returns the options of the command."""
    options = ArgumentParser(description=DESCRIPTION, formatter_class=HelpFormatter)
    add = options.add_argument
    add("run", type=str, metavar="RUN", nargs="+", help=RUN)
    add("--only", type=str, metavar="NAME", nargs="+", help=ONLY)
    add("--output", type=str, metavar="FILE", default="report.html", help="where to write the page")
    add("--steps", type=int, metavar="N", default=20, help="most steps on each slider, evenly spaced")
    return options


@one_thread()
def run(options: Namespace) -> int:
    """Writes the page and says where."""
    if options.steps < 1:
        raise VitxError(f"--steps must be at least 1, found {options.steps}")
    output = Path(options.output)
    if output.is_dir():
        raise VitxError(f"--output is the folder {output}: give the name of a file in it")
    runs, left_out = open_places(options.run, options.only)
    if len(runs) == 1:
        ((name, only),) = runs.items()
        page = draw_run(name, with_pictures(only), options.steps)
    else:
        page = draw_comparison(runs, left_out, options.steps)
    written = page.encode()
    write_or_say(output, lambda file: file.write(written))
    say_left_out(left_out)
    print(f"{output}  {len(written) / 1e6:.1f} MB")
    return int(bool(left_out))

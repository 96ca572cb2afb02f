"""`vitx explain`: pictures, one or a million, beside what the model looks at."""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vitx.cli.formatting import HelpFormatter
from vitx.cli.output import Output, Product
from vitx.cli.subject import PREDICTED, add_model_options, check_target, load_subject, target_class
from vitx.errors import VitxError
from vitx.methods import DEFAULT, NETWORKS, Methods, find_method, methods, with_options
from vitx.pictures import MOST_PIXELS, find_pictures
from vitx.relevance.fusing import HEAD_FUSIONS, check_options

DESCRIPTION = """\
Explains pictures: what does the model look at?

  vitx explain cat.jpg --model deit_tiny_patch16_224
  vitx explain cat.jpg --model deit_tiny_patch16_224 --weights mine.safetensors --target tabby beagle
  vitx explain photos/ --checkpoint last.ckpt --module train_demo.Classifier --json --save-maps
  vitx explain photos/ --model vit_base_patch16_224 --devices 4 --strategy ddp --resume

Each picture becomes one of the same name in the output folder: the input beside one map for each method
and target. Files that cannot be read are named and skipped. A file whose name begins with a dash comes after
a lone "--". The exit status is 0 if all is well, 1 if some pictures were skipped, 2 if nothing was done.
"""
_OPTIONS = ("head_fusion", "discard_ratio", "start_layer", "gradient")
_FEW = 20  # pictures that are reported one by one


def parser() -> ArgumentParser:
    """Returns what reads the options of the command."""
    made = ArgumentParser(description=DESCRIPTION, formatter_class=HelpFormatter)
    made.add_argument(
        "paths", nargs="+", type=str, metavar="PATH", help="files, folders, or patterns as 'photos/*.jpg'"
    )
    add_model_options(made)
    group = made.add_argument_group("what is asked")
    group.add_argument(
        "--method", type=str, nargs="+", default=[DEFAULT], help=f"several of {', '.join(methods())}"
    )
    group.add_argument(
        "--target",
        type=str,
        nargs="+",
        default=[PREDICTED],
        metavar="CLASS",
        help="number, name or 'predicted'; several: one map each",
    )
    group = made.add_argument_group("options of the methods that have them")
    group.add_argument("--head-fusion", type=str, help=f"one of {', '.join(HEAD_FUSIONS)}")
    group.add_argument("--discard-ratio", type=float, help="share in [0, 1) of each layer's smallest entries")
    group.add_argument("--start-layer", type=int, help="the first layer that counts")
    group.add_argument("--gradient", type=str, help=f"one of {', '.join(NETWORKS)}: what is differentiated")
    group = made.add_argument_group("what is written")
    group.add_argument("--output", type=str, default="vitx-maps", metavar="FOLDER", help="made if need be")
    group.add_argument(
        "--signed", action="store_true", help="what speaks for the class in red, against it in blue"
    )
    group.add_argument("--save-maps", action="store_true", help="the raw maps, too, as .npz")
    group.add_argument(
        "--json",
        action="store_true",
        help="prediction, probability, targets and files, too, as .json, and all in explanations.jsonl",
    )
    group.add_argument("--resume", action="store_true", help="skip pictures that were finished before")
    group.add_argument(
        "--max-pixels", type=int, default=MOST_PIXELS, help="larger pictures are refused, not unpacked"
    )
    group = made.add_argument_group("where it runs (Lightning's Trainer)")
    group.add_argument("--accelerator", type=str, default="auto", help="cpu, gpu, ...")
    group.add_argument("--devices", type=str, default="1", help="how many, or which")
    group.add_argument("--num-nodes", type=int, default=1, help="machines")
    group.add_argument("--strategy", type=str, default="auto", help="ddp shares the pictures among devices")
    group.add_argument("--batch-size", type=int, default=8, help="pictures at once on each device")
    group.add_argument(
        "--workers", type=int, metavar="N", help="processes that read pictures, if not as many as help"
    )
    return made


def run(options: Any) -> int:
    """Runs the command and returns its exit status."""
    from vitx.cli.prediction import Explainer, predict  # loads Lightning

    for name, least in (("batch_size", 1), ("max_pixels", 1), ("num_nodes", 1), ("workers", 0)):
        if options[name] is not None and options[name] < least:
            raise VitxError(f"--{name.replace('_', '-')} must be at least {least}, found {options[name]}")
    if not options.output:
        raise VitxError("--output is empty: name a folder")
    asked = _methods(options)
    unsigned = [name for name in asked if not find_method(name).accounts]
    if options.signed and unsigned:
        raise VitxError(f"--signed needs a method with a sign, which {unsigned[0]} has not: take evidence")
    check_target(options.target, asked)
    folder = Path(options.output)
    files = _files(options.paths, folder)
    subject = load_subject(options, options.weights, options.checkpoint, asked)
    targets = dict.fromkeys(target_class(subject, target) for target in options.target)
    explainer = Explainer(subject, asked, list(targets))
    product = Product(subject, options.save_maps, options.json, options.signed)
    output = Output(folder, files, product, _settings(options))
    if options.resume:
        output.check()
    left = [file for file in files if not (options.resume and output.is_done(file))]
    if len(left) < len(files):
        print(f"{len(files) - len(left):,} of {len(files):,} pictures were finished before")
    errors: dict[int, str] = {}
    speaks = True
    if left:
        errors, speaks = predict(
            explainer,
            left,
            subject.prepare,
            output.begin,
            partial(output.write, says=len(left) <= _FEW),
            progress=len(left) > _FEW,
            most_pixels=options.max_pixels,
            batch_size=options.batch_size,
            workers=options.workers,
            accelerator=options.accelerator,
            devices=_devices(options.devices),
            num_nodes=options.num_nodes,
            strategy=options.strategy,
        )
    if not speaks:
        return 0
    for _, error in sorted(errors.items()):
        print(f"skipped: {error}" if len(errors) < len(files) else f"error: {error}", file=sys.stderr)
    if len(errors) == len(files):
        output.take_back()
        return 2
    if options.json:
        output.join_json()
    _say_done(len(left) - len(errors), errors, folder)
    return 1 if errors else 0


def _methods(options: Any) -> Methods:
    """Returns the options of each method that is asked for, or raises a VitxError if one does not fit."""
    given = {name: options[name] for name in _OPTIONS if options[name] is not None}
    check_options(given.get("head_fusion", "mean"), given.get("discard_ratio", 0))
    return with_options(dict.fromkeys(options.method, given))


def _say_done(done: int, errors: dict[int, str], folder: Path) -> None:
    skipped = f", {len(errors):,} skipped" if errors else ""
    print(f"{done:,} picture{'' if done == 1 else 's'} explained{skipped}: see {folder}")


def _files(paths: Sequence[str], folder: Path) -> list[Path]:
    """The pictures, without those that an earlier run wrote among them."""
    written = folder.absolute()
    files = [file for file in find_pictures(paths) if written not in file.absolute().parents]
    if not files:
        raise VitxError(f"all pictures are in the output folder {folder}: take another --output")
    return files


def _settings(options: Any) -> str:
    """What must be the same for a run that goes on with another's output."""
    names = (
        *("model", "weights", "model_options", "checkpoint", "module", "module_options"),
        *("image_size", "mean", "std", "keep_aspect", "class_names"),
        *("method", "target", "signed", *_OPTIONS),
    )
    return json.dumps({name: options[name] for name in names}, indent=1, default=str)


def _devices(given: str) -> Any:
    try:
        return int(given)
    except ValueError:
        return given

"""`vitx explain`: pictures, one or a million, beside what the model looks at."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

from jsonargparse import ArgumentParser
from torch import Tensor

import vitx
from vitx.attribution import DEFAULT, NETWORKS, Methods, find_method, methods, with_options
from vitx.cli.delivery import SHARD
from vitx.cli.formatting import HelpFormatter, add, check_least
from vitx.cli.many import Explainer, Pace, Place, one_device, predict
from vitx.cli.output import Output
from vitx.cli.product import Product
from vitx.cli.questions import add_questions
from vitx.cli.questions import asked as asking
from vitx.cli.showing import add_showing, say_done, show, tell
from vitx.cli.subject import (
    PREDICTED,
    Subject,
    add_model_options,
    check_target,
    load_subject,
    target_class,
)
from vitx.cli.texts import load_towers_of
from vitx.errors import VitxError
from vitx.files import PICTURES
from vitx.functional.fusing import HEAD_FUSIONS, check_options
from vitx.inputs.clips import CLIPS
from vitx.inputs.reading import ARRAYS, MOST_PIXELS, find_pictures, has_suffix
from vitx.inputs.volumes import VOLUMES
from vitx.models.checkpoints import checksum

DESCRIPTION = """\
Explain pictures: what does the model look at?

  vitx explain cat.jpg --model deit_tiny_patch16_224
  vitx explain cat.jpg --model deit_tiny_patch16_224 --weights mine.safetensors
  vitx explain cat.jpg --model deit_tiny_patch16_224 --method evidence --target tabby beagle
  vitx explain cat.jpg --model deit_tiny_patch16_224 --method evidence --target tabby --against beagle
  vitx explain cat.jpg --model deit_tiny_patch16_224 --html --open
  vitx explain cat.jpg --hf my_model/
  vitx explain cat.jpg --hf my_clip/ --text "a cat" "a dog" --against "a wolf"
  vitx explain cat.jpg --open-clip ViT-B-32 --weights mine.safetensors --text "a cat"
  vitx explain cat.jpg --model deit_tiny_patch16_224 --patch 7 4
  vitx explain street.jpg --hf my_detector/ --objects 3
  vitx explain dance.mp4 --hf my_video_model/
  vitx explain scan.nii.gz --factory my_models.net --volume 96 96 96
  vitx explain photos/ --checkpoint last.ckpt --module train_demo.Classifier --json --save-maps
  vitx explain photos/ --model vit_base_patch16_224 --devices 4 --strategy ddp --format jpg --resume

For each picture, the output folder gets one of the same name: the input beside a map for each method and
target. Files that cannot be read are named and skipped. Put file names that begin with a dash after "--".
The exit status is 0 if all is well, 1 if some pictures were skipped, 2 if nothing was done.
"""
_OPTIONS = ("head_fusion", "discard_ratio", "start_layer", "gradient")
_FORMATS = tuple(suffix[1:] for suffix in PICTURES)
_KEPT = ("files", "shards")
_FEW = 20  # pictures that are reported one by one


def parser() -> ArgumentParser:
    """Returns what reads the options of the command."""
    made = ArgumentParser(description=DESCRIPTION, formatter_class=HelpFormatter)
    add(made, "paths", "PATH", "files, folders, or patterns such as 'photos/*.jpg'", nargs="+")
    add_model_options(made)
    _explained(made)
    _written(made.add_argument_group("what to write"))
    group = made.add_argument_group("where to run")
    add(group, "--accelerator", "NAME", "cpu, gpu, ...", default="auto")
    add(group, "--devices", "N", "how many, or which", default="1")
    add(group, "--num-nodes", "N", "how many machines", int, default=1)
    add(group, "--strategy", "NAME", "ddp shares the pictures among devices", default="auto")
    add(group, "--batch-size", "N", "pictures at once on each device", int, default=8)
    readers = "threads that read pictures, for each device (default: chosen from the number of cores)"
    add(group, "--workers", "N", readers, int)
    add(group, "--writers", "N", "threads that draw and write pictures (default: as for --workers)", int)
    return made


def _explained(parser: ArgumentParser) -> None:
    """Adds the options that say what is explained, and how."""
    group = parser.add_argument_group("what to explain")
    known = f"one or more of {', '.join(methods())} (default: {DEFAULT}, and evidence for --text)"
    add(group, "--method", "NAME", known, nargs="+")
    target = "a number, a name or 'predicted'; one map for each"
    add(group, "--target", "CLASS", target, nargs="+", default=[PREDICTED])
    against = "explain why --target and not this class: the difference of their scores"
    add(group, "--against", "CLASS", against)
    add(group, "--text", "TEXT", "or texts that the pictures are compared with; one map for each", nargs="+")
    add(group, "--open-clip", "NAME", "... by a model of open_clip, its weights by --weights, or one of --hf")
    add_questions(group)
    group = parser.add_argument_group("options of the methods")
    add(group, "--head-fusion", "NAME", f"{', '.join(HEAD_FUSIONS)} over the heads")
    ratio = "drop this share of the smallest entries of each layer, in [0, 1)"
    add(group, "--discard-ratio", "SHARE", ratio, float)
    add(group, "--start-layer", "N", "the first layer that counts, from 0", int)
    add(group, "--gradient", "NAME", f"of which network: {' or '.join(NETWORKS)} (as in the papers)")


def _written(group: Any) -> None:
    """Adds those that say what is written, and where."""
    add(group, "--output", "FOLDER", "where to write", default="vitx-maps")
    add(group, "--signed", "", "show what speaks for the class in red, against it in blue")
    add(group, "--format", "NAME", f"format of the pictures: {', '.join(_FORMATS)}", default="png")
    trace = "write nothing: list the steps of the first picture's pass, and what relevance each carried"
    add(group, "--trace", "", trace)
    add(group, "--no-pictures", "", "write only maps or JSON")
    maps = f"also write the raw maps as .npz, a file for each picture, or with 'shards' for {SHARD}"
    add(group, "--save-maps", "shards", maps, nargs="?", const="files")
    said = "also write predictions, targets and files as .json, and all of them in explanations.jsonl"
    add(group, "--json", "", said)
    add_showing(group)
    add(group, "--resume", "", "skip pictures that are finished")
    pixels = f"{MOST_PIXELS:,}, and ten times as many voxels"
    pixels = f"refuse pictures and frames of more pixels, and volumes of more voxels (default: {pixels})"
    add(group, "--max-pixels", "N", pixels, int)


def run(options: Any) -> int:
    """Runs the command and returns its exit status."""
    _check(options)
    options.method = options.method or ["evidence" if options.text else DEFAULT]
    asked, questions = _methods(options), asking(options)
    if not questions:
        check_target(options.text or options.target, asked, options.against)
    unsigned = [name for name in asked if not find_method(name).accounts]
    if options.signed and unsigned:
        raise VitxError(f"--signed needs a method with signs, and {unsigned[0]} has none: use evidence")
    folder = Path(options.output)
    files = _files(options.paths, folder)
    subject, targets, against = _asked(options, None if questions else asked)
    files = _of_kind(files, options.paths, subject.prepare.suffixes)
    if options.trace:
        put = questions[0].put if questions else partial(_put, targets[0])
        print(_trace(subject, files[0], asked, put, options.max_pixels))
        return 0
    explainer = Explainer(subject, asked, targets, against, questions)
    output = _output(options, folder, files, subject)
    output.check(options.resume)
    left = output.left() if options.resume else files
    if len(left) < len(files):
        print(f"{len(files) - len(left):,} of {len(files):,} pictures are already finished")
    errors, speaks = _explain(explainer, left, output, options) if left else ({}, True)
    if not speaks:
        return 0
    for _, error in sorted(errors.items()):
        print(f"skipped: {error}" if len(errors) < len(files) else f"error: {error}", file=sys.stderr)
    if len(errors) == len(files):
        output.take_back()
        return 2
    if options.json:
        output.join_json()
    say_done(len(left) - len(errors), errors, folder)
    lost = {left[place] for place in errors}
    show(options, explainer, [file for file in files if file not in lost], output)
    return 1 if errors else 0


def _asked(options: Any, asked: Methods | None) -> tuple[Subject, list[int | None], int | None]:
    """Returns the model, the classes or texts that are asked for, and the one that they are held against."""
    if options.text:
        subject = load_towers_of(options)
        return subject, [*range(subject.classes)], None if options.against is None else subject.classes
    if options.open_clip is not None:
        raise VitxError("--open-clip compares pictures with texts: add --text, as in --text 'a cat' 'a dog'")
    subject = load_subject(options, options.weights, options.checkpoint, options.hf, methods=asked)
    targets = dict.fromkeys(target_class(subject, target) for target in options.target)
    return subject, list(targets), _against(options, subject, targets)


def _trace(
    subject: Subject,
    file: Path,
    asked: Methods,
    put: Callable[[Subject, Tensor], Any],
    most_pixels: int | None,
) -> vitx.Trace:
    """Records the pass of one picture, and the way back of the first method."""
    name, given = next(iter(asked.items()))
    weight = next(subject.model.parameters())
    image = subject.prepare(subject.prepare.read(file, most_pixels))[None].to(weight)
    return vitx.trace(subject.model, image, name, target=put(subject, image), **given)


def _put(target: int | None, subject: Subject, images: Tensor) -> Any:
    """Returns a class, or the text that stands for one."""
    return target if subject.texts is None or target is None else subject.texts.at(target)


def _check(options: Any) -> None:
    """Raises a VitxError for what no model is needed to refuse."""
    check_least(options, batch_size=1, max_pixels=1, num_nodes=1, workers=1, writers=1)
    for name, known in (("format", _FORMATS), ("save_maps", _KEPT)):
        if options[name] is not None and options[name] not in known:
            raise VitxError(
                f"--{name.replace('_', '-')} is one of {', '.join(known)}, found {options[name]}: "
                "paths come before the options"
            )
    if options.text and options.target != [PREDICTED]:
        raise VitxError("--text says what is asked for: leave out --target")
    if not options.output:
        raise VitxError("--output is empty: name a folder")
    if options.no_pictures and not (options.save_maps or options.json or options.html):
        raise VitxError("--no-pictures leaves nothing to write: add --save-maps, --json or --html")
    if options.save_maps == "shards" and options.keep_aspect:
        raise VitxError("--save-maps shards needs maps of one size: leave out shards, or --keep-aspect")


def _against(options: Any, subject: Subject, targets: Iterable[int | None]) -> int | None:
    """Returns the class that the targets are held against, if any."""
    if options.against is None:
        return None
    found = target_class(subject, options.against)
    if found is None or None in targets:
        raise VitxError("--against compares two classes: name both, as in --target dog --against wolf")
    if found in targets:
        raise VitxError(f"--target and --against are the same class, {subject.name(found)}: name two")
    return found


def _output(options: Any, folder: Path, files: Sequence[Path], subject: Subject) -> Output:
    product = Product(
        class_names=subject.class_names,
        predicts=subject.classes > (0 if subject.texts is None else 1),
        picture=None if options.no_pictures else f".{options.format}",
        maps=options.save_maps == "files",
        json=options.json,
        signed=options.signed,
        channels=len(subject.prepare.mean),
    )
    return Output(folder, files, product, _settings(options, subject), options.save_maps == "shards")


def _explain(
    explainer: Explainer, files: Sequence[Path], output: Output, options: Any
) -> tuple[dict[int, str], bool]:
    """Returns why pictures could not be read, by their place; and whether this process speaks for all."""
    pace = Pace(options.batch_size, options.workers, options.writers, options.max_pixels)
    told = tell if len(files) <= _FEW else None
    explain = partial(predict, explainer, files, output, pace, told)
    device = one_device(options)
    if device is not None:
        return explain(Place(device)), True
    from vitx.cli import trainer  # loads Lightning

    devices = int(options.devices) if options.devices.lstrip("-").isdigit() else options.devices
    settings = {name: options[name] for name in ("accelerator", "num_nodes", "strategy")}
    return trainer.predict(explainer.subject.model, explain, devices=devices, **settings)


def _methods(options: Any) -> Methods:
    """Returns the options of each method that is asked for, or raises a VitxError if one does not fit."""
    given = {name: options[name] for name in _OPTIONS if options[name] is not None}
    check_options(given.get("head_fusion", "mean"), given.get("discard_ratio", 0))
    return with_options(dict.fromkeys(options.method, given))


def _files(paths: Sequence[str], folder: Path) -> list[Path]:
    """The pictures, without those that an earlier run wrote among them."""
    written = folder.resolve()
    found = find_pictures(paths, ARRAYS | CLIPS | VOLUMES)
    files = [file for file in found if written not in (file.parent.resolve() / file.name).parents]
    if not files:
        raise VitxError(f"all pictures are in the output folder {folder}: use another --output")
    return files


def _of_kind(files: Sequence[Path], paths: Sequence[str], suffixes: frozenset[str]) -> list[Path]:
    """Those that the model can take: what else lies in a folder is left out."""
    found = [file for file in files if has_suffix(file, suffixes) or str(file) in paths]
    if not found:
        raise VitxError(f"there is no file that the model takes ({', '.join(sorted(suffixes))})")
    return found


def _settings(options: Any, subject: Subject) -> str:
    """What must be the same for a run that goes on with another's output, also inside the files named."""
    names = (
        *("model", "weights", "model_options", "factory", "hf", "checkpoint", "module", "module_options"),
        *("image_size", "mean", "std", "keep_aspect", "frames", "time_axis", "volume", "class_names"),
        *("method", "target", "against", "text", "open_clip", "patch", "region", "objects", "signed"),
        *_OPTIONS,
    )
    contents = {"weights": checksum(subject.model), "class names": crc32(str(subject.class_names).encode())}
    return json.dumps(
        {name: options[name] for name in names} | {"checksums": contents}, indent=1, default=str
    )

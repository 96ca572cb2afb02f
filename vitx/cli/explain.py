"""Explain pictures, one or a million: what does the model look at?

  vitx explain cat.jpg --model deit_tiny_patch16_224
  vitx explain cat.jpg --model deit_tiny_patch16_224 --weights mine.safetensors --target tabby beagle
  vitx explain cat.jpg --model deit_tiny_patch16_224 --target tabby --against beagle
  vitx explain cat.jpg --model my_package:MyLightningModule --weights last.ckpt
  vitx explain cat.jpg --model my_hugging_face_folder/ --html --open
  vitx explain cat.jpg --model hf-hub:openai/clip-vit-base-patch32 --text "a cat" "a dog"
  vitx explain cat.jpg --model open_clip:ViT-B-32 --weights mine.pt --similar-to dog.jpg
  vitx explain street.jpg --model my_detector/ --objects 3
  vitx explain scan.nii.gz --model my_package:net --input-options volume=96,96,96
  vitx explain photos/ --model deit_tiny_patch16_224 --save jpg maps json --overview
  vitx explain photos/ --model vit_base_patch16_224 --run-options devices=4 strategy=ddp --resume

For each picture, the output folder gets one of the same name: the input next to a map for each method and
target. Files that cannot be read are reported and skipped. Put file names that begin with a dash after "--".
The exit status is 0 if all is well, 1 if some pictures were skipped, 2 if nothing was done.
"""

import json
import os
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import nn

import vitx
from vitx.attribution import DEFAULT, Methods, find_method, methods, telling, title_of, with_options
from vitx.cli.asking import Request, add_questions, check_questions, check_target, questions_of
from vitx.cli.findings import Product
from vitx.cli.folder import Output, linked
from vitx.cli.many import SHARD, predict
from vitx.cli.model import PREDICTED, Subject, add_model_details, add_model_options, load_subject
from vitx.cli.options import ANY, COUNT, TEXT, add, check_least, output_folder, read_settings
from vitx.errors import VitxError
from vitx.files import PICTURES, write_png
from vitx.functional.fusing import check_options
from vitx.inputs.clips import CLIPS, VOLUMES
from vitx.inputs.reading import ARRAYS, find_pictures, has_suffix
from vitx.models.checkpoints import checksum
from vitx.pictures.overview import Overview

_DEFAULT = (DEFAULT, "evidence")
_SAVED = {**{kind[1:]: kind for kind in PICTURES}, "maps": ".npz", "json": ".json", "shards": ""}
_RUN = {"workers": COUNT, "num_nodes": COUNT, "accelerator": TEXT, "devices": ANY, "strategy": TEXT}
_PAGE, _OVERVIEW = "map.html", "overview.png"
_ON_A_PAGE = 8  # pictures


def add_options(command: Any) -> None:
    """Add the options of the command."""
    add(command, "paths", "PATH", "files, folders, or patterns such as 'photos/*.jpg'", nargs="+")
    add_model_options(command)
    add(command, "--method", "NAME", f"{', '.join(methods())} (default: {' and '.join(_DEFAULT)})", nargs="+")
    target = "a number, a name or 'predicted'; one map for each"
    add(command, "--target", "CLASS", f"{target} (default: {PREDICTED})", nargs="+")
    add(command, "--output", "FOLDER", "where to write", default="vitx-maps")
    add(command, "--open", "", "show the result in the browser: the page, the picture, or the folder")
    add_questions(command.add_argument_group("questions other than a class"))
    group = command.add_argument_group("what to write")
    saved = f"files for each picture: {', '.join(_SAVED)} (the maps of {SHARD} pictures in a file)"
    add(group, "--save", "KIND", f"{saved} (default: png)", nargs="+")
    add(group, "--signed", "", "show what speaks for the class in red, against it in blue")
    html = f"also {_PAGE}, a page to click: which patch looks where (of the first {_ON_A_PAGE} pictures)"
    add(group, "--html", "", html)
    add(group, "--overview", "", f"also {_OVERVIEW}: the mean map, and crops around the brightest patches")
    trace = "write nothing: list the steps of the first picture's pass, with the relevance through each"
    add(group, "--trace", "", trace)
    add(group, "--resume", "", "skip pictures that are finished")
    add_model_details(command)
    group = command.add_argument_group("how to compute")
    rare = "of the methods: head_fusion, discard_ratio, start_layer, without_sinks, gradient"
    add(group, "--method-options", "KEY=VALUE", rare, nargs="+")
    add(group, "--batch-size", "N", "pictures at once on each device", int, default=8)
    rare = "workers (threads); accelerator, devices, num_nodes, strategy, as for Lightning's Trainer"
    add(group, "--run-options", "KEY=VALUE", rare, nargs="+")


def run(options: Any) -> int:
    """Run the command and return its exit status."""
    running = _check(options)
    options.target, options.save = options.target or [PREDICTED], options.save or ["png"]
    other = check_questions(options)
    asked = _methods(options)
    if not other:
        check_target(options.text or options.target, asked, options.against)
    for name in asked if options.signed else ():
        if not find_method(name).accounts:
            raise VitxError(f"--signed needs a method with signed maps, and {name} has none: use evidence")
    folder = output_folder(options)
    files = _files(options.paths, folder)
    subject, questions = _asked(options, asked, other)
    suffixes = subject.prepare.suffixes
    files = [file for file in files if has_suffix(file, suffixes) or str(file) in options.paths]
    if not files:
        raise VitxError(f"found no file of a type that the model takes ({', '.join(sorted(suffixes))})")
    if options.trace:
        (name, given), *_ = subject.methods.items()
        image = subject.batch(files[:1])
        target = questions[0].put(subject, image)
        print(vitx.trace(subject.model, image, name, target=target, **given))
        return 0
    sharded = "shards" in options.save
    if sharded and subject.prepare.keep_aspect:
        raise VitxError("--save shards needs maps of one size: leave out shards, or keep_aspect")
    kinds = tuple(dict.fromkeys(_SAVED[kind] for kind in options.save if _SAVED[kind]))
    product = Product(subject, kinds, options.signed)
    output = Output(folder, files, product, _settings(options, subject), sharded)
    left = output.left(options.resume)
    if len(left) < len(files):
        print(f"{len(files) - len(left):,} of {len(files):,} pictures are already finished")
    overview = Overview() if options.overview else None
    more = {"batch_size": options.batch_size, "workers": running.pop("workers", None), "overview": overview}
    explain = partial(predict, questions, left, output, **more)
    errors, speaks = _explain(explain, subject.model, running) if left else ({}, True)
    if not speaks:
        return 0
    for _, error in sorted(errors.items()):
        print(f"skipped: {error}" if len(errors) < len(files) else f"error: {error}", file=sys.stderr)
    if len(errors) == len(files):
        return 2
    output.join_json()
    skipped, done = f", {len(errors):,} skipped" if errors else "", len(left) - len(errors)
    print(f"{done:,} picture{'' if done == 1 else 's'} explained{skipped}: see {linked(folder)}")
    lost = {left[place] for place in errors}
    _show(options, questions[0], [file for file in files if file not in lost], output, overview)
    return 1 if errors else 0


def _check(options: Any) -> dict[str, Any]:
    """Return the settings of the run, or raise a VitxError for options that are invalid with any model."""
    check_least(options, batch_size=1)
    for kind in options.save or ():
        if kind not in _SAVED:
            hint = ": paths come before the options" if Path(kind).exists() else ""
            raise VitxError(f"--save takes {', '.join(_SAVED)}, found {kind}{hint}")
    for name in ("save", "html", "overview", "resume", "open") if options.trace else ():
        if options[name]:
            raise VitxError(f"--trace writes nothing: leave out --{name}")
    running = read_settings("--run-options", options.run_options, _RUN)
    if options.overview and (options.resume or _device(running) is None):
        raise VitxError("--overview needs all pictures in one process: leave out --resume, or use one device")
    return running


def _methods(options: Any) -> Methods:
    """Return method -> options for the chosen methods, or raise a VitxError if an option does not fit."""
    given = read_settings("--method-options", options.method_options)
    check_options(given.get("head_fusion", "mean"), given.get("discard_ratio", 0))
    if options.method:
        return with_options(dict.fromkeys(options.method, given))
    takes = [name for name in _DEFAULT if given.keys() <= find_method(name).options.keys()]
    if options.signed or options.text or options.similar_to:
        takes = ["evidence"]
    return with_options(dict.fromkeys(takes or [DEFAULT], given))


def _files(paths: Sequence[str], folder: Path) -> list[Path]:
    """Return the pictures, without those in the output folder, which an earlier run wrote."""
    written, found = folder.resolve(), find_pictures(paths, ARRAYS | CLIPS | VOLUMES)
    files = [file for file in found if written not in (file.parent.resolve() / file.name).parents]
    if not files:
        raise VitxError(f"all pictures are in the output folder {folder}: use another --output")
    return files


def _asked(options: Any, asked: Methods, other: bool) -> tuple[Subject, list[Request]]:
    """Load the model and its questions; classes and texts are tried on a blank picture before any is read."""
    texts = options.text or []
    subject = load_subject(options, asked, optional=not options.method, classes=not other, texts=bool(texts))
    if not texts:
        return subject, questions_of(options, subject)
    names = (*texts, *([options.against] if options.against is not None else []))
    subject = replace(subject, classes=len(texts), class_names=names)
    questions = questions_of(options, subject)
    subject.try_out(asked, questions[0].target)
    return subject, questions


def _settings(options: Any, subject: Subject) -> str:
    """Return what a resumed run must share, as JSON: settings, checksums of the weights and class names."""
    other = ("paths", "output", "open", "save", "html", "overview", "resume", "batch_size", "run_options")
    same = {name: value for name, value in vars(options).items() if name not in other}
    sums = {"weights": checksum(subject.model), "class names": crc32(str(subject.class_names).encode())}
    return json.dumps(same | {"checksums": sums}, indent=1, default=str)


def _explain(explain: Any, model: nn.Module, running: dict[str, Any]) -> tuple[dict[int, str], bool]:
    """Explain pictures; return index -> error for those that failed, and whether this process reports."""
    if (device := _device(running)) is not None:
        return explain(device), True
    from vitx.cli import trainer  # imports Lightning

    return trainer.predict(model, explain, **{"devices": 1} | running)


def _device(running: dict[str, Any]) -> torch.device | None:
    """Return the only device of a run; None if its settings need Lightning, as for several devices."""
    started = max(int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "SLURM_NTASKS"))
    accelerator = running.get("accelerator", "auto")
    kinds = {"auto": ("cuda", "mps", "cpu"), "gpu": ("cuda", "mps")}.get(accelerator, (accelerator,))
    several = running.keys() & {"devices", "num_nodes", "strategy"} or started > 1
    if several or not set(kinds) <= {"cuda", "mps", "cpu"}:
        return None
    for kind in kinds:
        if kind == "cpu" or getattr(torch, kind).is_available():
            return torch.device(kind)
    raise VitxError(f"torch can use no {accelerator} here: use accelerator=cpu")


def _show(options: Any, asked: Request, files: list[Path], output: Output, overview: Overview | None) -> None:
    """Write the overview and the page, and open the result, each if requested."""
    subject = output.product.subject
    name = telling(subject.methods)
    pictures = [path for file in files for path in output.paths(file) if path.suffix in PICTURES]
    made = pictures[0] if len(pictures) == 1 else output.folder
    if overview is not None:
        made = output.folder / _OVERVIEW
        write_png(made, overview.draw(title=title_of(name)))
        print(f"all pictures at once: see {linked(made)}")
    if options.html:
        made = output.folder / _PAGE
        images = subject.batch(files[: 1 if subject.prepare.keep_aspect else _ON_A_PAGE])
        target = asked.put(subject, images)
        found = subject.explain(images, {name: subject.methods[name]}, target)[name]
        found.view(subject.short_names).save(made)
        print(f"a page to click: see {linked(made)}")
    if options.open and not webbrowser.open(made.resolve().as_uri()):
        print(f"no browser was found that could show {made}", file=sys.stderr)

"""The speed of `vitx explain`: next to the model alone, without the model, and for one picture.

    python benchmarks/throughput.py --pictures FOLDER --weights FILE

*Many pictures:* the command from files to files, once its model is loaded, next to `vitx.explain` alone on
the same pictures, already loaded as tensors, in batches of the same size; in turn, on `--cores` cores.
*All but the model:* the same with maps that are computed beforehand, on one core: reading, preparing, drawing
and writing.
*One picture:* `vitx explain cat.jpg` from start to end, next to the import of torch and timm plus the work of
the model itself: it is created, loads its weights, and explains the picture.

All numbers are medians.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import vitx
from vitx.attribution import Methods
from vitx.cli.asking import Request
from vitx.cli.findings import Product
from vitx.cli.folder import Output
from vitx.cli.many import explained, predict, read_picture
from vitx.cli.model import Subject
from vitx.files import PICTURES, encode
from vitx.inputs.prepared import preprocessing_of, to_tensor
from vitx.inputs.reading import find_pictures
from vitx.models.checkpoints import model_of_weights
from vitx.models.classes import known_class_names

BATCH = 8
PREDICTED = [Request()]
_CPU = torch.device("cpu")
GOALS = {"share": 0.75, "start": 1.5, "drawing": 10}
IMPORT = "import torch, timm"
MADE = """
import sys, time, torch, timm
from pathlib import Path
import vitx
from vitx.models.checkpoints import model_of_weights
from vitx.inputs.prepared import prepared
from vitx.inputs.reading import find_pictures
name, weights, method, pictures = sys.argv[1:]
begun = time.perf_counter()
model = model_of_weights(name, Path(weights)).eval()
made = time.perf_counter()
images, _ = prepared(model, find_pictures([pictures]))
"""
ONE = f"""{MADE}
ready = time.perf_counter()
vitx.explain(model, images, method)
print(made - begun + time.perf_counter() - ready)
"""
ALONE = f"""{MADE}
vitx.explain(model, images[:{BATCH}], method)  # the first call takes longer
ready = time.perf_counter()
for batch in images.split({BATCH}):
    vitx.explain(model, batch, method)
print(time.perf_counter() - ready)
"""
WHOLE = """
import sys, time
from vitx.cli import explain, main
explain_all = explain._explain
def timed(*arguments):
    begun = time.perf_counter()
    found = explain_all(*arguments)
    taken.append(time.perf_counter() - begun)
    return found
taken, explain._explain = [], timed
main(sys.argv[1:])
print(*taken)
"""


@dataclass(frozen=True)
class Known(Subject):
    """A subject whose maps were computed beforehand."""

    maps: dict[str, vitx.Explanation] | None = None

    def explain(self, images: Tensor, methods: Methods, target: Any = None) -> dict[str, vitx.Explanation]:
        """Return the maps of the first batch, for as many images."""
        assert self.maps is not None
        return {name: found[: len(images)] for name, found in self.maps.items()}


def main() -> None:
    """Measure and print."""
    options = _options()
    files = find_pictures([options.pictures])[: options.count]
    _on(options.cores)
    subject = _subject(options)
    images = to_tensor(files, subject.prepare)
    print(f"{len(files)} pictures; {options.model}, {options.method}; on {options.cores} cores\n")
    _many(options, files)
    _without_model(options, subject, files, images)
    _on(options.cores)
    _one(options, files[0])


def _many(options: Any, files: list[Path]) -> None:
    alone, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder) / "pictures"
        chosen.mkdir()
        for file in files:
            (chosen / file.name).symlink_to(file.absolute())
        for number in range(options.rounds):
            output = Path(folder) / f"maps-{number}"
            alone.append(len(files) / _told([ALONE, *_words(options), str(chosen)]))
            whole.append(len(files) / _told([WHOLE, *_explain(options, chosen, output)]))
    share = median(w / a for w, a in zip(whole, alone, strict=True))
    print(f"vitx.explain alone            {median(alone):8.1f} pictures/s")
    print(f"vitx explain, files to files  {median(whole):8.1f} pictures/s")
    print(f"  share                       {share:8.2f} (goal: at least {GOALS['share']})\n")


def _without_model(options: Any, subject: Subject, files: list[Path], images: Tensor) -> None:
    maps = vitx.explain_methods(subject.model, images[:BATCH], [options.method])
    known = Known(
        subject.model, subject.prepare, subject.classes, subject.class_names, {options.method: {}}, maps=maps
    )
    _on(1)
    _parts(known, files[:50])
    for suffix in PICTURES:
        rate = _rate(options, known, files, suffix)
        print(f"all but the model, {suffix:5}      {rate:8.1f} pictures/s on one core")
    print()


def _parts(subject: Subject, files: list[Path]) -> None:
    """Print the times of drawing and encoding."""
    product = _product(subject, ".png")
    pictures = [read_picture(number, file, subject) for number, file in enumerate(files)]
    batches = (pictures[start : start + BATCH] for start in range(0, len(files), BATCH))
    found = [finding for batch in batches for finding in explained(subject, PREDICTED, batch)]
    product.drawn(found[0])
    begun = time.perf_counter()
    drawn = [product.drawn(finding) for finding in found]
    taken = 1000 * (time.perf_counter() - begun) / len(found)
    print(f"drawing                       {taken:8.1f} ms each, on one core (goal: {GOALS['drawing']})")
    for suffix in PICTURES:
        with BytesIO() as file:
            begun = time.perf_counter()
            for picture in drawn:
                encode(file, picture, suffix)
            taken = 1000 * (time.perf_counter() - begun) / len(found)
            size = file.tell() / len(found) / 1000
        print(f"encoding as {suffix:5}             {taken:8.1f} ms each, {size:.0f} kB")


def _rate(options: Any, subject: Subject, files: list[Path], suffix: str) -> float:
    """Explain all pictures as the command does, and return the number per second."""
    with tempfile.TemporaryDirectory() as folder:
        output = Output(Path(folder) / "maps", files, _product(subject, suffix), "")
        begun = time.perf_counter()
        errors = predict(PREDICTED, files, output, _CPU, batch_size=BATCH, workers=1)
        taken = time.perf_counter() - begun
        assert not errors
        assert not output.left(resume=True)
    return len(files) / taken


def _one(options: Any, picture: Path) -> None:
    imports, own, whole = [], [], []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            imports.append(_seconds([sys.executable, "-c", IMPORT]))
            own.append(_told([ONE, *_words(options), str(picture)]))
            words = _explain(options, picture, Path(folder))
            whole.append(_seconds([sys.executable, "-m", "vitx", *words]))
    ratio = median(w / (i + o) for w, i, o in zip(whole, imports, own, strict=True))
    print(f"importing torch and timm      {median(imports):8.2f} s")
    print(f"the model's own work          {median(own):8.2f} s")
    print(f"vitx explain, start to end    {median(whole):8.2f} s")
    print(f"  ratio                       {ratio:8.2f} (goal: at most {GOALS['start']})")


def _seconds(words: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True)
    return time.perf_counter() - begun


def _told(code_and_words: list[str]) -> float:
    """Run code in a new process, and return the number that it prints last."""
    said = subprocess.check_output([sys.executable, "-c", *code_and_words], text=True)
    return float(said.split()[-1])


def _words(options: Any) -> list[str]:
    return [options.model, str(options.weights), options.method]


def _explain(options: Any, pictures: Path, output: Path) -> list[str]:
    model = ["--model", options.model, "--weights", str(options.weights), "--method", options.method]
    return ["explain", str(pictures), *model, "--run-options", "accelerator=cpu", "--output", str(output)]


def _subject(options: Any) -> Subject:
    model = model_of_weights(options.model, options.weights)
    prepare = preprocessing_of(model.eval())
    classes = vitx.explain(model, torch.zeros(1, 3, *prepare.size)).logits.shape[1]
    return Subject(model, prepare, classes, known_class_names(classes), {options.method: {}})


def _product(subject: Subject, suffix: str) -> Product:
    return Product(subject, (suffix,))


def _on(cores: int) -> None:
    """Restrict this process, and those that it starts, to a number of cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, _CORES[:cores])
    torch.set_num_threads(cores)


_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _options() -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", required=True, metavar="FOLDER", help="folder of photographs")
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a timm model")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE", help="weights of the model")
    parser.add_argument("--method", default="evidence")
    parser.add_argument("--count", type=int, default=200, help="number of pictures")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Accuracy of maps: every method of vitx, and others, on images with annotated objects.

    pip install -e ".[bench]"
    python benchmarks/faithfulness.py --data FOLDER --boxes CSV --weights FILE

FOLDER holds the images; the CSV has a line for each object: image, class_index, x1, y1, x2, y2, in pixels of
the original image. Images are squashed to the model's size (bicubic), as are the boxes. All maps explain the
true class. They are pooled to the grid of patches, so that all are compared alike.

- pointing: whether the brightest point lies in a box of the class
- energy: the share of the map in these boxes
- IoU: of the boxes with the map, cut at its mean (mean of object and background)
- deletion: mean accuracy while 0 to 90 % of the patches are zeroed, the most relevant first
- insertion: the same with the least relevant first

- s: seconds per image; passes: the same relative to a forward pass that is timed in turn with it

In brackets: the 95 % confidence interval of the mean over the images, by the bootstrap. Measurements are kept
in the output folder and reused.
"""

import argparse
import copy
import csv
import json
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import first_line
from PIL import Image
from scipy.stats import bootstrap
from showing import set_apart, table
from torch import Tensor, nn
from tqdm import tqdm
from truth_cases import CONTENDERS, REFERENCE, as_maps, on_grid

from vitx import metrics
from vitx.inputs.prepared import preprocessing_of
from vitx.inputs.preprocessing import Preprocessing
from vitx.models.checkpoints import model_of_weights

MEASURES = {"pointing": 1, "energy": 1, "IoU": 1, "deletion": -1, "insertion": 1}  # 1: more is better
BATCH = 20


@dataclass(frozen=True)
class Data:
    """Images with their ground truth.

    Attributes:
        images: (B, 3, H, W), as the model takes them.
        classes: (B,), the true classes.
        masks: (B, H, W), True in the boxes.
    """

    images: Tensor
    classes: Tensor
    masks: Tensor

    def part(self, chosen: Any) -> "Data":
        """Return some of the images with their ground truth."""
        return Data(self.images[chosen], self.classes[chosen], self.masks[chosen])


def normalized(picture: Image.Image, prepare: Preprocessing) -> Tensor:
    """Return a picture of the model's size, normalized for the model, (3, H, W)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (prepare.mean, prepare.std))
    return (torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 - mean) / std


def load(folder: Path, boxes: Path, model: nn.Module, count: int | None) -> Data:
    """Read the images in the order of their names, and their boxes."""
    objects: dict[str, list[dict[str, str]]] = defaultdict(list)
    with boxes.open(newline="") as file:
        for row in csv.DictReader(file):
            objects[row["image"]].append(row)
    prepare = preprocessing_of(model)
    height, width = prepare.size
    images, masks, classes = [], [], []
    for name in tqdm(sorted(objects)[:count], "reading", disable=None):
        picture = Image.open(folder / name).convert("RGB")
        images.append(normalized(picture.resize((width, height), Image.Resampling.BICUBIC), prepare))
        scale = torch.tensor([width / picture.width, height / picture.height] * 2)
        corners = [[float(row[key]) for key in ("x1", "y1", "x2", "y2")] for row in objects[name]]
        masks.append(metrics.box_masks((torch.tensor(corners) * scale)[None], (height, width))[0])
        classes.append(int(objects[name][0]["class_index"]))
    return Data(torch.stack(images), torch.tensor(classes), torch.stack(masks))


def explain_all(contender: Callable[..., Any], model: nn.Module, data: Data) -> tuple[Tensor, float, float]:
    """Return the maps, (B, h, w), the seconds per image, and the time relative to the forward pass."""
    maps, taken, forward = [], 0.0, 0.0
    for start in tqdm(range(0, len(data.images), BATCH), "explaining", disable=None, leave=False):
        part = data.part(slice(start, start + BATCH))
        begin = time.perf_counter()
        with torch.no_grad():
            model(part.images)
        between = time.perf_counter()
        found = contender(model, part.images, part.classes.tolist())
        forward += between - begin
        taken += time.perf_counter() - between
        maps.append(as_maps(found))
    return torch.cat(maps), taken / len(data.images), taken / forward


def score(judge: Any, data: Data, maps: Tensor, perturbed: int | None) -> dict[str, list[float]]:
    """Return each measure for each image; `judge` is the model that gets the perturbed images."""
    maps = on_grid(maps, judge)
    images, some = data.images[:perturbed].to(judge.head.weight.dtype), maps[:perturbed]
    asked: dict[str, Any] = {"target": data.classes[:perturbed], "measure": "accuracy", "batch_size": 50}
    found = {
        "pointing": metrics.pointing_game(maps, data.masks),
        "energy": metrics.energy_inside(maps, data.masks),
        "IoU": metrics.mean_iou(maps, data.masks),
        "deletion": metrics.deletion(judge, images, some, **asked),
        "insertion": metrics.insertion(judge, images, some, **asked),
    }
    return {name: values.tolist() for name, values in found.items()}


def measure(
    name: str,
    model: nn.Module,
    judge: nn.Module,
    data: Data,
    folder: Path,
    asked: str,
    perturbed: int | None,
) -> dict[str, Any]:
    """Return the scores and times of a contender, or its error; reuse the same measurement if saved."""
    path = folder / f"{name.replace(' ', '_').replace(',', '').replace('/', '-')}.json"
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text())
        if known["asked"] == asked and "error" not in known:
            return known
    found: dict[str, Any] = {"asked": asked}
    try:
        maps, found["seconds"], found["ratio"] = explain_all(CONTENDERS[name], model, data)
        found |= score(judge, data, maps, perturbed)
    except Exception as error:  # peers may fail in any way
        found["error"] = first_line(error)
    path.write_text(json.dumps(found))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean."""
    if len(set(values)) < 2:
        return values[0], values[0]
    rng = np.random.default_rng(0)
    found = bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=rng)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def differs(values: Sequence[float], others: Sequence[float]) -> bool:
    """Return whether the mean difference on the same images is not 0, at 95 % confidence."""
    low, high = interval([one - other for one, other in zip(values, others, strict=True)])
    return low > 0 or high < 0


def show(found: Mapping[str, Mapping[str, Any]], chosen: slice) -> str:
    """Return the table for some of the images, with marks on what differs from the reference."""
    head = ["", *MEASURES, "s", "passes"]
    lines = []
    for name, known in found.items():
        if "error" in known:
            lines.append([name, f"fails: {known['error']}", *[""] * (len(head) - 2)])
            continue
        cells = []
        for key, sign in MEASURES.items():
            values = known[key][chosen]
            low, high = interval(values)
            mark = ""
            if name != REFERENCE and differs(values, found[REFERENCE][key][chosen]):
                better = sign * (np.mean(values) - np.mean(found[REFERENCE][key][chosen])) > 0
                mark = " ▲" if better else " ▽"
            cells.append(f"{np.mean(values):.3f}{mark} ({low:.2f}–{high:.2f})")
        lines.append([set_apart(name), *cells, f"{known['seconds']:.3f}", f"{known['ratio']:.1f}"])
    return table(head, lines)


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder of the images")
    parser.add_argument("--boxes", type=Path, required=True, metavar="CSV")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE", help="weights of the model")
    parser.add_argument("--model", default="deit_tiny_patch16_224", metavar="NAME", help="a timm model")
    parser.add_argument("--count", type=int, metavar="N", help="take only the first images")
    parser.add_argument(
        "--perturbed", type=int, metavar="N", help="measure deletion and insertion only on the first images"
    )
    parser.add_argument(
        "--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME"
    )
    parser.add_argument(
        "--bfloat16", action="store_true", help="show perturbed images to the model in half precision"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("faithfulness"), metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")  # those of peers
    model = model_of_weights(options.model, options.weights).eval()
    judge: Any = copy.deepcopy(model).bfloat16() if options.bfloat16 else model
    data = load(options.data, options.boxes, model, options.count)
    options.output.mkdir(parents=True, exist_ok=True)
    what = (options.model, options.weights.name, options.data.name, len(data.images))
    asked = " ".join(map(str, (*what, judge.head.weight.dtype, options.perturbed)))
    found = {}
    for name in dict.fromkeys([*options.only, REFERENCE]):
        found[name] = measure(name, model, judge, data, options.output, asked, options.perturbed)
        known = found[name]
        print(name, known.get("error") or {key: round(float(np.mean(known[key])), 3) for key in MEASURES})
    parts = {"All images": slice(None), "Odd images": slice(1, None, 2), "Even images": slice(0, None, 2)}
    text = "\n\n".join(f"## {title}\n\n{show(found, part)}" for title, part in parts.items())
    (options.output / "table.md").write_text(text + "\n")
    print(f"see {options.output / 'table.md'}")


if __name__ == "__main__":
    main()

"""Accuracy of maps for a known cause: models learn to read a mark that reveals the class.

    pip install -e ".[bench,demo]"
    python benchmarks/planted.py

For each kind of mark in demo/marks.py and each seed, the model of configs/shortcut.yaml is trained anew, and
so is the honest model of configs/demo.yaml, without marks. All maps explain the true class. Of 256 validation
scenes, those are explained in which the mark decides: the class is right with it and wrong without. For the
honest model, they are those that it classifies correctly.

- energy: the share of the map on the mark (honest: in the digit's box)
- peak: how often the center of the brightest patch lies there
- deletion: mean accuracy while 0 to 90 % of the patches are zeroed, the most relevant first

Then metrics that need no boxes are computed on the first 64 scenes, before the training and after each epoch,
to see if one distinguishes the trainings. Trained models are kept in the output folder and reused.
"""

import argparse
import copy
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from measuring import first_line
from showing import set_apart, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from truth_cases import CONTENDERS, as_maps, on_grid

from vitx import metrics

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the demo is not an installed package
from demo.digits import DigitScenes, normalized, unnormalized  # noqa: E402
from demo.marks import MARKS  # noqa: E402
from train_demo import Classifier  # noqa: E402

HONEST = "none"
SCENES, FEW, BATCH = 256, 64, 64
EVERYWHERE = "cast"  # a mark that covers the whole picture
MEASURES = ("energy", "peak", "deletion")
ASKED = [name for name in CONTENDERS if "layers" not in name and "mirror" not in name]
METHODS = ("rollout", "grad_rollout", "gae", "evidence")  # whose metrics might distinguish the trainings


@dataclass(frozen=True)
class Planted:
    """A training, and scenes to explain.

    Attributes:
        mark: the kind of mark; `HONEST` for none.
        stages: the model before the training and after each epoch.
        images: (B, 3, 64, 64).
        classes: (B,).
        masks: (B, 64, 64), True on the mark, or in the digit's box if there is no mark.
        decided: (B,), whether the mark decides the prediction of the last model (honest: if it is right).
        said: results of the training: accuracy with the mark, without, and how often a mark of another class
            is followed.
    """

    mark: str
    stages: Sequence[nn.Module]
    images: Tensor
    classes: Tensor
    masks: Tensor
    decided: Tensor
    said: Mapping[str, float] = field(default_factory=dict)


class Snapshots(pl.Callback):
    """A callback that keeps the weights before the training and after each epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the initial weights."""
        self._keep(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights after an epoch."""
        self._keep(pl_module)

    def _keep(self, module: Any) -> None:
        self.states.append(copy.deepcopy(module.model.state_dict()))


def trained(mark: str, seed: int, folder: Path) -> list[nn.Module]:
    """Train, unless trained models were saved, and return the model of each stage."""
    config, shortcut = (
        yaml.safe_load((ROOT / "configs" / name).read_text()) for name in ("demo.yaml", "shortcut.yaml")
    )
    pl.seed_everything(seed, verbose=False)
    module = Classifier(DigitScenes.num_classes, **config["model"])
    path = folder / f"{mark}_{seed}.pt"
    if not path.exists():
        print(f"training: {mark}, seed {seed}", file=sys.stderr, flush=True)
        data = DigitScenes(config["data"]["init_args"]["batch_size"], mark=None if mark == HONEST else mark)
        snapshots = Snapshots()
        trainer = pl.Trainer(
            max_epochs=(config if mark == HONEST else shortcut)["trainer"]["max_epochs"],
            callbacks=[snapshots],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        trainer.fit(module, data)
        torch.save(snapshots.states, path)
    stages = []
    for state in torch.load(path, weights_only=True):
        model = copy.deepcopy(module.model)
        model.load_state_dict(state)
        stages.append(model.eval())
    return stages


@torch.no_grad()
def planted(mark: str, seed: int, folder: Path) -> Planted:
    """Train a model, and test it on scenes with its mark, without, and with that of another class."""
    stages = trained(mark, seed, folder)
    data = DigitScenes()
    data.setup("validate")
    scenes: TensorDataset = data.validation[0]
    clean, classes, boxes = (values[:SCENES] for values in scenes.tensors)
    if mark == HONEST:
        right = stages[-1](clean).argmax(1) == classes
        return Planted(mark, stages, clean, classes, boxes, right, {"without": right.float().mean().item()})

    def marked(digits: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        images, masks = MARKS[mark](unnormalized(clean), digits, boxes, generator)
        return normalized(images), masks

    images, masks = marked(classes)
    others = (classes + torch.randint(1, 10, classes.shape, generator=torch.Generator().manual_seed(1))) % 10
    named, without, misled = (stages[-1](each).argmax(1) for each in (images, clean, marked(others)[0]))
    said = {
        "with": (named == classes).float().mean().item(),
        "without": (without == classes).float().mean().item(),
        "follows": (misled == others).float().mean().item(),
    }
    decided = (named == classes) & (without != classes)
    return Planted(mark, stages, images, classes, masks, decided, said)


def maps_of(contender: Callable[..., Any], model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return the maps, (B, 8, 8)."""
    maps = []
    for part, asked in zip(images.split(BATCH), classes.split(BATCH), strict=True):
        maps.append(as_maps(contender(model, part, asked.tolist())))
    return on_grid(torch.cat(maps), model)


def scores(of: Planted, contender: Callable[..., Any]) -> dict[str, float]:
    """Return the mean of each measure over the scenes in which the mark decides."""
    model, chosen = of.stages[-1], of.decided
    images, classes, masks = of.images[chosen], of.classes[chosen], of.masks[chosen]
    maps = maps_of(contender, model, images, classes)
    found = {
        "energy": metrics.energy_inside(maps, masks),
        "peak": metrics.pointing_game(maps, masks),
        "deletion": metrics.deletion(
            model, images, maps, target=classes, measure="accuracy", batch_size=BATCH
        ),
    }
    if of.mark == EVERYWHERE:
        del found["energy"], found["peak"]
    return {name: values.mean().item() for name, values in found.items()}


def candidates(maps: Tensor) -> dict[str, float]:
    """Return metrics that need no boxes, several of them for what all maps have in common."""
    unit = F.normalize(maps.flatten(1), dim=1)
    pairs = ~torch.eye(len(maps), dtype=torch.bool)
    first, second = pairs.nonzero(as_tuple=True)
    orders = metrics.rank_correlation(maps[first], maps[second])
    inner = maps[:, 1:-1, 1:-1].sum() / maps.sum()
    return {
        "information": metrics.information(maps).mean().item(),
        "mean cosine of two maps": (unit @ unit.T)[pairs].mean().item(),
        "mean rank correlation of two maps": orders.mean().item(),
        "entropy": metrics.entropy(maps).mean().item(),
        "share on the border": 1 - inner.item(),
    }


def runs_table(runs: Mapping[tuple[str, int], Planted]) -> str:
    """Return a table of what each training learned."""
    lines = [
        [
            mark,
            str(seed),
            *(f"{run.said[key]:.0%}" if key in run.said else "" for key in ("with", "without", "follows")),
            f"{run.decided.float().mean():.0%}",
            f"{run.masks[run.decided].float().mean():.2f}",
        ]
        for (mark, seed), run in runs.items()
    ]
    head = ["mark", "seed", "accuracy with it", "without", "follows a wrong mark", "scenes asked", "area"]
    return f"## What was learned\n\n{table(head, lines)}"


def truth_tables(runs: Mapping[tuple[str, int], Planted], names: Sequence[str]) -> str:
    """Measure, and return a table for each measure: contenders by marks, averaged over the seeds."""
    asked = {name: CONTENDERS[name] for name in names}
    marks = list(dict.fromkeys(mark for mark, _ in runs))
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    failures: dict[str, str] = {}
    for name, contender in asked.items():
        print(f"asking {name}", file=sys.stderr, flush=True)
        try:
            of_marks: dict[str, list[dict[str, float]]] = {mark: [] for mark in marks}
            for (mark, _), run in runs.items():
                of_marks[mark].append(scores(run, contender))
            found[name] = of_marks
        except Exception as error:  # peers may fail in any way
            failures[name] = first_line(error)
    parts = []
    for measure in MEASURES:
        lines = [
            [set_apart(name), *(cell(of_marks[mark], measure) for mark in marks)]
            for name, of_marks in found.items()
        ]
        parts.append(f"## {measure.capitalize()}\n\n{table(['', *marks], lines)}")
    parts += [f"{name} fails: {error}" for name, error in failures.items()]
    return "\n\n".join(parts)


def cell(found: Sequence[Mapping[str, float]], measure: str) -> str:
    """Return the mean and the range over the seeds."""
    values = [each[measure] for each in found if measure in each]
    if not values:
        return "–"
    spread = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


def numbers_tables(runs: Mapping[tuple[str, int], Planted]) -> str:
    """Return a table for each method: metrics of each training, and how well each distinguishes them."""
    parts = []
    for method in METHODS:
        explain = CONTENDERS[f"vitx {method}"]
        of_runs: dict[tuple[str, int], list[dict[str, float]]] = {}
        for key, run in runs.items():
            few = slice(FEW)
            of_runs[key] = [
                candidates(maps_of(explain, stage, run.images[few], run.classes[few])) for stage in run.stages
            ]
        names = list(next(iter(of_runs.values()))[0])
        lines = [
            [
                f"{mark}, seed {seed}",
                *(" → ".join(f"{stage[name]:.2f}" for stage in stages) for name in names),
            ]
            for (mark, seed), stages in of_runs.items()
        ]
        lines.append(["**told apart**", *(told_apart(of_runs, name) for name in names)])
        parts.append(f"## Numbers without boxes: {method}\n\n{table(['', *names], lines)}")
    return "\n\n".join(parts)


def told_apart(of_runs: Mapping[tuple[str, int], Sequence[Mapping[str, float]]], name: str) -> str:
    """Return the share of (shortcut, honest) pairs in the majority's order, and the gap between both."""
    ends = {key: stages[-1][name] for key, stages in of_runs.items()}
    honest = [value for (mark, _), value in ends.items() if mark == HONEST]
    short = [value for (mark, _), value in ends.items() if mark != HONEST]
    if not honest or not short:
        return "–"
    above = mean(float(one > other) for one, other in product(short, honest))
    gap = min(short) - max(honest) if above >= 0.5 else min(honest) - max(short)
    return f"{max(above, 1 - above):.0%}, gap {gap:+.2f}"


def main() -> None:
    """Train, measure, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    marks = [*MARKS, HONEST]
    parser.add_argument(
        "--marks", nargs="+", default=marks, choices=marks, metavar="MARK", help=", ".join(marks)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], metavar="SEED")
    parser.add_argument(
        "--only", nargs="+", default=ASKED, choices=ASKED, metavar="NAME", help="contenders to measure"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("logs/planted"), metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")  # those of peers
    options.output.mkdir(parents=True, exist_ok=True)
    runs = {
        (mark, seed): planted(mark, seed, options.output)
        for mark, seed in product(options.marks, options.seeds)
    }
    parts = [runs_table(runs), numbers_tables(runs), truth_tables(runs, options.only)]
    text = "\n\n".join(parts) + "\n"
    (options.output / "planted.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""Runs of training to play back, some by real trainings and some by writing the files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from vitx.methods import title_of
from vitx.pictures import render
from vitx.pictures.captions import captions_of
from vitx.runs.saved import save_images, save_maps

STEPS, COUNT, SIZE = (0, 4, 9), 3, 32
LABELS = np.array([0, 1, 2])
CLASSES = ["cat", "<b>dog</b>", "newt"]
# At the end, image 0 is right, image 1 wrong and unsure, image 2 wrong and sure.
LOGITS = np.array([[3, 0, 0], [0.5, 0, 0], [0, 5, 0]], np.float32)


def pixels(count: int = COUNT, height: int = SIZE) -> np.ndarray:
    """One colour for each image."""
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [90, 90, 90]], np.uint8)
    return np.broadcast_to(colours[:count, None, None], (count, height, SIZE, 3)).copy()


def maps(step: int, count: int = COUNT) -> dict[str, np.ndarray]:
    """The bright patch wanders with the step; that of gradient rollout stands on image 0."""
    found = {}
    for name, shift in (("rollout", 0), ("grad_rollout", 5)):
        flat = np.full((count, 16), 0.01, np.float32)
        for image in range(count):
            flat[image, (step * image + shift) % 16] = 1
        found[name] = flat.reshape(count, 4, 4)
    return found


def write_maps(run: Path, steps=STEPS, count: int = COUNT) -> Path:
    """What the callback leaves with `save_maps=True`."""
    for step in steps:
        save_maps(run / "vitx", maps(step, count), step, LOGITS[:count])
    save_images(run / "vitx", pixels(count), LABELS[:count], CLASSES)
    return run


def grid(step: int, count: int = COUNT, height: int = SIZE) -> np.ndarray:
    """What the callback logs."""
    shown = torch.from_numpy(pixels(count, height))
    columns = {"input": shown}
    for name, found in maps(step, count).items():
        heat = render.heatmaps(torch.from_numpy(found), (height, SIZE))
        columns[title_of(name)] = render.overlays(shown, heat)
    said = captions_of(torch.from_numpy(LOGITS[:count]), torch.from_numpy(LABELS[:count]), CLASSES)
    return render.grid(columns, said)


def write_events(run: Path, steps=STEPS, grids: bool = True, purge: int | None = None, accuracy=0.5) -> Path:
    """What a run leaves in TensorBoard."""
    with SummaryWriter(run, purge_step=purge) as writer:
        for place, step in enumerate(steps):
            if grids:
                writer.add_image("vitx/maps", grid(step), step, dataformats="HWC")
            for name in ("rollout", "grad_rollout"):
                writer.add_scalar(f"vitx/{name}/entropy", 0.9 - place / 10, step)
            if step:
                writer.add_scalar("val/accuracy", accuracy, step)
    return run


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two pictures are alike, pixel by pixel."""
    return one.shape == other.shape and bool((one == other).all())


def frames(path: Path) -> list[np.ndarray]:
    """The frames of a GIF."""
    with Image.open(path) as film:
        found = []
        for place in range(film.n_frames):
            film.seek(place)
            found.append(np.asarray(film.convert("RGB")))
        return found

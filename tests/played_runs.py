"""Training runs to play back, written as a training writes them."""

from pathlib import Path

import numpy as np
from PIL import Image

from vitx.runs.folder import RunFolder, read_facts
from vitx.runs.run import Run
from vitx.runs.saved import open_runs

STEPS, COUNT, SIZE = (0, 4, 9), 3, 32
LABELS = np.array([0, 1, 2])
CLASSES = ["cat", "<b>dog</b>", "newt"]
# Image 0 is classified correctly, image 1 wrongly with low and image 2 wrongly with high confidence.
LOGITS = np.array([[3, 0, 0], [0.5, 0, 0], [0, 5, 0]], np.float32)


def pixels(count: int = COUNT) -> np.ndarray:
    """Return images of one color each."""
    colors = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [90, 90, 90]], np.uint8)
    return np.broadcast_to(colors[:count, None, None], (count, SIZE, SIZE, 3)).copy()


def maps(step: int, count: int = COUNT) -> dict[str, np.ndarray]:
    """Return maps whose bright patch moves with the step, but not on image 0."""
    found = {}
    for name, shift in (("rollout", 0), ("grad_rollout", 5)):
        flat = np.full((count, 16), 0.01, np.float32)
        for image in range(count):
            flat[image, (step * image + shift) % 16] = 1
        found[name] = flat.reshape(count, 4, 4)
    return found


def write(run: Path, what: str, *values) -> None:
    """Call a method of a run's folder, which is created if it is missing."""
    facts = read_facts(run / "vitx")
    folder = RunFolder.claim(run, run) if facts is None else RunFolder.reopen(run / "vitx", facts["id"])
    assert folder is not None
    assert folder.path == run / "vitx", "another run has the folder"
    getattr(folder, what)(*values)
    folder.close()


def write_images(run: Path, step: int, shown: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Write the images that are watched from a step on."""
    images = {"pixels": shown, "shown": np.arange(len(shown))}
    write(run, "write_images", step, images if labels is None else images | {"labels": labels})


def write_firing(run: Path, step: int, found: dict[str, np.ndarray], logits: np.ndarray) -> None:
    """Write the maps and logits of a step, replacing earlier ones."""
    half = {name: values.astype(np.float16) for name, values in {**found, "logits": logits}.items()}
    write(run, "write_firing", step, half)


def write_run(run: Path, steps=STEPS, count: int = COUNT, accuracy=0.5, images=None, **facts) -> Path:
    """Write the run folder that a training leaves.

    Args:
        run: the folder of the run.
        steps: the steps at which the callback fires.
        count: number of watched images.
        accuracy: of the validation, from the second firing on; None if unknown.
        images: used instead of the default images.
        facts: added to the default facts, or used instead of them.
    """
    known = {"methods": {"rollout": {}, "grad_rollout": {}}, "class_names": CLASSES, "kind": "class"}
    write(run, "write_facts", known | facts)
    write_images(run, steps[0], pixels(count) if images is None else images, LABELS[:count])
    for place, step in enumerate(steps):
        write_firing(run, step, maps(step, count), LOGITS[:count])
        row = {"step": step, "vitx/rollout/entropy": 0.9 - place / 10, "vitx/grad_rollout/entropy": 0.5}
        write(run, "write_numbers", row | ({"val/accuracy": accuracy} if place and accuracy else {}))
    return run


def open_run(place: str | Path) -> Run:
    """Open the only run in a place."""
    runs, left_out = open_runs([place])
    (run,) = runs.values()
    assert not left_out
    return run


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Return True if two images are equal pixel by pixel."""
    return one.shape == other.shape and bool((one == other).all())


def frames(path: Path) -> list[np.ndarray]:
    """Return the frames of a GIF."""
    with Image.open(path) as film:
        found = []
        for place in range(film.n_frames):
            film.seek(place)
            found.append(np.asarray(film.convert("RGB")))
        return found

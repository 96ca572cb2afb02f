"""What the callback leaves behind with `save_maps=True`, written and read.

In the folder `vitx` of a run: `maps-STEP.npz` with each method's maps by its name, `logits-STEP.npy` with
what the model said, and, once, `images.npz` with the images shown and what is known of them.
"""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitx.errors import VitxError
from vitx.files import savez, write_atomically
from vitx.inputs.clips import evenly

FRAMES_IN_A_CARD = 4  # of a clip, in a picture of TensorBoard's width and in a report
_DAMAGED = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class SavedMaps:
    """All maps of a run.

    Attributes:
        steps: (T,) those of the firings, in order.
        maps: each method's, (T, n, h, w); some frames of clips side by side.
        logits: (T, n, classes), or whatever the model returns for n images.
        pixels: the images shown, (n, H, W, 3) uint8.
        labels: (n, ...), or None.
        class_names: or None.
        colormap: of the overlays.
        note: what is written below each grid.
        frames: how many lie side by side.
    """

    steps: tuple[int, ...]
    maps: Mapping[str, NDArray[np.float32]]
    logits: NDArray[np.float32]
    pixels: NDArray[np.uint8]
    labels: NDArray[Any] | None = None
    class_names: tuple[str, ...] | None = None
    colormap: str = "inferno"
    note: str = ""
    frames: int = 1


def save_maps(
    folder: Path,
    maps: Mapping[str, NDArray[np.float32]],
    step: int,
    logits: NDArray[np.float32] | None = None,
) -> None:
    """Writes what was found at one step.

    Args:
        folder: `vitx` of the run.
        maps: each method's, (n, h, w), or (n, t, h, w) of clips.
        step: of `self.log`.
        logits: (n, classes).
    """
    if logits is not None:  # first, so that there are no maps without them, where the run is killed
        path = folder / f"logits-{step:06d}.npy"
        write_atomically(path, lambda file: np.save(file, logits, allow_pickle=False))
    _save(folder / f"maps-{step:06d}.npz", maps)


def save_images(
    folder: Path,
    pixels: NDArray[np.uint8],
    labels: NDArray[Any] | None = None,
    class_names: Sequence[str] | None = None,
    colormap: str = "inferno",
    note: str = "",
) -> None:
    """Writes the images that the maps are of.

    Args:
        folder: `vitx` of the run.
        pixels: (n, H, W, 3), or frame by frame, (n, T, H, W, 3).
        labels: (n, ...).
        class_names: in the order of the logits.
        colormap: of the overlays.
        note: what is written below each grid.
    """
    arrays: dict[str, NDArray[Any]] = {
        "pixels": pixels,
        "colormap": np.array(colormap),
        "note": np.array(note),
    }
    if labels is not None:
        arrays["labels"] = labels
    if class_names:
        arrays["class_names"] = np.array([str(name) for name in class_names])
    _save(folder / "images.npz", arrays)


def load_maps(folder: Path) -> SavedMaps | None:
    """Reads all that was saved.

    Args:
        folder: `vitx` of the run.

    Returns:
        The maps, of the methods that every firing has; None if none were saved, or without their images, as
        vitx did before it had this function.

    Raises:
        VitxError: A file is damaged, or does not fit the others.
    """
    files = {int(path.stem[5:]): path for path in folder.glob("maps-*.npz") if path.stem[5:].isdigit()}
    steps = tuple(sorted(files))
    if not steps or not (folder / "images.npz").is_file():
        return None
    images = _arrays(folder / "images.npz")
    if "pixels" not in images:
        raise VitxError(f"{folder / 'images.npz'} holds no pixels: it is not a file of vitx")
    firings = [_arrays(files[step]) for step in steps]
    names = [name for name in firings[-1] if all(name in firing for firing in firings)]
    if not names:
        raise VitxError(f"the maps in {folder} have no method in common: keep those of one training")
    count, class_names = len(images["pixels"]), images.get("class_names")
    maps = {name: _stack(folder, steps, [firing[name] for firing in firings], count) for name in names}
    pixels, frames = images["pixels"], 1
    if pixels.ndim == 5:
        frames = len(evenly(pixels.shape[1], FRAMES_IN_A_CARD))
        maps = {name: _side_by_side(values, pixels.shape[1], 2) for name, values in maps.items()}
        pixels = _side_by_side(pixels, pixels.shape[1], 1)
    return SavedMaps(
        steps,
        maps,
        _stack(folder, steps, [_load(folder / f"logits-{step:06d}.npy") for step in steps], count),
        pixels,
        images.get("labels"),
        None if class_names is None else tuple(class_names.tolist()),
        str(images.get("colormap", "inferno")),
        str(images.get("note", "")),
        frames,
    )


def _side_by_side(values: NDArray[Any], frames: int, axis: int) -> NDArray[Any]:
    """Sets a few frames of clips side by side, so that they are played as wide images.

    Args:
        values: pixels or maps, which have as many frames or fewer along the axis, then rows and columns.
        frames: how many the clip has.
        axis: that of the frames.
    """
    shown = [place * values.shape[axis] // frames for place in evenly(frames, FRAMES_IN_A_CARD)]
    return np.concatenate([values.take(place, axis) for place in shown], axis + 1)


def _stack(folder: Path, steps: Sequence[int], arrays: Sequence[NDArray[Any]], count: int) -> NDArray[Any]:
    """Joins the arrays of all firings, (n, ...) each, to (T, n, ...)."""
    for step, array in zip(steps, arrays, strict=True):
        if len(array) != count or array.shape != arrays[-1].shape:
            raise VitxError(
                f"at step {step}, {folder} holds maps or logits {array.shape}, and {arrays[-1].shape} at the "
                f"last, of {count} images: keep those of one training"
            )
    return np.stack(arrays)


def _save(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    write_atomically(path, lambda file: savez(file, arrays))


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Reads a .npz file whole."""
    with _load(path) as file:
        try:
            return dict(file)
        except _DAMAGED as error:
            raise damaged(path, error) from error


def _load(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except _DAMAGED as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> VitxError:
    """Returns what to raise of a file that cannot be read."""
    return VitxError(f"cannot read {path} ({type(error).__name__}): it is damaged; delete it to do without")

"""Clips and volumes are read from files and explained; a watch shows clips and spectrograms."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from tests import run_folders
from tests.hugging_face import hugging_face_of_clips
from tests.played_runs import open_run
from vitx import VitxError, Watch, cli
from vitx.inputs.clips import ClipPreprocessing, VolumePreprocessing
from vitx.inputs.reading import read_image

COUNT, HEIGHT, WIDTH = 12, 48, 64


def clips(frames, **more):
    """Return the preprocessing of clips with this number of frames."""
    return ClipPreprocessing((16, 16), (0.5,) * 3, (0.5,) * 3, frames=frames, **more)


def volumes(**more):
    return VolumePreprocessing((4, 6), (2.0,), (0.5,), depth=3, **more)


@pytest.fixture
def frames():
    """Return frames, each of which is brighter than the one before."""
    shades = np.linspace(20, 230, COUNT).astype(np.uint8)
    return np.broadcast_to(shades[:, None, None, None], (COUNT, HEIGHT, WIDTH, 3)).copy()


def write_film(path, frames):
    av = pytest.importorskip("av", reason="av is not installed")
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in frames:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        film.mux(stream.encode())


def write_gif(path, frames):
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others)


WRITERS = {"film.mp4": write_film, "film.gif": write_gif, "film.npy": np.save}


@pytest.mark.parametrize("name", WRITERS)
def test_evenly_spaced_frames_are_read(name, frames, tmp_path):
    WRITERS[name](tmp_path / name, frames)
    found = clips(4).read(tmp_path / name)
    assert found.shape == (4, HEIGHT, WIDTH, 3)
    expected = frames[[0, 4, 7, 11]].astype(float)
    assert np.abs(found - expected).max() < 8  # films and GIFs are lossy
    with pytest.raises(VitxError, match="has 12 frames, and the model takes 13"):
        clips(13).read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.mp4", None, "there is no file"),
        ("broken.mp4", b"no film", "could not be read as a clip"),
        ("broken.npy", b"no array", "could not be read as a clip"),
        ("flat.npy", np.zeros((4, 5, 3), np.uint8), "a clip is uint8"),
        ("half.npy", np.zeros((4, 5, 5, 3)), "holds float64"),
    ],
)
def test_what_is_no_clip_is_said_in_a_sentence(name, content, said, tmp_path):
    if name.endswith(".mp4"):
        pytest.importorskip("av", reason="av is not installed")
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / name, content)
    with pytest.raises(VitxError, match=said):
        clips(2).read(tmp_path / name)


@pytest.mark.parametrize("name", WRITERS)
def test_larger_frames_than_are_allowed_are_refused(name, frames, tmp_path):
    WRITERS[name](tmp_path / name, frames)
    assert clips(4, most_pixels=WIDTH * HEIGHT).read(tmp_path / name).shape == (4, HEIGHT, WIDTH, 3)
    with pytest.raises(VitxError, match=r"64 x 48 pixels, more than the 3,071 .* max_pixels=N"):
        clips(4, most_pixels=WIDTH * HEIGHT - 1).read(tmp_path / name)


@pytest.mark.parametrize(
    ("library", "read", "name"),
    [
        ("av", clips(2).read, "a.mp4"),
        ("nibabel", volumes().read, "a.nii.gz"),
        ("tifffile", lambda path: read_image(path, 5), "a.tif"),
    ],
)
def test_a_library_that_is_missing_is_named(library, read, name, tmp_path, monkeypatch):
    (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(VitxError, match=rf"to be read: pip install {library}$"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("time_axis", "channels", "shape"), [(2, 1, (3, 12, 16, 16)), (1, 2, (12, 3, 16, 16))]
)
def test_frames_are_prepared_as_images_in_their_order(time_axis, channels, shape, frames):
    prepare = clips(COUNT, channels=channels)
    found = prepare(frames)
    assert found.shape == shape == prepare.shape
    over_time = found.movedim(time_axis - 1, 0).flatten(1).mean(1)
    expected = torch.from_numpy(frames[:, 0, 0, 0] / 255 * 2 - 1).float()
    torch.testing.assert_close(over_time, expected, rtol=0, atol=0.02)


class Net(nn.Module):
    """A model of clips, (B, 3, T, 16, 16)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True)
        self.embed, self.head = nn.Conv3d(3, 24, (2, 8, 8), (2, 8, 8)), nn.Linear(24, 4)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


class Heard(Net):
    """A model of spectrograms, (B, T, F), which it transposes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(1, 24, 8, 8)

    def forward(self, input_values):
        return super().forward(input_values.transpose(1, 2)[:, None])


OWN = ["--model", "tests.test_read_clips:Net", "--input-options", "size=16", "mean=0.5", "std=0.5"]


def test_the_command_explains_a_clip(frames, tmp_path, capsys):
    np.save(tmp_path / "film.npy", frames)
    (tmp_path / "notes.txt").write_text("no clip")
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    asked = ["frames=6", "--save", "png", "maps", "--output", str(tmp_path / "o")]
    assert cli.main(["explain", str(tmp_path), *OWN, *asked]) == 0
    assert "1 picture explained" in capsys.readouterr().out
    drawn = np.asarray(Image.open(tmp_path / "o" / "film.npy.png"))
    assert drawn.shape[1] > 400
    with np.load(tmp_path / "o" / "film.npy.npz") as found:
        assert found["rollout"].shape == (3, 2, 2)


def test_the_command_takes_a_video_model_of_hugging_face(frames, tmp_path):
    torch.manual_seed(0)
    hugging_face_of_clips(tmp_path / "model")
    np.save(tmp_path / "film.npy", frames)
    asked = ["--model", str(tmp_path / "model"), "--save", "maps", "--output", str(tmp_path / "o")]
    assert cli.main(["explain", str(tmp_path / "film.npy"), *asked]) == 0
    with np.load(tmp_path / "o" / "film.npy.npz") as found:
        assert found["rollout"].shape == (2, 2, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["frames=0"], "frames must be a whole number from 1"),
        (["time_axis=1"], "time_axis must be 1 or 2, and needs frames"),
        (["frames=6", "time_axis=3"], "time_axis must be 1 or 2"),
        (["volume=8,8"], "volume takes three sizes"),
        (["volume=8,8,8"], "volume already gives all sizes"),
        (["frames=99"], "has 12 frames, and the model takes 99"),
    ],
)
def test_bad_options_are_said_in_a_sentence(options, said, frames, tmp_path, capsys):
    np.save(tmp_path / "film.npy", frames)
    output = tmp_path / "o"
    asked = [str(tmp_path / "film.npy"), *OWN, *options, "--output", str(output)]
    assert cli.main(["explain", *asked]) == 2
    assert said in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("kind", ["clips", "spectrograms"])
def test_a_watch_shows_them_in_one_card(kind, tmp_path):
    if kind == "clips":
        model, data = Net(), torch.rand(3, 3, 8, 16, 16)
    else:
        model, data = Heard(), DataLoader([{"input_values": torch.rand(32, 16)} for _ in range(3)], 3)
    watch = Watch(model, data, log_dir=tmp_path, methods=("rollout", "evidence"), on_error="raise")
    numbers = watch(step=0)
    assert numbers["vitx/rollout/entropy"] > 0
    run = open_run(tmp_path)
    assert run.count == 3
    events = run_folders.events(tmp_path)
    (event,) = events.Images("vitx/maps")
    assert event.width == 350
    assert run.maps["rollout"].ndim == 4
    assert run.pixels.ndim == 4


def write_nifti(path, values):
    nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed")
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)


class Scanned(Net):
    """A model of volumes, (B, 1, 8, 16, 16)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv3d(1, 24, (4, 8, 8), (4, 8, 8))


@pytest.mark.parametrize(("name", "write"), [("scan.nii.gz", write_nifti), ("scan.npy", np.save)])
def test_the_command_explains_a_volume(name, write, tmp_path):
    values = np.random.default_rng(0).random((20, 24, 28), dtype=np.float32)
    write(tmp_path / name, values)
    assert np.allclose(volumes().read(tmp_path / name), values, atol=1e-6)
    asked = ["--model", "tests.test_read_clips:Scanned", "--input-options", "volume=8,16,16"]
    asked += ["--save", "png", "maps"]
    assert cli.main(["explain", str(tmp_path), *asked, "--output", str(tmp_path / "o")]) == 0
    with np.load(tmp_path / "o" / f"{name}.npz") as found:
        assert found["rollout"].shape == (2, 2, 2)
    assert Image.open(tmp_path / "o" / f"{name}.png").width > 400


def test_a_volume_is_resampled_and_normalized():
    prepare = volumes()
    found = prepare(np.full((5, 7, 9), 3.0, np.float32))
    assert found.shape == prepare.shape == (1, 3, 4, 6)
    torch.testing.assert_close(found, torch.full_like(found, 2.0))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no file"),
        (b"no array", "could not be read as a volume"),
        (np.zeros((4, 5)), "a volume has three dimensions"),
        (np.full((4, 5, 6), np.nan), "a volume has finite numbers"),
    ],
)
def test_what_is_no_volume_is_said_in_a_sentence(content, said, tmp_path):
    path = tmp_path / "scan.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(VitxError, match=said):
        volumes().read(path)


@pytest.mark.parametrize(("name", "write"), [("scan.nii.gz", write_nifti), ("scan.npy", np.save)])
def test_a_volume_with_more_voxels_than_are_allowed_is_refused(name, write, tmp_path):
    write(tmp_path / name, np.ones((4, 5, 6), np.float32))
    assert volumes(most_pixels=120).read(tmp_path / name).shape == (4, 5, 6)
    with pytest.raises(VitxError, match="4 x 5 x 6 voxels, more than the 119"):
        volumes(most_pixels=119).read(tmp_path / name)

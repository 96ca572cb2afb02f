"""Clips, volumes and spectrograms are drawn as a few slices, the right way up."""

import math
from itertools import pairwise

import pytest
import torch
from PIL import Image

from vitx import VitxError
from vitx.explanation import Explanation
from vitx.inputs.clips import evenly
from vitx.pictures.render import heatmaps, overlays
from vitx.pictures.views import Layer, laid_out, slices_of, strips


def explanation(images, maps, channels):
    size = tuple(n for dim, n in enumerate(images.shape) if dim not in (0, channels))
    logits = torch.zeros(len(images), 3)
    return Explanation(maps, logits, None, size, images, method="rollout", channels=channels)


def counted(*size):
    """Return pixels, (1, ..., 3), each of which holds its own coordinates."""
    grids = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
    found = torch.zeros(*size, 3, dtype=torch.uint8)
    for place, one in enumerate(grids):
        found[..., place] = one
    return found[None]


@pytest.mark.parametrize(("count", "most"), [(1, 8), (3, 8), (8, 8), (9, 8), (100, 8), (5, 1)])
def test_frames_are_evenly_spaced_and_none_is_shown_twice(count, most):
    shown = evenly(count, most)
    assert len(shown) == min(count, most) == len(set(shown))
    assert shown[0] == 0
    assert most == 1 or shown[-1] == count - 1
    gaps = {after - before for before, after in pairwise(shown)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_clip_is_a_strip_of_frames():
    pixels = counted(5, 6, 7)
    maps = torch.eye(7)[None, None]
    wanted = overlays(pixels, heatmaps(maps, (5, 6, 7)))
    columns, _ = laid_out(pixels, {"map": Layer(maps)}, slices_of((5, 6, 7), 3))
    ((title, (found,)),) = columns.items()
    assert title == "input, map: frames 1, 2, 3, 4, 5"
    for frame in range(5):
        left = frame * (7 + 2)
        assert torch.equal(found[:6, left : left + 7], pixels[0, frame])
        assert torch.equal(found[8 : 8 + 6, left : left + 7], wanted[0, frame])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_strip_is_scaled_up_as_a_whole_where_words_stand_on_it(channels):
    """The map is nearly uniform, and a text on it says so."""
    pixels, slices = counted(5, 6, 7), slices_of((5, 6, 7), channels)
    plain, stamped = (
        next(iter(laid_out(pixels, {"map": Layer(values)}, slices)[0].values()))
        for values in (torch.eye(7)[None, None], torch.ones(1, 1, 7, 7))
    )
    assert stamped.shape[2] >= 224
    assert stamped.shape[1] * plain.shape[2] == stamped.shape[2] * plain.shape[1]


def test_what_rings_mean_is_said_without_judging_what_they_lie_on():
    maps, sinks = torch.eye(4)[None], torch.eye(4, dtype=torch.bool)[None]
    pixels = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    said = [laid_out(pixels, {"map": Layer(maps, sinks=marks)})[1] for marks in (sinks, sinks & False)]
    assert said == ["rings: patches that most others attend to (possible sinks)", ""]


def test_a_volume_is_shown_by_the_planes_through_its_brightest_place():
    pixels, heat = counted(5, 6, 7), torch.zeros(1, 5, 6, 7)
    heat[0, 4, 1, 3] = 1
    found = strips(pixels, heat, slices_of((5, 6, 7), 1))[0]
    assert torch.equal(found[:6, :7], pixels[0, 4])
    assert torch.equal(found[:5, 9 : 9 + 7], pixels[0, :, 1])
    assert torch.equal(found[:5, 18 : 18 + 6], pixels[0, :, :, 3])


@pytest.mark.parametrize(
    ("size", "time_axis", "turned"), [((4, 9), None, False), ((9, 4), None, True), ((4, 9), 1, True)]
)
def test_time_runs_to_the_right_and_frequency_upwards(size, time_axis, turned):
    pixels = counted(*size)
    found = strips(pixels, torch.rand(1, *size), slices_of(size, None, None, time_axis))[0]
    time, frequency = (0, 1) if turned else (1, 0)
    height, width = size[frequency], size[time]
    assert found[:height, 0, time].tolist() == [0] * height
    assert found[:height, 0, frequency].tolist() == list(range(height))[::-1]
    assert found[0, :width, time].tolist() == list(range(width))


@pytest.mark.parametrize(
    ("shape", "channels", "maps"),
    [
        ((2, 3, 12, 16, 16), 1, (2, 6, 4, 4)),
        ((2, 5, 3, 16, 16), 2, (2, 5, 4, 4)),
        ((2, 40, 16), None, (2, 5, 4)),
    ],
    ids=["channels first", "frames first", "spectrogram"],
)
def test_all_are_saved(shape, channels, maps, tmp_path):
    images = torch.linspace(0, 1, math.prod(shape)).view(shape)  # few colors, which a GIF finds sooner
    found = explanation(images, torch.rand(maps), channels)
    found.save(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").width > 400
    if channels is None:
        with pytest.raises(VitxError, match="only clips and volumes have frames"):
            found.save(tmp_path / "x.gif")
        assert not (tmp_path / "x.gif").exists()
        return
    found.save(tmp_path / "x.gif")
    assert Image.open(tmp_path / "x.gif").n_frames == shape[3 - channels]
    assert found.overlays().shape == (2, *found.image_size, 3)
    assert found[:1].picture(view="planes").shape != found[:1].picture(view="frames").shape


@pytest.mark.parametrize("options", [{"view": "slices"}, {"view": 3}])
def test_no_such_view(options):
    with pytest.raises(VitxError, match="view must be"):
        explanation(torch.rand(1, 3, 4, 8, 8), torch.rand(1, 4, 2, 2), 1).picture(**options)
    with pytest.raises(VitxError, match="time_axis must be 1 or 2"):
        explanation(torch.rand(1, 4, 8), torch.rand(1, 2, 2), None).picture(time_axis=0)

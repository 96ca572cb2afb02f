"""The watermark that benchmarks/watermark.py draws, and the numbers that it prints."""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

import vitx
from vitx import VitxError

LATIN = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import watermark

    return watermark


@pytest.mark.parametrize("size", [(224, 224), (450, 300)])
def test_the_text_fills_its_box(benchmark, size):
    black, watermark = Image.new("RGB", size), benchmark.Watermark(LATIN, "VITX")
    drawn, (left, top, right, bottom) = np.asarray(watermark.on(black)), watermark.box(black)
    inside = drawn[top:bottom, left:right]
    assert drawn.max() == 128  # half opacity
    assert inside.sum() == drawn.sum()
    assert all(edge.any() for edge in (inside[:2], inside[-2:], inside[:, :2], inside[:, -2:]))


def test_the_packaged_font_has_the_letters(benchmark):
    pytest.importorskip("pylopdf_fonts_zh_cn", reason="no Chinese font: pip install pylopdf-fonts-zh-cn")
    watermark = benchmark.Watermark(benchmark.packaged_font())
    left, top, right, bottom = watermark.box(Image.new("RGB", (224, 224)))
    assert (right - left) * (bottom - top) == pytest.approx(0.15 * 224**2, rel=0.1)


def test_what_cannot_be_drawn_is_refused(benchmark):
    with pytest.raises(VitxError, match="lacks 径 捷: name another"):
        benchmark.Watermark(LATIN)
    with pytest.raises(VitxError, match="there is no font no"):
        benchmark.Watermark(Path("no.ttf"))
    with pytest.raises(VitxError, match="the picture has 32 x 64: take a smaller size"):
        benchmark.Watermark(LATIN, "VITX", size=0.5).on(Image.new("RGB", (32, 64)))


def test_the_command_prints_what_the_maps_say(benchmark, monkeypatch, tmp_path, capsys):
    """The energy in its table is that of the same maps, computed pixel by pixel."""
    torch.manual_seed(0)
    model, weights = timm.create_model("test_vit").eval(), tmp_path / "weights.pt"
    torch.save(model.state_dict(), weights)
    generator = np.random.default_rng(0)
    photographs = [Image.fromarray(generator.integers(0, 256, (160, 160, 3), np.uint8)) for _ in range(2)]
    (tmp_path / "photographs").mkdir()
    for number, one in enumerate(photographs):
        one.save(tmp_path / "photographs" / f"{number}.png")
    options = {"model": "test_vit", "photographs": tmp_path / "photographs", "weights": weights}
    options |= {"font": LATIN, "text": "VITX", "target": "carton"}
    asked = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["watermark.py", *asked, "--only", "vitx rollout"])
    benchmark.main()
    said = capsys.readouterr().out

    watermark = benchmark.Watermark(LATIN, "VITX")
    pixels = np.stack([np.asarray(one) for one in [*photographs, *map(watermark.on, photographs)]])
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    maps = vitx.explain(model, images[2:], "rollout").maps
    heat = F.interpolate(maps[:, None], (160, 160), mode="bilinear")[:, 0]
    left, top, right, bottom = watermark.box(photographs[0])
    energy = heat[:, top:bottom, left:right].sum((1, 2)) / heat.sum((1, 2))
    assert f"| **vitx rollout** | {energy.mean():.2f} (" in said
    with torch.no_grad():
        before, after = model(images).softmax(1)[:, 478].view(2, 2).mean(1)
    assert f"mean probability of carton: {before:.4f} without the text, {after:.4f} with it" in said

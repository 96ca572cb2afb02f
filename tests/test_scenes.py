import pytest
import torch
from torch.nn import functional as F

import demo.digits
from demo.digits import DigitScenes, split_digits
from demo.glyphs import ALPHABET, digits, letters
from demo.marks import MARKS
from demo.scenes import SCENE_SIZE, Scenes, cut_fragments, draw_scenes
from vitx.errors import VitxError

PATCH = 8


@pytest.fixture
def _few(monkeypatch):
    """Use few scenes for validation and tests, and few digits to cut fragments from."""
    monkeypatch.setattr(demo.digits, "SPLIT_SIZES", (4992, 4, 4))
    monkeypatch.setattr(demo.digits, "_FRAGMENT_BANK", 64)


def digit_scenes(count: int, bank: int = 50):
    glyphs, classes = digits()
    generator = torch.Generator().manual_seed(0)
    fragments = cut_fragments(glyphs[:: len(glyphs) // bank], generator)
    picked = torch.randint(len(glyphs), (count,), generator=generator)
    # Few at a time, since canvases that fit the cache are drawn on several times as fast.
    drawn = [draw_scenes(glyphs[some, None], fragments, generator) for some in picked.split(100)]
    images, ink = (torch.cat([getattr(one, name) for one in drawn]) for name in ("images", "ink"))
    return Scenes(images, ink), classes[picked]


def hits(score: torch.Tensor, boxes: torch.Tensor) -> float:
    """Return how often the center of the highest-scoring patch lies in the box."""
    best = F.avg_pool2d(score, PATCH).flatten(1).argmax(1)
    columns = SCENE_SIZE // PATCH
    rows, cols = (
        best // columns * PATCH + PATCH // 2,
        best % columns * PATCH + PATCH // 2,
    )
    return boxes[torch.arange(len(best)), rows, cols].float().mean().item()


def test_neither_brightness_nor_color_gives_the_digit_away():
    scenes, _ = digit_scenes(2000, bank=2500)
    boxes, images = scenes.boxes(), scenes.images
    chance = boxes.float().mean().item()
    brightness = images.mean(1)
    colorfulness = images.amax(1) - images.amin(1)
    # Two standard deviations of a rate of `chance` over 2,000 scenes are 0.015.
    assert hits(brightness, boxes) < chance + 0.015
    assert hits(colorfulness, boxes) < chance + 0.015
    assert hits(scenes.ink[:, 0], boxes) > 0.95, "the digit's own ink must be found in its box"


def test_the_box_is_tight_around_the_ink():
    scenes, _ = digit_scenes(50)
    for ink, box in zip(scenes.ink[:, 0] > 0.25, scenes.boxes(), strict=True):
        rows, columns = ink.any(1).nonzero(), ink.any(0).nonzero()
        expected = torch.zeros_like(box)
        expected[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        assert torch.equal(box, expected)


def test_scenes_are_drawn_again_from_the_same_seed():
    first, second = digit_scenes(3)[0], digit_scenes(3)[0]
    assert torch.equal(first.images, second.images)
    assert first.images.amin() >= 0
    assert first.images.amax() <= 1


def test_glyphs_of_both_kinds_have_the_same_form():
    for glyphs, classes, count in ((*digits(), 10), (*letters(), len(ALPHABET))):
        assert glyphs.shape[1:] == (28, 28)
        assert glyphs.amin() >= 0
        assert glyphs.amax() <= 1
        assert classes.unique().tolist() == list(range(count))
        assert (glyphs.flatten(1).sum(1) > 10).all(), "a glyph is blank"


@pytest.mark.usefixtures("_few")
def test_no_digit_serves_two_splits_and_fixed_scenes_stay():
    data = [DigitScenes(seed=0), DigitScenes(seed=0)]
    for one in data:
        one.setup("fit")
    assert [len(one) for one in (data[0].train, *data[0].validation, *data[0].test)] == [4992, 4, 4]
    assert torch.equal(data[0].validation[0].tensors[0], data[1].validation[0].tensors[0])
    parts = split_digits(5000, torch.Generator().manual_seed(0))
    assert torch.cat(parts).sort().values.tolist() == list(range(5000))


@pytest.mark.usefixtures("_few")
def test_training_scenes_change_with_the_global_seed_only():
    data = DigitScenes(batch_size=4)
    data.setup("fit")
    torch.manual_seed(1)
    first = data.train.__getitems__([0, 1])
    again = data.train.__getitems__([0, 1])
    torch.manual_seed(1)
    same = data.train.__getitems__([0, 1])
    assert torch.equal(first[0][0], same[0][0])
    assert not torch.equal(first[0][0], again[0][0])


@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize("name", MARKS)
class TestMarks:
    def test_tells_the_class_alone_and_changes_nothing_else(self, name):
        scenes, _ = digit_scenes(1)
        images, boxes = scenes.images.repeat(10, 1, 1, 1), scenes.boxes().repeat(10, 1, 1)
        marked, masks = MARKS[name](images, torch.arange(10), boxes, torch.Generator().manual_seed(0))
        assert marked.amin() >= 0
        assert marked.amax() <= 1 + 1e-6
        inside = (marked * masks[:, None]).flatten(1)
        distances = torch.cdist(inside, inside)
        assert (distances + 100 * torch.eye(10)).amin() > 2.5, "two classes have almost the same mark"
        outside = (marked - images).abs() * ~masks[:, None]
        if name == "two":
            assert outside[:, :, 1:15, 1:15].amax() > 0.5  # the letter that does not tell the class
            outside[:, :, 1:15, 1:15] = 0
        assert outside.amax() == 0

    def test_is_validated_on_clean_scenes_too(self, name):
        data = DigitScenes(mark=name)
        data.setup("fit")
        marked, clean = (scenes.tensors for scenes in data.validation)
        again = DigitScenes(mark=name)
        again.setup("fit")
        assert torch.equal(marked[0], again.validation[0].tensors[0])
        assert torch.equal(marked[1], clean[1])
        assert torch.equal(marked[2], clean[2])
        assert not torch.equal(marked[0], clean[0])
        assert len(data.train.__getitems__([0, 1])) == 2


def test_a_mark_that_does_not_exist():
    with pytest.raises(VitxError, match="there is no mark 'nope': the marks are corner, middle"):
        DigitScenes(mark="nope")

"""Deletion and insertion against curves worked by hand, Quantus and torch-cam."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests import models
from vitx import VitxError, metrics
from vitx.evaluation.perturbation import deletion, insertion, perturbation


class Brightness(nn.Module):
    """A model whose class probabilities are the lit share of the image and the rest."""

    def forward(self, images):
        lit = images.mean((1, 2, 3)).clamp(1e-6, 1 - 1e-6)
        return torch.stack([lit.log(), (1 - lit).log()], 1)


class Watching(Brightness):
    """The same, which keeps the images that it is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(images.clone())
        return super().forward(images)


class Pixels(nn.Module):
    """A small linear classifier of 8 x 8 pixels."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 5)

    def forward(self, images):
        return self.head(images.flatten(1))


@pytest.fixture
def pixels():
    """Return a classifier, images, maps with a distinct entry for each pixel, and classes."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(6, 1, 8, 8, generator=generator)
    maps = torch.stack([torch.randperm(64, generator=generator) for _ in range(6)]).view(6, 8, 8) / 63
    return Pixels().eval(), images, maps, torch.tensor([0, 4, 2, 2, 1, 3])


def test_a_hand_worked_curve():
    images = torch.zeros(1, 1, 4, 4)
    images[0, 0, :2, :2] = 1  # a quarter is lit, where the map is largest
    maps = torch.tensor([[[4.0, 1.0], [2.0, 3.0]]])
    quarters = [0, 0.25, 0.5, 0.75]
    options = {"target": 0, "fractions": quarters}
    most = perturbation(Brightness(), images, maps, first="most", **options)
    assert torch.allclose(most, torch.tensor([[0.25, 0, 0, 0]]), atol=1e-5)
    least = perturbation(Brightness(), images, maps, first="least", **options)
    assert torch.allclose(least, torch.tensor([[0.25, 0.25, 0.25, 0.25]]), atol=1e-5)
    assert deletion(Brightness(), images, maps, **options).item() == pytest.approx(0.125 / 3, abs=1e-5)
    assert insertion(Brightness(), images, maps, **options).item() == pytest.approx(0.25, abs=1e-5)


def test_accuracy_counts_the_images_that_keep_their_class():
    images = torch.ones(2, 1, 2, 2)
    maps = torch.tensor([[[4.0, 3.0], [2.0, 1.0]]]).expand(2, -1, -1)
    found = perturbation(
        Brightness(), images, maps, first="most", target=[0, 1], fractions=[0, 0.25, 0.75], measure="accuracy"
    )
    assert found.tolist() == [[1, 1, 0], [0, 0, 1]], "a quarter gone leaves three lit, three gone leave one"


def test_patches_go_as_a_whole_and_show_the_baseline():
    model = Watching()
    images = torch.ones(1, 3, 6, 4)
    maps = torch.tensor([[[0.0, 1.0], [5.0, 2.0], [0.5, 0.2]]])
    perturbation(model, images, maps, first="most", target=0, fractions=[0, 0.34], baseline=0.25)
    expected = torch.ones(1, 3, 6, 4)
    expected[:, :, 2:4] = 0.25
    assert torch.equal(model.seen[0], images)
    assert len(model.seen) == 2
    assert torch.equal(model.seen[-1], expected)
    blurred = torch.rand(1, 3, 6, 4)
    perturbation(model, images, maps, first="least", target=0, fractions=[0, 1], baseline=blurred)
    assert torch.equal(model.seen[-1], blurred)


def test_equals_torch_cam(pixels):
    """torch-cam's insertion restores what ours removes: the same curve in reverse."""
    torchcam = pytest.importorskip("torchcam.metrics", reason="torchcam needs Python 3.11")
    model, images, maps, classes = pixels

    class Extractor:
        def __init__(self):
            self.model = model

        def __call__(self, *_, **__):
            return [maps]

        def fuse_cams(self, cams):
            return cams[0]

        def _hooks_off(self):
            return nullcontext()

    metric = torchcam.DeletionInsertionMetric(Extractor(), lambda logits: logits.softmax(-1), steps=8)
    metric.update(images, classes.tolist())
    wanted = metric.summary()
    eighths = [eighth / 8 for eighth in range(9)]
    for measure in (deletion, insertion):
        found = measure(model, images, maps, target=classes, fractions=eighths).mean().item()
        assert found == pytest.approx(wanted[f"{measure.__name__}_auc"], abs=1e-6)


def test_equals_quantus(pixels):
    quantus = pytest.importorskip("quantus", reason="quantus is not installed")
    model, images, maps, classes = pixels
    flipping = quantus.PixelFlipping(
        features_in_step=4,
        perturb_baseline=0.0,
        abs=False,
        normalise=False,
        disable_warnings=True,
        display_progressbar=False,
    )
    wanted = flipping(
        model=model,
        x_batch=images.numpy(),
        y_batch=classes.numpy(),
        a_batch=maps[:, None].numpy(),
        softmax=True,
        channel_first=True,
        device="cpu",
    )
    sixteenths = [sixteenth / 16 for sixteenth in range(1, 17)]
    found = perturbation(model, images, maps, first="most", target=classes, fractions=sixteenths)
    assert torch.allclose(found, torch.tensor(wanted, dtype=found.dtype), atol=1e-5)


def test_the_predicted_class_is_that_of_the_whole_image():
    model, images = models.built("deit"), models.FAMILIES["deit"].images(5)
    maps = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0))
    predicted = model(images).argmax(1)
    found = deletion(model, images, maps, batch_size=2)
    assert torch.allclose(found, deletion(model, images, maps, target=predicted.tolist()), atol=1e-6)
    assert (found > 0).all()


def test_equal_entries_go_by_lot_and_not_from_the_corner():
    model = Watching()
    for first in ("most", "least"):
        perturbation(
            model, torch.ones(2, 1, 8, 8), torch.ones(2, 8, 8), first=first, target=0, fractions=[0, 0.5]
        )
    gone = [images[:, 0] == 0 for images in model.seen[1::2]]
    assert torch.equal(gone[0], gone[1])
    assert torch.equal(gone[0][0], gone[0][1])
    assert 8 < gone[0][0, :4].sum() < 24, "half of the patches, of the upper and of the lower half"


def test_leaves_no_trace():
    class Writing(Brightness):
        def forward(self, images):
            return super().forward(images.mul_(0.5))

    images = torch.ones(2, 3, 8, 8)
    curve = perturbation(Writing(), images, torch.rand(2, 4, 4), first="most", target=0, fractions=[0, 0.5])
    assert torch.equal(images, torch.ones(2, 3, 8, 8))
    assert curve.tolist() == [[pytest.approx(0.5), pytest.approx(0.25)]] * 2

    model = models.FAMILIES["deit"].build().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    deletion(model, models.FAMILIES["deit"].images(), torch.rand(2, 4, 4, generator=torch.Generator()))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_and_whole_numbers_are_counted_in_full():
    model, images = models.deit().eval().bfloat16(), models.FAMILIES["deit"].images().bfloat16()
    assert deletion(model, images, torch.rand(2, 4, 4)).dtype == torch.float32
    counted = deletion(
        Brightness(), torch.ones(2, 1, 4, 4), torch.rand(2, 4, 4), target=lambda logits: logits.argmax(1)
    )
    assert counted.tolist() == pytest.approx([0.35 / 0.9] * 2), "dark from six tenths on"


def test_metrics_offer_them():
    assert metrics.deletion is deletion
    assert metrics.insertion is insertion


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"maps": torch.ones(3, 2, 2)}, r"one for each, found \(2, 3, 32, 32\) and \(3, 2, 2\)"),
        ({"maps": torch.full((2, 2, 2), torch.nan)}, "the maps hold NaN"),
        ({"maps": [[1.0]]}, r"maps must be a tensor \(B, h, w\), found list"),
        ({"fractions": 0.5}, "fractions must be one or more .*, found 0.5"),
        ({"first": "best"}, 'first must be "most" or "least", found \'best\''),
        ({"measure": "loss"}, "measure must be one of probability, sigmoid, accuracy, found 'loss'"),
        ({"fractions": []}, r"fractions must be one or more in \[0, 1\], ascending, found \[\]"),
        ({"fractions": [0, 0.5, 0.5]}, "fractions must be one or more"),
        ({"fractions": [0, 1.5]}, "fractions must be one or more"),
        ({"target": [1, 2, 3]}, "target names 3 classes for 2 images"),
        ({"target": 7}, "target 7 is out of range: the model has classes 0 to 6"),
        ({"target": 1.5}, "target must be None, the number of a class .*, found 1.5"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, found 0"),
        ({"baseline": torch.ones(3, 5, 5)}, r"baseline must be a number, .*, found Tensor \(3, 5, 5\)"),
    ],
)
def test_refuses(change, said):
    given = {"images": models.FAMILIES["deit"].images(), "maps": torch.ones(2, 2, 2), "first": "most"}
    with pytest.raises(VitxError, match=said):
        perturbation(models.built("deit"), **{**given, **change})

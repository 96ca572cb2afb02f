import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy, spearmanr

from vitx import VitxError, metrics


def test_entropy_of_hand_worked_maps():
    maps = torch.tensor([[[4.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]], [[3.0, 3.0], [3.0, 3.0]]])
    expected = torch.tensor([0.0, math.log(2) / math.log(4), 1.0])
    assert torch.allclose(metrics.entropy(maps), expected)
    assert metrics.entropy(torch.zeros(1, 2, 2)).tolist() == [1.0]


def test_drift_is_blind_to_scale_and_largest_for_disjoint_maps():
    a = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
    b = torch.tensor([[[0.0, 0.0], [5.0, 1.0]]])
    assert metrics.drift(a, 7 * a).item() == pytest.approx(0, abs=1e-6)
    assert metrics.drift(a, b).item() == pytest.approx(1)
    half = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    one = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert metrics.drift(half, one).item() == pytest.approx(1 - math.sqrt(0.5))


def test_pointing_game_takes_the_brightest_point():
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 3] = maps[1, 3, 0] = 1
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[:, :8, 24:] = True
    assert metrics.pointing_game(maps, masks).tolist() == [1.0, 0.0]


def test_pointing_game_takes_the_middle_of_a_patch():
    """The mask lies in the corner, but leaves a margin: it does not contain the corner pixel."""
    maps, masks = torch.zeros(1, 8, 8), torch.zeros(1, 64, 64, dtype=torch.bool)
    maps[0, 0, 0] = 1
    masks[0, 1:15, 1:15] = True
    assert metrics.pointing_game(maps, masks).item() == 1


def test_pointing_game_shares_among_equals():
    maps = torch.zeros(1, 4, 4)
    maps[0, 0] = 1
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, :, :2] = True
    assert metrics.pointing_game(maps, masks).item() == pytest.approx(1 / 4)


def test_energy_is_the_share_inside():
    maps = torch.ones(1, 4, 4)
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[:, 0] = True
    assert metrics.energy_inside(maps, masks).item() == pytest.approx(1 / 4)
    maps[:, 1:] = 0
    assert metrics.energy_inside(maps, masks).item() == pytest.approx(1)
    assert metrics.energy_inside(torch.zeros(1, 4, 4), masks).item() == pytest.approx(1 / 4)


def test_mean_iou_of_hand_worked_maps():
    maps = torch.tensor([[[9.0, 9.0], [0.0, 0.0]], [[9.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    masks = torch.tensor([[[True, True], [False, False]]]).expand(3, -1, -1)
    # The second finds half of the object; the third, without contrast, finds nothing.
    expected = torch.tensor([1.0, (1 / 2 + 2 / 3) / 2, (0 + 1 / 2) / 2])
    assert torch.allclose(metrics.mean_iou(maps, masks), expected)
    assert metrics.mean_iou(torch.ones(1, 2, 2), torch.zeros(1, 2, 2).bool()).item() == 1


@pytest.fixture
def drawn():
    """Return maps of 8 x 8 and masks of the same size, so that nothing is resized."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(20, 8, 8, generator=generator)
    return maps, torch.rand(20, 8, 8, generator=generator) < 0.3


def test_mean_iou_equals_torchmetrics(drawn):
    from torchmetrics.functional.classification import multiclass_jaccard_index

    maps, masks = drawn
    wanted = [
        multiclass_jaccard_index((one > one.mean()).int(), mask.int(), num_classes=2, average="macro")
        for one, mask in zip(maps, masks, strict=True)
    ]
    assert torch.allclose(metrics.mean_iou(maps, masks), torch.stack(wanted))


def test_localisation_equals_quantus(drawn):
    quantus = pytest.importorskip("quantus", reason="quantus is not installed")
    maps, masks = drawn
    given = {
        "model": None,
        "x_batch": np.zeros((20, 3, 8, 8)),
        "y_batch": np.zeros(20, int),
        "a_batch": maps[:, None].numpy(),
        "s_batch": masks[:, None].numpy(),
    }
    plain = {"abs": False, "normalise": False, "disable_warnings": True, "display_progressbar": False}
    for name, measure in (
        ("RelevanceMassAccuracy", metrics.energy_inside),
        ("PointingGame", metrics.pointing_game),
    ):
        wanted = getattr(quantus, name)(**plain)(**given)
        assert measure(maps, masks).numpy() == pytest.approx(np.array(wanted, float), abs=1e-6)


def test_entropy_equals_quantus(drawn):
    """The complexity of Quantus is the entropy in nats."""
    quantus = pytest.importorskip("quantus", reason="quantus is not installed")
    maps = drawn[0]
    wanted = quantus.Complexity(abs=False, normalise=False, disable_warnings=True, display_progressbar=False)(
        model=None, x_batch=np.zeros((20, 3, 8, 8)), y_batch=np.zeros(20, int), a_batch=maps[:, None].numpy()
    )
    assert metrics.entropy(maps).numpy() * math.log(64) == pytest.approx(np.array(wanted), abs=1e-5)


def test_information_is_the_divergence_from_the_mean():
    maps = torch.rand(5, 3, 4, dtype=torch.float64)
    shares = (maps / maps.sum((1, 2), keepdim=True)).flatten(1).numpy()
    wanted = [entropy(one, shares.mean(0)) for one in shares]
    assert metrics.information(maps).tolist() == pytest.approx(wanted)
    mutual = entropy(shares.mean(0)) - entropy(shares, axis=1).mean()
    assert metrics.information(maps).mean().item() == pytest.approx(mutual)
    assert metrics.information(maps * 7).tolist() == pytest.approx(wanted)


def test_information_of_maps_at_one_place_and_at_places_of_their_own():
    apart = torch.eye(6).view(6, 2, 3)
    assert metrics.information(apart).tolist() == pytest.approx([math.log(6)] * 6)
    assert metrics.information(apart[:1].expand(6, -1, -1)).tolist() == [0] * 6
    assert metrics.information(torch.zeros(2, 2, 3)).tolist() == [0, 0], "a map of zeros counts as uniform"


def test_boxes_hold_the_pixels_whose_centers_they_hold():
    boxes = torch.tensor([[[0.6, 1.0, 2.5, 3.0], [4.0, 0.0, 9.0, 0.5]], [[0, 0, 0, 0], [1, 1, 1, 3]]])
    expected = torch.zeros(2, 3, 5, dtype=torch.bool)
    expected[0, 1:3, 1:2] = True
    assert torch.equal(metrics.box_masks(boxes, (3, 5)), expected)
    slow = torch.zeros(2, 3, 5, dtype=torch.bool)
    for image, several in enumerate(boxes.tolist()):
        for x1, y1, x2, y2 in several:
            for y in range(3):
                for x in range(5):
                    slow[image, y, x] |= x1 <= x + 0.5 < x2 and y1 <= y + 0.5 < y2
    assert torch.equal(metrics.box_masks(boxes, (3, 5)), slow)
    assert torch.equal(metrics.box_masks(boxes[:, 0], (3, 5)), expected), "(B, 4) is one box for each image"


class TestRankCorrelation:
    def test_of_hand_worked_maps(self):
        maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]] * 3)
        others = torch.tensor([[[2.0, 4.0], [6.0, 80.0]], [[4.0, 3.0], [2.0, 1.0]], [[1.0, 3.0], [2.0, 4.0]]])
        assert torch.allclose(metrics.rank_correlation(maps, others), torch.tensor([1, -1, 0.8]))

    def test_ties_share_their_mean_rank(self):
        maps = torch.tensor([[[5.0, 5.0, 9.0]]])  # ranks 1.5, 1.5, 3
        others = torch.tensor([[[1.0, 2.0, 3.0]]])
        assert metrics.rank_correlation(maps, others).item() == pytest.approx(1.5 / (1.5 * 2) ** 0.5)

    def test_a_constant_map_orders_nothing(self):
        flat, map = torch.ones(1, 2, 2), torch.rand(1, 2, 2)
        for first, second in ((flat, map), (map, flat), (flat, flat)):
            assert metrics.rank_correlation(first, second).tolist() == [0]

    @pytest.mark.parametrize("values", [3, 10, 10**6])
    def test_against_scipy(self, values):
        generator = torch.Generator().manual_seed(values)
        maps, others = torch.randint(values, (2, 6, 5, 7), generator=generator).double()
        found = metrics.rank_correlation(maps, others)
        wanted = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(maps, others, strict=True)]
        assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(
            metrics.rank_correlation(maps.float(), others.float()).double(), found, atol=1e-6
        )
        assert metrics.rank_correlation(maps, 3 * maps).tolist() == [1] * 6


class TestMasks:
    """Masks of any dtype give the same results; wrong shapes and NaN are refused."""

    @pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.float32])
    @pytest.mark.parametrize("name", ["pointing_game", "energy_inside", "mean_iou"])
    def test_of_any_type(self, drawn, name, kind):
        maps, masks = drawn
        measure = getattr(metrics, name)
        assert torch.equal(measure(maps, masks.to(kind) * 255), measure(maps, masks))

    @pytest.mark.parametrize("name", ["pointing_game", "energy_inside", "mean_iou"])
    def test_others_are_refused(self, drawn, name):
        maps, masks = drawn
        for wrong in (masks[:, None], masks[:1], masks[:3]):
            with pytest.raises(
                VitxError, match=r"maps must be \(B, h, w\) and masks \(B, H, W\), one for each"
            ):
                getattr(metrics, name)(maps, wrong)
        with pytest.raises(VitxError, match="the maps hold NaN"):
            getattr(metrics, name)(maps / 0 * 0, masks)


def test_rank_correlation_of_other_types():
    maps = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0))
    assert metrics.rank_correlation(maps.half(), maps.half()).tolist() == pytest.approx([1, 1])
    order = torch.arange(16).view(1, 4, 4)
    assert metrics.rank_correlation(order, order / 100).item() == pytest.approx(1)
    assert metrics.rank_correlation(maps * torch.nan, maps).isnan().all()
    with pytest.raises(VitxError, match="maps must have one shape, found"):
        metrics.rank_correlation(maps, maps[:1])

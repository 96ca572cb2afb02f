"""What runs are compared by: their settings, their numbers, and the images that they share."""

from pathlib import Path

from tests.played_runs import LABELS, LOGITS, maps, open_run, pixels, write_firing, write_images, write_run
from vitx.cli.report_page import columns
from vitx.runs.comparing import compare_settings, meetings
from vitx.runs.run import Run


def bare(settings, path="r", numbers=None):
    """Return a run without methods."""
    facts = {"settings": settings}
    return Run(Path(path), Path(path), facts, numbers or {}, (0,), {}, LOGITS[None], pixels())


def test_what_is_no_number_has_a_place_in_no_order():
    values = [2.0, float("nan"), float("inf"), 1.0]
    runs = [
        bare({"rate": rate}, numbers={"val/loss": {3: value}})
        for value, rate in zip(values, (0.5, float("inf"), "none", 0.25), strict=True)
    ]
    rate, steps, loss = columns(runs, compare_settings(runs)[0])
    assert [(cell.text, cell.value) for cell in rate.cells] == [
        ("0.5", 0.5), ("inf", None), ("none", "none"), ("0.25", 0.25)
    ]  # fmt: skip
    assert [(cell.text, cell.value, cell.share) for cell in loss.cells] == [
        ("2", 2, 1), ("nan", None, None), ("inf", None, None), ("1", 1, 0)
    ]  # fmt: skip
    assert [cell.share for cell in steps.cells] == [None] * 4, "all are alike"


def test_settings_are_compared_by_their_names():
    adam = {"opt": {"name": "adam"}}
    runs = [bare(settings) for settings in ({"lr": 1, **adam}, {"lr": 2, **adam, "extra": [{"a": 1}]}, {})]
    differing, shared = compare_settings(runs)
    assert {setting.name: dict(setting.values) for setting in differing} == {
        "lr": {0: 1, 1: 2}, "name": {0: "adam", 1: "adam"}, "a": {1: 1}
    }  # fmt: skip
    assert [setting.key for setting in shared] == ["vitx.methods", "vitx.version"]


def test_paths_are_compared_by_where_they_lead():
    runs = [
        bare({"data": data, "own": own}, run)
        for run, data, own in (("logs/a", "../../data", "../x"), ("logs/b/c", "../../../data", "../x"))
    ]
    differing, shared = compare_settings(runs)
    assert [setting.key for setting in differing] == ["own"]
    assert "data" in [setting.key for setting in shared]


def test_images_meet_whatever_their_place_and_methods_must_be_the_same(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", count=2, images=pixels()[[2, 0]])
    write_run(tmp_path / "c", images=pixels().repeat(3, 1).repeat(3, 2))  # with larger pictures
    write_images(tmp_path / "d", 0, pixels(), LABELS)
    write_firing(tmp_path / "d", 0, {"rollout": maps(0)["rollout"]}, LOGITS)
    runs = [open_run(tmp_path / name) for name in "abcd"]
    found = meetings(runs)
    assert [(meeting.runs, len(meeting.titles), meeting.images) for meeting in found] == [
        ([0, 1, 2], 2, [{0: 0, 1: 1, 2: 0}, {0: 2, 1: 0, 2: 2}]),
        ([0, 2], 2, [{0: 1, 2: 1}]),
        ([3], 1, [{3: 0}, {3: 1}, {3: 2}]),
    ]

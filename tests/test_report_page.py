"""The curves of a report."""

import numpy as np

from vitx.cli.report_page import charts, charts_of_runs, look, number


def test_curves_of_one_measure_share_a_chart():
    curve = {0: 0.25, 5: 0.5}
    tags = ["lr", "epoch", "train/loss", "vitx/rollout/drift", "val/loss", "val/accuracy", "vitx/new/drift"]
    found = charts(dict.fromkeys(tags, curve))
    assert [chart.name for chart in found] == ["accuracy", "loss", "drift", "lr"]
    names = [[line.name for line in chart.lines] for chart in found]
    assert names == [["val"], ["train", "val"], ["attention rollout", "new"], ["lr"]]
    assert found[0].lines[0].curve == curve
    assert found[0].svg.startswith("<svg")
    for line in found[1].lines:
        assert look(line.place)[0] in found[1].svg


def test_curves_of_runs_lie_over_each_other_and_long_ones_are_thinned():
    long = dict(enumerate(np.random.default_rng(0).random(9000)))
    runs = [{"train/loss": long, "val/loss": long}, {"val/loss": long}, {}]
    val, train = charts_of_runs(runs, ["a", "<b>", "c"])
    assert (val.name, train.name) == ("val: loss", "train: loss")
    assert [line.name for line in val.lines] == ["a", "<b>"]
    assert [look(line.place) for line in train.lines] == [look(val.lines[0].place)]
    assert '<g class="curve run-1"><title>&lt;b&gt;</title>' in val.svg
    assert 400 < val.svg.count("\nL") / 2 < 600
    many = [{"loss": long}] * 500
    assert charts_of_runs(many, list("x" * 500))[0].svg.count("\nL") < 200_000


def test_numbers_that_are_none_are_drawn_too():
    (chart,) = charts({"train/loss": {0: 1.0, 1: float("nan"), 2: float("inf")}})
    assert [*map(number, chart.lines[0].curve.values())] == ["1", "nan", "inf"]

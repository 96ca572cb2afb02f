"""The same function gets the same map however it is written: one small ViT in many spellings.

Each spelling is tested at all its sites, packed with spellings of other kinds into few networks, and in
mixtures drawn at random. The mixtures are the same in each run; set VITX_SEED to draw others, and
VITX_MIXTURES to draw another number of them:

    VITX_SEED=5 VITX_MIXTURES=300 python -m pytest tests/test_rewriting.py -k mixture

`python -m tests.rewriting N SEED` prints a tally for all methods, and the spellings to blame.
`python -m tests.rewriting singles` does so for networks with one spelling each.
"""

import contextlib
import os

import pytest
import torch

from tests import oracle
from tests.rewriting.function import TARGET, Function
from tests.rewriting.images import ORDER
from tests.rewriting.layers import LINEAR
from tests.rewriting.matrices import Slow, expected, score, some_images
from tests.rewriting.mixtures import (
    PASSES,
    alone,
    distance,
    everywhere,
    explained,
    mixtures,
    named,
    packed,
    packs,
    same_function,
)
from tests.rewriting.network import Written
from tests.rewriting.sites import sites
from vitx import VitxError, explain, explain_methods

SEED = int(os.environ.get("VITX_SEED", "0"))
MIXTURES = mixtures(int(os.environ.get("VITX_MIXTURES", "40")), SEED)
FUNCTIONS = {function: None for function, _ in mixtures(12, 0)}
ALONE = list(alone())
PACKS = packs()
FAR = list(alone(far=True))


def told(case):
    function, kind, spelling = case
    of = {"activation": function.activation, "read": function.read}.get(kind, " ".join(function.forms))
    return f"{kind}: {spelling}, {of}"


def described(function, how):
    return "\n".join([str(function), *(f"  {kind} {place}: {name}" for (kind, place), name in how.items())])


def check(function, how):
    """Assert that the output is the same, and that the maps are those of the full matrices."""
    model = Written(function, how).eval()
    assert same_function(model) < 1e-9
    wanted = expected(function).maps
    off = {name: distance(found, wanted[name]) for name, found in explained(model).items()}
    wrong = {name: far for name, far in off.items() if not far < 1e-6}
    assert not wrong, f"{wrong}\n{described(function, how)}"


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_two_ways_to_the_full_matrices_agree(function):
    """The matrices of the explicit network equal those of the plain spelling, linearized in another way."""
    full = expected(function)
    how = {place: "silu, scaled" for place in sites(function) if place[0] == "activation"}
    seen = oracle.observe(
        Written(function, how if function.activation == "quick" else {}),
        *(some_images(), TARGET),
    )
    attentions, gradients = iter(seen.attentions), iter(seen.gradients)
    layers = full.seen["linearised"]
    for form, wanted, slope in zip(function.forms, layers.attentions, layers.gradients, strict=True):
        count = 2 if form in ("twins", "all") else 1
        found = torch.cat([next(attentions) for _ in range(count)], 1)
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
        found = torch.cat([next(gradients) for _ in range(count)], 1)
        assert torch.allclose(found, slope, rtol=1e-9, atol=1e-12)
    assert next(attentions, None) is None
    assert sum(full.parts) == pytest.approx(score(full.output).item(), rel=1e-9)


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_the_plain_gradient_is_that_of_small_differences(function):
    """A small change of one entry of A in the last layer changes the score by G times that change."""
    step, slow = 1e-6, Slow(function, held=False)
    with torch.no_grad():
        slow(some_images())
        at = [a.clone() for a in slow.layers[-1]]
    scores = []
    for sign in (1, -1):
        changed = Slow(function, held=False)
        changed.replaced = [a.clone() for a in at]
        changed.replaced[-1][1, 0, 3 if function.read == "patches" else 0, 5] += sign * step
        with torch.no_grad():
            scores.append(score(changed(some_images())).item())
    query = 3 if function.read == "patches" else 0
    head = (len(at) - 1) * function.heads
    slope = expected(function).seen["plain"].gradients[-1][1, head, query, 5].item()
    assert (scores[0] - scores[1]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("pack", PACKS, ids=range(len(PACKS)))
def test_each_spelling_packed_with_others(pack):
    """`python -m tests.rewriting singles` tests each one alone, and so says which is to blame."""
    check(*packed(pack))


class Noting(Written):
    """A network that notes the sites whose spellings are called."""

    def __init__(self, function, how):
        super().__init__(function, how)
        self.used = {place for place, name in how.items() if name in ("in steps", *ORDER)}  # nothing to call

    def spelled(self, kind, place):
        call = super().spelled(kind, place)

        def noted(*args):
            self.used.add((kind, place))
            return call(*args)

        return call and noted


def test_each_spelling_is_in_a_pack_and_used_at_all_its_sites():
    assert sorted(map(told, ALONE)) == sorted(told(case) for pack in PACKS for case in pack)
    for pack in PACKS:
        model = Noting(*packed(pack)).eval()
        with torch.no_grad():
            model(some_images())
        assert model.used >= model.how.keys(), pack
        for _, kind, spelling in pack:
            assert everywhere(model.function, kind, spelling).items() <= model.how.items()


@pytest.mark.parametrize("linear", LINEAR)
def test_heads_are_no_windows_whatever_weights_they_have(linear):
    function = Function()
    how = everywhere(function, "project", "head by head")
    check(function, how | everywhere(function, "linear", linear))


@pytest.mark.parametrize("number", range(len(MIXTURES)), ids=lambda number: f"seed {SEED}, {number}")
def test_a_mixture_of_spellings(number):
    check(*MIXTURES[number])


@pytest.mark.parametrize("case", FAR, ids=told)
def test_what_is_written_from_further_away_is_right_or_refused(case):
    """It never silently gets another map."""
    function, how = case[0], everywhere(*case)
    model = Written(function, how).eval()
    assert same_function(model) < 1e-9
    wanted = expected(function).maps
    for methods in PASSES:
        for method, options in methods.items():
            name = named(method, options)
            with contextlib.suppress(VitxError):
                found = explained(model, [{method: options}])[name]
                assert distance(found, wanted[name]) < 1e-6, name


OPTIONS = (
    {"head_fusion": "max"},
    {"head_fusion": "min"},
    {"discard_ratio": 0.4},
    {"head_fusion": "max", "discard_ratio": 0.4, "start_layer": 1},
)
HEADS = [case for case in ALONE if case[1] in ("attend", "merge", "attention")]


@pytest.mark.parametrize("case", HEADS, ids=told)
def test_all_heads_of_a_residual_are_fused_together(case):
    """Whatever holds them, "max" is over all of them, and `discard_ratio` applies to the fused matrix."""
    function, how = case[0], everywhere(*case)
    model, images = Written(function, how).eval(), some_images()
    seen = expected(function).seen
    options = OPTIONS[HEADS.index(case) % len(OPTIONS)]
    asked = {"rollout": options, "grad_rollout": options}
    if case[2] == "queries in two parts" and "discard_ratio" in options:
        with pytest.raises(VitxError, match="computed in parts"):
            explain_methods(model, images, asked, target=TARGET)
        return
    found = explain_methods(model, images, asked, target=TARGET)
    fusion, discard = options.get("head_fusion", "mean"), options.get("discard_ratio", 0.0)
    for method, explanation in found.items():
        wanted = oracle.maps_of(
            *(seen["linearised"], method, 1, function.read, fusion, discard, options.get("start_layer", 0))
        )
        maps = explanation.maps.flatten(1)
        assert torch.allclose(maps, wanted, rtol=0, atol=1e-12) or distance(maps, wanted) < 1e-6, (
            *(method, options),
        )


def test_another_function_has_another_map():
    """The oracle distinguishes functions; otherwise the tests above would prove little."""
    plain = Function()
    found = explain(Written(plain).eval(), some_images(), target=TARGET).maps
    assert distance(found, expected(plain).maps["rollout"]) < 1e-9
    for other in (
        Function(("serial", "twins")),
        Function(read="patches"),
        Function(heads=2),
    ):
        assert distance(found, expected(other).maps["rollout"]) > 1e-3

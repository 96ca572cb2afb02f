"""Networks that are written at random, and their maps by vitx."""

import math
import random

import torch

from tests.rewriting.activations import ACTIVATIONS
from tests.rewriting.function import TARGET, Function
from tests.rewriting.images import READS
from tests.rewriting.matrices import expected, some_images
from tests.rewriting.sites import FAR, sites, tables
from tests.rewriting.sums import PENDING
from vitx import explain_methods

PASSES = (
    {"rollout": {}, "grad_rollout": {}, "gae": {}, "evidence": {}},
    {"grad_rollout": {"gradient": "plain"}, "gae": {"gradient": "plain"}},
)


def named(method, options):
    """Return the name of a map in `Expected`."""
    return f"{method}, {options.get('gradient', 'linearised')}" if method in PASSES[1] else method


def map_of(method, explanation):
    return explanation.signed if method == "evidence" else explanation.maps


def distance(found, wanted):
    """Return the error relative to the largest value of each map; infinite if the grids differ."""
    if found.shape != wanted.shape:
        return math.inf
    off = (found.double() - wanted).abs().flatten(1).amax(1)
    return (off / wanted.abs().flatten(1).amax(1)).max().item()


def explained(model, passes=PASSES):
    """Return the maps of all methods, named as in `Expected`."""
    maps = {}
    for methods in passes:
        found = explain_methods(model, some_images(), methods, target=TARGET)
        for method, explanation in found.items():
            maps[named(method, methods[method])] = map_of(method, explanation)
    return maps


def same_function(model):
    """Return how far the output is from that of the function."""
    with torch.no_grad():
        return (model(some_images()) - expected(model.function).output).abs().max().item()


IN_PARTS = {"image by image", "mm for each", "query by query", "queries in two parts"}


def mixture(rng):
    """Draw a function and a spelling of it at random."""
    function = Function(
        tuple(
            rng.choice(["serial", "serial", "beside", "twins", "all"]) for _ in range(rng.choice([2, 2, 3]))
        ),
        rng.choice(list(ACTIVATIONS)),
        rng.choice(["token", "token", "patches"]),
        rng.choice([2, 3]),
    )
    known, often = tables(function), rng.choice([0.15, 0.4, 0.8])
    how = {}
    for kind, place in sites(function):
        # an attention in one piece has no steps to spell
        rare = 0.2 if kind == "attention" else 1
        if rng.random() < often * rare:
            how[kind, place] = rng.choice(list(known[kind]))
    for layer, form in enumerate(function.forms):
        first, second = f"{layer}a", f"{layer}b"
        parts = IN_PARTS & {how.get(("attend", first)), how.get(("attend", second))}
        if form in ("twins", "all") and parts:  # heads of a residual in different parts are refused
            how["attend", first] = how["attend", second] = sorted(parts)[0]
            how.pop(("attention", first), None)
            how.pop(("attention", second), None)
    return function, how


def alone(far=False):
    """Yield (function, kind, spelling) for each spelling of each kind, which is used at all its sites."""
    for kind in tables(Function()):
        if kind == "activation":
            functions = [Function(activation=name) for name in ACTIVATIONS]
        elif kind == "read":
            functions = [Function(read=name) for name in READS]
        elif kind == "sum":
            functions = [Function(), Function(("all", "beside"))]
        elif kind in ("merge", "attention"):
            functions = [Function(), Function(("twins", "all"))]
        else:
            functions = [Function()]
        for function in functions:
            for spelling in (FAR if far else tables(function)).get(kind, ()):
                yield function, kind, spelling


def everywhere(function, kind, spelling):
    """Return {(kind, place): spelling} with the same spelling for all sites of a kind."""
    return {(other, place): spelling for other, place in sites(function) if other == kind}


# Kinds that leave each other no site to spell: one network has spellings of one kind of each pair.
APART = {
    *(("attention", kind) for kind in ("linear", "project", "softmax", "attend", "merge", "pending")),
    *(("linear", kind) for kind in ("project", "merge", "mlp", "pending")),
    *(("pending", "merge"), ("pending", "mlp"), ("softmax", "attend")),
}
DEPENDING = {  # the kinds whose spellings depend on what the function is
    "forms": ("sum", "merge", "attend", "attention"),
    "activation": ("activation",),
    "read": ("read", "order"),
}


def fits(case, pack):
    """Return whether a case of `alone` can join others in one network of one function."""
    ours = {kind_of(case), *(kind_of(other) for other in pack)}
    return (
        case[1] not in {kind for _, kind, _ in pack}
        and not any(pair[0] in ours and pair[1] in ours for pair in APART)
        and together(case, *pack) is not None
        and len({"out=" in spelling for *_, spelling in (case, *pack)}) == 1  # such a network is not trained
    )


def kind_of(case):
    return "pending" if case[2] in PENDING else case[1]


def together(*cases):
    """Return the function that has what each case needs; None if there is none."""
    needs = {}
    for name, kinds in DEPENDING.items():
        needs[name] = {getattr(function, name) for function, kind, _ in cases if kind in kinds}
    if any(len(values) > 1 for values in needs.values()):
        return None
    return Function(**{name: values.pop() for name, values in needs.items() if values})


def packs():
    """Put the cases of `alone` into few lists, each of which can be one network."""
    made = []
    for case in sorted(alone(), key=lambda case: case[1] not in DEPENDING["forms"]):
        pack = next((pack for pack in made if fits(case, pack)), None)
        if pack is None:
            made.append(pack := [])
        pack.append(case)
    return made


def packed(pack):
    """Return the function of a pack, and how its spellings are used at all their sites."""
    function = together(*pack)
    return function, {
        place: spelling
        for _, kind, name in pack
        for place, spelling in everywhere(function, kind, name).items()
    }


def mixtures(count, seed):
    rng = random.Random(seed)
    return [mixture(rng) for _ in range(count)]

"""Print how many of many networks have the right maps.

python -m tests.rewriting N SEED    N random mixtures: a tally, and the spellings to blame
python -m tests.rewriting singles   each spelling alone
"""

import collections
import sys

import torch

from tests.rewriting.matrices import expected
from tests.rewriting.mixtures import (
    PASSES,
    alone,
    distance,
    everywhere,
    explained,
    mixtures,
    named,
    same_function,
)
from tests.rewriting.network import Written
from vitx import VitxError


def verdicts(function, how):
    """Return for each map ("right" or another verdict, details)."""
    model, wanted = Written(function, how).eval(), expected(function).maps
    found = {}
    for methods in PASSES:
        for method, options in methods.items():
            name = named(method, options)
            try:
                maps = explained(model, [{method: options}])
            except VitxError as error:
                found[name] = ("refused", str(error))
            except Exception as error:
                found[name] = ("traceback", f"{type(error).__name__}: {error}")
            else:
                off = distance(maps[name], wanted[name])
                found[name] = ("right", "") if off < 1e-6 else ("wrong", f"off by {off:.2g}")
    return found


def to_blame(function, how, name, verdict):
    """Return only the spellings that matter for a verdict, without those that can be left out."""
    method, _, gradient = name.partition(", ")
    options = {"gradient": gradient} if gradient == "plain" else {}
    left = dict(how)

    def bad(some):
        try:
            maps = explained(Written(function, some).eval(), [{method: options}])
        except VitxError:
            return "refused"
        except Exception:
            return "traceback"
        return "right" if distance(maps[name], expected(function).maps[name]) < 1e-6 else "wrong"

    for site in list(how):
        fewer = {other: spelling for other, spelling in left.items() if other != site}
        if bad(fewer) == verdict:
            left = fewer
    return " + ".join(sorted({f"{kind}: {spelling}" for (kind, _), spelling in left.items()})) or str(
        function
    )


def main(words):
    """Print a tally."""
    torch.set_num_threads(1)
    if words[:1] == ["singles"]:
        cases = [(function, everywhere(*one)) for one in alone() for function in one[:1]]
    else:
        cases = mixtures(int(words[0]), int(words[1]) if words[1:] else 0)
    tally, culprits = collections.defaultdict(collections.Counter), collections.Counter()
    sentences = {}
    for function, how in cases:
        off = same_function(Written(function, how).eval())
        assert off < 1e-9, (off, function, how)
        for name, (verdict, said) in verdicts(function, how).items():
            tally[name][verdict] += 1
            if verdict != "right":
                culprit = verdict, to_blame(function, how, name, verdict)
                culprits[culprit] += 1
                sentences.setdefault(culprit, f"{name}: {said}")
    for name, counts in tally.items():
        print(
            f"{name:26}",
            *(f"{verdict} {counts[verdict]:4}" for verdict in ("right", "wrong", "refused", "traceback")),
        )
    for (verdict, spelling), count in sorted(culprits.items(), key=lambda pair: (pair[0][0], -pair[1])):
        print(f"{verdict:9} {count:3}  {spelling}\n               {sentences[verdict, spelling][:150]}")


main(sys.argv[1:])

"""What each fast path of the core is worth: the time of an explanation without it over the time with it.

    python benchmarks/paths.py

A path that does not pay here should go. Both run in turn, round after round; the table shows the median
and the quartiles of the ratios.
"""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from cases import TINY, Case
from measuring import interleaved
from showing import table
from torch import Tensor

import vitx
from vitx import attention, fused, rollout

SMALL, LARGE = Case(TINY, 8, 224), Case(TINY, 1, 1024)


@dataclass(frozen=True)
class FastPath:
    """A way to be fast.

    Attributes:
        name: what it does.
        method: what is explained with it.
        options: of the method.
        without: turns it off.
    """

    name: str
    method: str
    options: dict[str, Any]
    without: Callable[[], AbstractContextManager[Any]]


def never(*_: Tensor) -> bool:
    """Says no."""
    return False


PATHS = (
    FastPath(
        "small attention by way of A, whose fused heads are kept",
        *("rollout", {}),
        lambda: patch.object(fused, "_is_small", never),
    ),
    FastPath(
        "log-sum-exp of the forward kernel, not a softmax",
        *("rollout", {}),
        lambda: patch.object(fused, "_is_plain", never),
    ),
    FastPath(
        "large products one by one",
        *("rollout", {}),
        lambda: patch.object(attention, "_LARGE_PRODUCT", float("inf")),
    ),
    FastPath(
        "selection by NumPy",
        *("rollout", {"discard_ratio": 0.9}),
        lambda: patch.object(rollout, "_cut_on_cpu", rollout._cut),
    ),
    FastPath(
        "tiles shared with the backward pass, and log-sum-exp",
        *("grad_rollout", {}),
        lambda: patch.object(fused, "_is_plain", never),
    ),
)


def worth(path: FastPath, case: Case, rounds: int) -> str:
    """Returns the ratio of the times without and with the path."""
    model, images = case.build("cpu")

    def explain() -> None:
        vitx.explain(model, images, path.method, **path.options)

    def without() -> None:
        with path.without():
            explain()

    timing = interleaved({"with": explain, "without": without}, "with", rounds, "cpu")["without"]
    if timing.error:
        raise RuntimeError(timing.error)
    low, high = timing.quartiles
    return f"{timing.ratio:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument(
        "--rounds", type=int, default=15, help="of the small case; the large one takes a third"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [
        [
            path.name,
            path.method,
            worth(path, SMALL, options.rounds),
            worth(path, LARGE, -(-options.rounds // 3)),
        ]
        for path in PATHS
    ]
    print(table(["path", "method", SMALL.title, LARGE.title], lines))


if __name__ == "__main__":
    main()

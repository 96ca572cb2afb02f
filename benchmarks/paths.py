"""The speedup by each fast path of the core: the time of an explanation without it over that with it.

    python benchmarks/paths.py

A path that gives no speedup here should be removed. Both run in turn, round after round; the table shows
the median and the quartiles of the ratios.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
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
from vitx.functional import tiles, weights
from vitx.functional.tiles import ALL, Cut
from vitx.tape import expanded, kernels
from vitx.tape.rules import attention
from vitx.tape.weights import dot_product

SMALL, LARGE, SINGLE = Case(TINY, 8, 224), Case(TINY, 1, 1024), Case("vit_base_patch16_224", 1, 224)


@dataclass(frozen=True)
class FastPath:
    """An optimization that can be turned off.

    Attributes:
        name: its description.
        method: the method to time.
        options: options of the method.
        without: returns a context in which it is turned off.
    """

    name: str
    method: str
    options: dict[str, Any]
    without: Callable[[], AbstractContextManager[Any]]


def never(*_: Tensor) -> bool:
    """Return False."""
    return False


def as_it_is(tensor: Tensor) -> Tensor:
    """Return the tensor unchanged, with its expanded dimensions."""
    return tensor


def with_softmax(*args: Any, log_sum_exp: Tensor | None = None, **options: Any) -> weights.Weights:
    """Return the weights A, computed without the log-sum-exp of the kernel."""
    return dot_product(*args, **options)


def fresh(_memory: tiles.Memory, _use: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Return a new tensor instead of one that was used before."""
    return like.new_empty(*shape)


def all_heads(shape: tuple[int, ...], device: torch.device, rows: slice = ALL) -> Iterator[Cut]:
    """Yield tiles of images, or of the rows of one image, each with all heads."""
    images, heads, queries, keys = shape
    room = tiles._room(device)
    some, count = max(1, room // (heads * queries * keys)), max(64, room // (heads * keys))
    first, last, _ = rows.indices(queries)
    for image in range(0, images, some):
        for row in range(first, last, count):
            yield slice(image, image + some), slice(0, heads), slice(row, min(row + count, last))


PATHS = (
    FastPath(
        "small attention by way of A, whose fused heads are kept",
        *("rollout", {}),
        lambda: patch.object(kernels, "_is_small", never),
    ),
    *(
        FastPath(
            "log-sum-exp of the forward kernel, not a softmax",
            *(method, {}),
            lambda: patch.object(attention, "dot_product", with_softmax),
        )
        for method in ("rollout", "grad_rollout")
    ),
    *(
        FastPath("one head after another", method, {}, lambda: patch.object(weights, "split", all_heads))
        for method in ("rollout", "grad_rollout")
    ),
    *(
        FastPath(
            "the same memory for all tiles", method, {}, lambda: patch.object(tiles.Memory, "take", fresh)
        )
        for method in ("rollout", "grad_rollout")
    ),
    *(
        FastPath(
            "relevance that is the same along channels is kept once",
            *(method, {}),
            lambda: patch.object(expanded, "core", as_it_is),
        )
        for method in ("rollout", "grad_rollout")
    ),
)


def worth(path: FastPath, case: Case, rounds: int) -> str:
    """Return the time without the path over that with it: the median and the quartiles."""
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
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument(
        "--rounds", type=int, default=15, help="rounds of the small cases; the large one takes a third"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [
        [
            path.name,
            path.method,
            worth(path, SMALL, options.rounds),
            worth(path, LARGE, -(-options.rounds // 3)),
            worth(path, SINGLE, options.rounds),
        ]
        for path in PATHS
    ]
    print(table(["path", "method", SMALL.title, LARGE.title, SINGLE.title], lines))


if __name__ == "__main__":
    main()

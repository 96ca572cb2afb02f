"""The sites of a network, each of which can be written in many ways."""

import torch

from tests.rewriting.activations import ACTIVATIONS, MLP
from tests.rewriting.attention import (
    ATTEND,
    SOFTMAX,
    beside_each_other,
    keys_by_blocks,
    padded_keys,
    reversed_keys,
    split_keys,
    split_values,
)
from tests.rewriting.heads import ATTENTION, MERGE, PROJECT
from tests.rewriting.images import EMBED, ORDER, READS, TOKENS
from tests.rewriting.layers import FAR_LINEAR, LINEAR, NORM
from tests.rewriting.sums import SUM, added, by_convolution, by_matrices, by_pooling, of_stack

# More distant spellings: the right map or an error, never another map.
FAR = {
    "linear": FAR_LINEAR,
    "attend": {
        "sdpa, padded keys": padded_keys,
        "sdpa, images beside each other": beside_each_other,
        "keys reversed": reversed_keys,
        "block by block of keys": keys_by_blocks,
        "one softmax, keys in two parts": split_keys,
        "one softmax, channels in two parts": split_values,
    },
    "sum": {
        "stack, a vector of ones": of_stack(
            lambda s: torch.einsum("s,sbnc->bnc", torch.ones(len(s), dtype=s.dtype), s)
        ),
        "cumsum": of_stack(lambda s: s.cumsum(0)[-1]),
        "avg_pool1d of a stack": added(by_pooling),
        "a fixed convolution of a stack": added(by_convolution),
        "identity matrices": added(by_matrices),
        "exp and back": added(lambda x, f: ((x + f).exp()).log()),
    },
}  # fmt: skip


def tables(function):
    """Return the spellings of each kind of site for one function."""
    return {
        "embed": EMBED,
        "tokens": TOKENS,
        "norm": NORM,
        "linear": LINEAR,
        "project": PROJECT,
        "softmax": SOFTMAX,
        "attend": ATTEND,
        "merge": MERGE,
        "attention": ATTENTION,
        "activation": ACTIVATIONS[function.activation],
        "mlp": MLP,
        "sum": SUM,
        "read": READS[function.read],
        "order": ORDER if function.read == "token" else {"norm, then read": None},
    }


def sites(function):
    """Return the (kind, place) of each site."""
    found = [("embed", "start"), ("tokens", "start")]
    for layer, form in enumerate(function.forms):
        twins = form in ("twins", "all")
        for attention in ("a", "b") if twins else ("a",):
            place = f"{layer}{attention}"
            kinds = ("norm", "project", "softmax", "attend", "merge", "attention")
            found += [(kind, place) for kind in kinds]
            found += [("linear", f"{place} in"), ("linear", f"{place} out")]
        found += [(kind, f"{layer}m") for kind in ("norm", "activation", "mlp")]
        found += [("linear", f"{layer}m in"), ("linear", f"{layer}m out"), ("sum", f"{layer}a")]
        if form in ("serial", "twins"):
            found.append(("sum", f"{layer}m"))
    return [*found, ("order", "end"), ("norm", "end"), ("read", "end"), ("linear", "end")]

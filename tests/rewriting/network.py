"""A network that is written as it is told."""

import functools

import torch
from torch import nn

from tests.rewriting.function import CLASSES, COUNT, HIDDEN, PATCH, REAL, WIDTH
from tests.rewriting.sites import FAR, tables
from tests.rewriting.sums import PENDING, Pending

IN_PIECES = ("the class token apart", "the tokens as one batch")  # joined after the projection


@functools.cache
def weights(function):
    """Return the parameters of a function, large enough for attention to be far from uniform."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape, size=0.1, around=0.0):
        return around + size * torch.randn(*shape, generator=generator, dtype=REAL)

    made = {
        "embed": draw(WIDTH, 3, PATCH, PATCH, size=0.3),
        "embed_bias": draw(WIDTH),
        "first": draw(1, 1, WIDTH, size=0.5),
        "place": draw(1, COUNT, WIDTH, size=0.5),
        "norm_end": draw(WIDTH, around=1.0),
        "norm_end_bias": draw(WIDTH),
        "head": draw(CLASSES, WIDTH, size=0.5),
        "head_bias": draw(CLASSES),
    }
    double = 2 if function.activation == "swiglu" else 1
    for layer in range(len(function.forms)):
        for one in "ab":
            made |= {
                f"qkv_{layer}{one}": draw(3 * WIDTH, WIDTH, size=0.35),
                f"qkv_{layer}{one}_bias": draw(3 * WIDTH),
                f"out_{layer}{one}": draw(WIDTH, WIDTH, size=0.3),
                f"out_{layer}{one}_bias": draw(WIDTH),
            }
        made |= {
            f"up_{layer}": draw(double * HIDDEN, WIDTH, size=0.4),
            f"up_{layer}_bias": draw(double * HIDDEN),
            f"down_{layer}": draw(WIDTH, HIDDEN, size=0.3),
            f"down_{layer}_bias": draw(WIDTH),
        }
        for one in "abm":
            made |= {
                f"norm_{layer}{one}": draw(WIDTH, around=1.0),
                f"norm_{layer}{one}_bias": draw(WIDTH),
            }
    return made


class Written(nn.Module):
    """The network of a function, spelled as `how` says, {(kind, place): spelling}; other sites are plain."""

    def __init__(self, function, how=None):
        super().__init__()
        self.function, self.how = function, dict(how or {})
        self.tables = {kind: {**table, **FAR.get(kind, {})} for kind, table in tables(function).items()}
        # a network that writes into out= cannot be trained
        trained = not any("out=" in name for name in self.how.values())
        for name, value in weights(function).items():
            self.register_parameter(name, nn.Parameter(value.clone(), requires_grad=trained))

    def name(self, kind, place):
        return self.how.get((kind, place)) or next(iter(self.tables[kind]))

    def spelled(self, kind, place):
        return self.tables[kind][self.name(kind, place)]

    def pair(self, name):
        return getattr(self, name), getattr(self, f"{name}_bias")

    def normed(self, x, place):
        return self.spelled("norm", place)(x, *self.pair(f"norm_{place}"))

    def projection(self, total, place):
        """Return the last linear layer of a branch, which may be left to the sum."""
        whole = place[-1] != "m" or self.name("mlp", place) not in IN_PIECES
        if whole and self.name("sum", total) in PENDING:
            return Pending
        return self.spelled("linear", f"{place} out")

    def attended(self, x, place, total):
        """Return the terms of an attention."""
        x, heads = self.normed(x, place), self.function.heads
        qkv, out = self.pair(f"qkv_{place}"), self.pair(f"out_{place}")
        whole = self.spelled("attention", place)
        if whole is not None:
            return whole(x, *qkv, *out, heads)
        linear = self.spelled("linear", f"{place} in")
        q, k, v = self.spelled("project", place)(x, *qkv, linear, heads)
        mixed = self.spelled("attend", place)(q, k, v, self.spelled("softmax", place))
        return self.spelled("merge", place)(mixed, *out, self.projection(total, place))

    def fed(self, x, layer, total):
        """Return the terms of an MLP."""
        place = f"{layer}m"
        return self.spelled("mlp", place)(
            self.normed(x, place),
            *(*self.pair(f"up_{layer}"), *self.pair(f"down_{layer}")),
            self.spelled("linear", f"{place} in"),
            self.spelled("activation", place),
            self.projection(total, place),
            self.function.activation == "swiglu",
        )

    def total(self, x, terms, place):
        return self.spelled("sum", place)(x, terms)

    def block(self, x, layer, form):
        first, second = f"{layer}a", f"{layer}m"
        terms = self.attended(x, first, first)
        if form in ("twins", "all"):
            terms = terms + self.attended(x, f"{layer}b", first)
        if form in ("beside", "all"):
            return self.total(x, terms + self.fed(x, layer, first), first)
        x = self.total(x, terms, first)
        return self.total(x, self.fed(x, layer, second), second)

    def forward(self, images):
        x = self.spelled("embed", "start")(images, *self.pair("embed"))
        x = self.spelled("tokens", "start")(x, self.first, self.place)
        for layer, form in enumerate(self.function.forms):
            x = self.block(x, layer, form)
        read = self.spelled("read", "end")
        if self.name("order", "end") == "norm, then read":
            x = read(self.normed(x, "end"))[:, None]
        else:
            x = self.normed(read(x)[:, None], "end")
        return self.spelled("linear", "end")(x, *self.pair("head"))[:, 0]

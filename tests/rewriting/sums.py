"""Ways to write the sums of residuals. The plain way comes first."""

import functools
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from tests.rewriting.function import WIDTH


@dataclass(frozen=True)
class Pending:
    """A term that is not projected yet; the sum projects it."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


def add_up(x, terms):
    return functools.reduce(torch.add, terms, x)


def all_but(x, terms):
    """Return the sum of the terms without the stream."""
    return add_up(terms[0], terms[1:])


def added(term_by_term):
    """Return a spelling of x + f that adds one term after the other."""
    return lambda x, terms: functools.reduce(term_by_term, terms, x)


def at_once(x_and_rest):
    """Return a spelling of x + f in which f is the sum of all branches."""
    return lambda x, terms: x_and_rest(x, all_but(x, terms))


def of_stack(total):
    return lambda x, terms: total(torch.stack([x, *terms]))


def in_slices(x, f):
    y = x.clone()
    y[:, :1] += f[:, :1]
    y[:, 1:] += f[:, 1:]
    return y


def in_a_view(x, f):
    """Add f through views that were made before they are written into."""
    y = x.clone()
    patches, first = y[:, 1:], y.select(1, 0)
    patches.add_(f[:, 1:])
    first += f[:, 0]
    return y


def over(x, f):
    y = torch.empty_like(x)
    y.copy_(x)
    y.add_(f)
    return y


def copied_over(x, f):
    """Copy the sum back into the stream."""
    total = x + f
    x.copy_(total)
    return x


def put_at(x, f):
    rows, columns = torch.arange(len(x))[:, None], torch.arange(x.shape[1])[None]
    return x.clone().index_put_((rows, columns), f, accumulate=True)


def assigned_at(x, f):
    y = torch.empty_like(x)
    for place in range(x.shape[1]):
        y[:, place] = x[:, place] + f[:, place]
    return y


def by_pooling(x, f):
    return F.avg_pool1d(torch.stack([x, f], -1).flatten(0, 2), 2)[..., 0].view_as(x) * 2


def by_convolution(x, f):
    return F.conv1d(torch.stack([x, f], -2).flatten(0, 1), x.new_ones(1, 2, 1)).view_as(x)


def by_matrices(x, f):
    one = torch.eye(WIDTH, dtype=x.dtype)
    return F.linear(torch.cat([x, f], -1), torch.cat([one, one], 1))


def into_product(multiply):
    """Return a spelling of the sum that projects pending terms."""

    def spelling(x, terms):
        for term in terms:
            x = multiply(x, term) if isinstance(term, Pending) else x + term
        return x

    return spelling


def product_in_place(x, term):
    x = (x + term.bias).contiguous()
    x.flatten(0, 1).addmm_(term.hidden.flatten(0, 1), term.weight.T)
    return x


PENDING = {
    "addmm": into_product(
        lambda x, term: (
            torch.addmm(x.flatten(0, 1), term.hidden.flatten(0, 1), term.weight.T).view_as(x) + term.bias
        )
    ),
    "addmm, bias first": into_product(
        lambda x, term: torch.addmm(
            (x + term.bias).flatten(0, 1), term.hidden.flatten(0, 1), term.weight.T
        ).view_as(x)
    ),
    "addmm_": into_product(product_in_place),
    "baddbmm of the stream": into_product(
        lambda x, term: torch.baddbmm(x, term.hidden, term.weight.T.expand(len(x), -1, -1)) + term.bias
    ),
}


SUM = {
    "x + f": added(lambda x, f: x + f),
    "f + x": added(lambda x, f: f + x),
    "torch.add": added(torch.add),
    "the branches first": at_once(lambda x, f: x + f),
    "the branches first, x last": at_once(lambda x, f: f + x),
    "x last": lambda x, terms: add_up(terms[0], [*terms[1:], x]),
    "x in between": lambda x, terms: add_up(terms[-1], [x, *terms[:-1]]),
    "backward": lambda x, terms: add_up(terms[-1], [*reversed(terms[:-1]), x]),
    "x to the first, then the rest": lambda x, terms: add_up(x + terms[-1], terms[:-1]),
    "sum()": lambda x, terms: sum([x, *terms]),
    "+=": lambda x, terms: functools.reduce(lambda y, f: y.__iadd__(f), terms, x.clone()),
    "into the stream itself": lambda x, terms: functools.reduce(lambda y, f: y.add_(f), terms, x),
    "into the branch": lambda x, terms: functools.reduce(
        lambda y, f: y.add_(f), [x, *terms[1:]], terms[0].clone()
    ),
    "alpha": added(lambda x, f: torch.add(x, f / 2, alpha=2)),
    "less its opposite": added(lambda x, f: x - (-f)),
    "sub, alpha": added(lambda x, f: torch.sub(x, f, alpha=-1)),
    "rsub": added(lambda x, f: torch.rsub(-x, f)),
    "the opposite of a difference": added(lambda x, f: -(-x - f)),
    "stack, sum": of_stack(lambda stack: stack.sum(0)),
    "stack, mean": of_stack(lambda stack: stack.mean(0) * len(stack)),
    "stack, einsum": of_stack(lambda stack: torch.einsum("sbnc->bnc", stack)),
    "stack, unbind, add": of_stack(lambda stack: functools.reduce(torch.add, stack.unbind())),
    "stack at the end, sum": lambda x, terms: torch.stack([x, *terms], -1).sum(-1),
    "stack, the branches first": lambda x, terms: torch.sum(torch.stack([*terms, x], 1), 1),
    "cat, view, sum": lambda x, terms: torch.cat([x, *terms]).view(-1, *x.shape).sum(0),
    "lerp": added(lambda x, f: torch.lerp(x, f, 0.5) * 2),
    "lerp, unevenly": added(lambda x, f: torch.lerp(x / 0.75, f * 4, 0.25)),
    "lerp by a tensor": added(lambda x, f: 2 * x.lerp(f, torch.full((WIDTH,), 0.5, dtype=x.dtype))),
    "addcmul": added(lambda x, f: torch.addcmul(x, f, torch.ones(WIDTH, dtype=x.dtype))),
    "addcdiv": added(lambda x, f: torch.addcdiv(x, f, torch.full((WIDTH,), 2.0, dtype=x.dtype), value=2)),
    "a factor of ones": added(lambda x, f: x + torch.ones(WIDTH, dtype=x.dtype) * f),
    "twice x, less x": added(lambda x, f: 2 * x + f - x),
    "half of x, twice": added(lambda x, f: x / 2 + f + x / 2),
    "a difference of differences": added(lambda x, f: x - (x - (x + f))),
    "to the sum, as in straight-through estimators": added(lambda x, f: x + ((x + f) - x)),
    "trapezoid": added(lambda x, f: torch.trapezoid(torch.stack([x, f], -1), dim=-1) * 2),
    "stacks in a stack": lambda x, terms: torch.stack([torch.stack([x, terms[0]]).sum(0), *terms[1:]]).sum(0),
    "nansum": of_stack(lambda stack: stack.nansum(0)),
    "in slices": at_once(in_slices),
    "in views": at_once(in_a_view),
    "copy_, add_": at_once(over),
    "copied into the stream": at_once(copied_over),
    "token by token": at_once(
        lambda x, f: torch.stack([x[:, i] + f[:, i] for i in range(x.shape[1])], 1)
    ),
    "token by token, assigned": at_once(assigned_at),
    "tokens in two parts": at_once(
        lambda x, f: torch.cat([x[:, :1] + f[:, :1], x[:, 1:] + f[:, 1:]], 1)
    ),
    "channels in two parts": at_once(
        lambda x, f: torch.cat([x[..., :7] + f[..., :7], x[..., 7:] + f[..., 7:]], -1)
    ),
    "image by image": at_once(
        lambda x, f: torch.stack([a + b for a, b in zip(x, f, strict=True)])
    ),
    "flat": at_once(lambda x, f: (x.flatten() + f.flatten()).view_as(x)),
    "channels in front": at_once(lambda x, f: (x.mT + f.mT).mT),
    "index_add": at_once(lambda x, f: x.index_add(1, torch.arange(x.shape[1]), f)),
    "index_put_": at_once(put_at),
    "scatter_add": at_once(
        lambda x, f: x.scatter_add(1, torch.arange(x.shape[1])[None, :, None].expand_as(x), f)
    ),
    "out=": added(lambda x, f: torch.add(x, f, out=torch.empty_like(x))),
    "out= the branch": at_once(lambda x, f: torch.add(x, f, out=f.contiguous())),
    "out= the stream": at_once(lambda x, f: torch.add(x, f, out=x)),
    **PENDING,
}  # fmt: skip

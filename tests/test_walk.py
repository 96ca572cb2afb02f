"""The backward walk over tapes written by hand, and the ancestry of their values."""

from functools import partial

import pytest
import torch
from torch import nn

from vitx.tape.sums import Sum
from vitx.tape.tape import Tape
from vitx.tape.terms import stream_of, terms_of
from vitx.tape.values import Step, followed, marked, reduced
from vitx.tape.walk import gradients, walk


class Written:
    """A tape whose steps multiply what arrives by a factor for each input."""

    def __init__(self):
        self.tape = Tape(nn.Identity())
        self.image = self.tape.value((2, 3))
        self.tape.images.append(self.image)

    def step(self, factors, outs=1, kind=Step):
        inputs = list(factors)
        outputs = [self.tape.value((2, 3), inputs) for _ in range(outs)]

        def back(arrived):
            return [sum(arrived) * factor for factor in factors.values()]

        self.tape.append(kind("times", inputs, outputs, back, back))
        return outputs if outs > 1 else outputs[0]

    def sum(self, *summands):
        terms, *_ = terms_of(summands)
        found = self.step({term.value: 1 for term in terms}, kind=partial(Sum, terms=terms))
        found.sum = found.made_by
        return found

    def walk(self, starts, **options):
        starts = {value: torch.full((2, 3), float(size)) for value, size in starts.items()}
        send = lambda step, arrived: zip(step.inputs, step.relevance(arrived), strict=True)  # noqa: E731
        return walk(self.tape, starts, send, **options)


def of(found, value):
    return found[value][0, 0].item()


def test_ways_that_meet_are_added():
    on = Written()
    left, right = on.step({on.image: 2}), on.step({on.image: 3})
    last = on.step({left: 5, right: 7})
    found = on.walk({last: 1, right: 10})
    assert of(found.arrived, on.image) == 2 * 5 + 3 * (7 + 10)
    assert set(found.arrived) == {on.image}


def test_what_passed_is_seen_whole():
    on = Written()
    first = on.step({on.image: 2})
    last = on.step({first: 5, on.image: 1})
    found = on.walk({last: 1, first: 4}, watched=[first, last])
    assert of(found.passed, first) == 5 + 4
    assert of(found.passed, last) == 1
    assert of(found.arrived, on.image) == 2 * 9 + 1


def test_a_gradient_is_known_at_its_starts():
    """Nothing is added there: autograd has already counted the paths through values computed from it."""
    on = Written()
    first = on.step({on.image: 2})
    last = on.step({first: 5, on.image: 1})
    starts = {value: torch.full((2, 3), size) for value, size in {last: 1.0, first: 4.0}.items()}
    found = gradients(on.tape, starts, [first], whole=True)
    assert of(found.passed, first) == 4
    assert of(found.arrived, on.image) == 2 * 4 + 1


def test_some_steps():
    on = Written()
    chain = [on.image]
    for _ in range(4):
        chain.append(on.step({chain[-1]: 2}))
    found = on.walk({chain[-1]: 1}, steps=range(2, 4))
    assert {value: of(found.arrived, value) for value in found.arrived} == {chain[2]: 4}


def test_an_output_at_which_nothing_arrived_gets_zeros():
    on = Written()
    one, other = on.step({on.image: 3}, outs=2)
    assert of(on.walk({one: 1}).arrived, on.image) == 3
    assert of(on.walk({one: 1, other: 1}).arrived, on.image) == 6


def test_constants_are_where_it_ends():
    on = Written()
    own = on.tape.constant(torch.ones(2, 3))
    last = on.step({on.image: 0.25, own: 0.75})
    found = on.walk({last: 1}).arrived
    assert of(found, own) == 0.75
    assert of(found, on.image) == 0.25


def test_nothing_that_was_given_is_changed():
    on = Written()
    last = on.step({on.image: 3})
    starts = {last: torch.ones(2, 3), on.image: torch.ones(2, 3)}
    walk(on.tape, starts, lambda step, arrived: zip(step.inputs, step.relevance(arrived), strict=True))
    assert list(starts) == [last, on.image]
    assert all(torch.equal(start, torch.ones(2, 3)) for start in starts.values())


def test_made_from():
    on = Written()
    first, beside = on.step({on.image: 1}), on.step({on.image: 1})
    last = on.step({first: 1})
    assert last.made_from(first)
    assert last.made_from(on.image)
    assert not last.made_from(beside)
    assert not first.made_from(last)
    beside.rearranges = first.rearranges  # as for a rearrangement of it
    assert last.made_from(beside)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("nested", ["left", "right", "flat"])
def test_terms_and_stream_do_not_depend_on_how_a_sum_is_written(nested, order):
    """The sum is x + a + m, where a and m are computed from x."""
    on = Written()
    x = on.step({on.image: 1})
    a, m = on.step({x: 1}), on.step({x: 1})
    terms = [x, a, m][order:] + [x, a, m][:order]

    def added(*values):
        return on.sum(*((value, 1) for value in values))

    one, two, three = terms
    whole = {
        "left": lambda: added(added(one, two), three),
        "right": lambda: added(one, added(two, three)),
        "flat": lambda: added(one, two, three),
    }[nested]()
    assert set(whole.made_by.inputs) == {x, a, m}
    assert whole.made_by.stream is x


def test_a_sum_from_which_another_term_was_made_is_not_opened():
    """x + a, then (x + a) + m with m computed from x + a, are two residuals."""
    on = Written()
    x = on.step({on.image: 1})
    a = on.step({x: 1})
    first = on.sum((x, 1), (a, 1))
    m = on.step({first: 1})
    assert [term.value for term in terms_of([(first, 1), (m, 1)])[0]] == [first, m]
    assert stream_of([first, m]) is first
    assert stream_of([x, a]) is x
    assert stream_of([a, on.step({x: 1})]) is None


def test_multiples_of_one_value_are_one_term():
    on = Written()
    x = on.step({on.image: 1})
    twice, f = on.step({x: 2}), on.step({x: 1})
    twice.base, twice.times, twice.rearranges = x.base, 2.0, x.rearranges
    whole = on.sum((twice, 1), (f, 1))
    assert [(term.value, term.factor) for term in whole.made_by.terms] == [(twice, 1), (f, 1)]
    less = on.sum((whole, 3), (x, -1))
    assert [(term.value, term.factor) for term in less.made_by.terms] == [(twice, 2.5), (f, 3)]
    alone = on.sum((whole, 1), (x, -2))  # nothing is left of x
    assert [term.value for term in alone.made_by.terms] == [f]
    scaled = on.sum((x, torch.ones(3)), (twice, 1), (f, 1))
    assert [term.value for term in scaled.made_by.terms] == [x, f]
    twice.mass = lambda: torch.ones(3)  # by constants that may be 0 where x is not
    assert [term.value for term in on.sum((x, 1), (twice, 1)).made_by.terms] == [x, twice]


def over(value, dim):
    value.dim = dim
    return value.softmax_over


def test_where_a_dimension_went():
    on = Written()
    turned = on.tape.value((3, 2), [on.image])
    on.tape.append(Step("t", [on.image], [turned], None, axes=lambda axes: axes[0][::-1]))
    for before, after in ((0, 1), (1, 0)):
        turned.softmax_over = followed(turned, over(on.image, before))
        assert turned.dim == after
    merged = on.tape.value((6,), [on.image])
    on.tape.append(Step("view", [on.image], [merged], None, axes=lambda of: ((*of[0][0], *of[0][1]),)))
    merged.softmax_over = followed(merged, over(on.image, 0))
    assert merged.softmax_over is not None
    assert merged.dim is None  # it also has other elements


def test_a_dimension_that_counts_parts():
    on = Written()
    value = on.tape.value((4, 6), [on.image])
    assert not value.counts(1)
    for count, stacks in ((3, False), (6, True)):
        value.parts, value.along = [on.image] * count, marked((4, 6), 1, count)
        assert value.counts(1)
        assert not value.counts(0)
        assert value.stacks(1) == stacks


def test_the_dimension_that_a_sum_lacks():
    assert reduced((2, 3, 4), (2, 3, 1)) == 2
    assert reduced((2, 3, 4), (3, 4)) == 0
    assert reduced((2, 3, 4), (1, 3, 1)) is None
    assert reduced((2, 3, 1), (2, 3, 1)) is None

"""Loaders of every kind: what they do to batches is kept, and reading leaves them unchanged."""

import multiprocessing
import random
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from lightning.fabric.wrappers import _FabricDataLoader
from timm.data.loader import MultiEpochsDataLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
)

from tests.wrapped_loaders import (
    DATA,
    Batches,
    Closing,
    Delegating,
    Doubling,
    ItsOwnIterator,
    ItsOwnMethod,
    Library,
    Made,
    Reading,
    Several,
    Slots,
    Stream,
    Wrapper,
    doubled,
)
from vitx import VitxError
from vitx.watch.images import Source
from vitx.watch.readers import keys_of

PLACES = [3, 9, 16]


def prepared(loader):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    return accelerate.Accelerator(cpu=True).prepare(loader)


def loader(kind=DataLoader, **options):
    return kind(DATA, 4, **({"num_workers": 1, "persistent_workers": True} | options))


KEYED = {
    "a subclass": lambda: loader(Doubling),
    "a wrapper": lambda: Wrapper(loader()),
    "wrappers in wrappers": lambda: Wrapper(_FabricDataLoader(prepared(loader()))),
    "one of a wrapper": lambda: Wrapper(loader(MultiEpochsDataLoader)),
    "delegating": lambda: Delegating(loader()),
    "its own iterator": lambda: ItsOwnIterator(loader()),
    "one that has begun": lambda: Reading(loader()),
    "one with an end": lambda: Closing(loader()),
    "in a collection": lambda: Several(loader()),
    "with a method of its own": lambda: ItsOwnMethod(loader()),
}


def state(one, deep=0):
    """Return everything that a loader holds, as nested plain values."""
    if isinstance(one, torch.Generator):
        return one.get_state().tolist()
    if isinstance(one, (list, tuple)):
        return [state(part, deep) for part in one]
    if isinstance(one, dict):
        return {name: state(part, deep) for name, part in one.items()}
    if not hasattr(one, "__dict__") or deep > 4 or isinstance(one, (torch.Tensor, type, Iterator)):
        return repr(one)
    return {name: state(part, deep + 1) for name, part in vars(one).items()}


def values(batches):
    return torch.cat([torch.as_tensor(batch).flatten() for batch in batches]).tolist()


def read(loader):
    """Read a few samples; assert that the loader is unchanged and that no worker is left behind."""
    before, workers = state(loader), multiprocessing.active_children()
    source = Source(loader)
    with source.fetch(source.keys and PLACES) as batches:
        found = list(batches)
    assert state(loader) == before
    assert set(multiprocessing.active_children()) <= set(workers)
    return found


@pytest.mark.parametrize("make", KEYED.values(), ids=KEYED)
def test_chosen_samples_through_loaders_of_every_kind(make):
    one = make()
    assert values(read(one)) == [6, 18, 32]
    begun = iter(one)
    next(begun)
    assert values(read(one)) == [6, 18, 32], "while the loop reads it"


UNKEYED = {
    "another library's": Library,
    "known by a function": lambda: Made(partial(doubled, loader())),
    "shuffled, and known by a function": lambda: Made(partial(doubled, loader(shuffle=True))),
    "in slots": lambda: Slots(loader()),
    "whole batches": lambda: Wrapper(DataLoader(Batches(), None, sampler=[0, 1, 2, 3, 4])),
}


@pytest.mark.parametrize("make", UNKEYED.values(), ids=UNKEYED)
def test_all_in_their_order_where_samples_have_no_keys(make):
    assert values(read(make())) == list(range(0, 40, 2))


@pytest.mark.parametrize("make", UNKEYED.values(), ids=UNKEYED)
def test_batches_evenly_spaced_over_all(make):
    one = make()
    before = state(one)
    assert Source(one).evenly(2) == [1.25, 3.75]
    assert state(one) == before


def test_the_end_of_a_stream_is_not_known():
    assert Source(Wrapper(DataLoader(Stream(), 4))).evenly(2) is None


def test_several_loaders_in_one_of_a_kind_of_its_own():
    both = Several(loader(), DataLoader(DATA, 10))
    assert [len(batch) for batch in read(both)] == [4] * 5 + [10] * 2


@pytest.mark.parametrize("kind", [Wrapper, lambda inner: Made(partial(doubled, inner))])
def test_a_stream_is_read_from_its_start(kind):
    one = kind(DataLoader(Stream(), 4))
    before = state(one)
    with Source(one).fetch(None) as batches:
        assert next(batches).flatten().tolist() == [0, 2, 4, 6]
    assert state(one) == before
    assert Source(one).keys is None


def test_the_users_loader_is_read_as_ever_afterwards():
    one = Made(partial(doubled, loader()))
    begin = DataLoader.__iter__
    with pytest.raises(ZeroDivisionError), Source(one).fetch(None) as batches:
        [1 / 0 for _ in batches]
    assert DataLoader.__iter__ is begin
    assert sum(map(len, one)) == 20


def test_what_can_be_read_only_once_is_refused():
    held = Wrapper(loader())
    held.left = (batch for batch in [])
    for one, sentence in (
        (held, "holds a generator"),
        (ItsOwnIterator(Library()), "is a ItsOwnIterator"),
        (Wrapper(ItsOwnIterator(Library())), "is a ItsOwnIterator"),
    ):
        with pytest.raises(VitxError, match=f"{sentence}, which can be read only once: give images"):
            Source(one)


def test_draws_of_the_data_set_are_put_back():
    """Every run gets the same images, although the data set draws from generators of its own."""

    class Drawing(Dataset):
        def __init__(self, seed):
            self.transforms = [{"draws": np.random.default_rng(seed)}, random.Random(seed)]

        def __len__(self):
            return 8

        def __getitem__(self, index):
            return self.transforms[0]["draws"].random() + self.transforms[1].random()

    found = []
    for seed in (1, 2):
        data = Drawing(seed)
        with Source(DataLoader(data, 4)).fetch([0, 1]) as batches:
            found += [batch.tolist() for batch in batches]
        assert data[0] == Drawing(seed)[0]
    assert found[0] == found[1]


AT_THE_TOP = np.random.default_rng(3)


class DrawingAtTheTop(Dataset):
    """A data set that draws from a generator of its module."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return AT_THE_TOP.random()


def drawn_at_the_top(batch):
    return torch.tensor(batch) + AT_THE_TOP.random()


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(DrawingAtTheTop(), 4),
        lambda: DataLoader(NUMBERS, 4, collate_fn=drawn_at_the_top),
    ],
    ids=["by the data set", "by a collate function"],
)
def test_draws_from_a_generator_of_the_module_are_put_back(make):
    before, found = AT_THE_TOP.bit_generator.state, []
    for _ in range(2):
        with Source(make()).fetch([0, 1]) as batches:
            found += [batch.tolist() for batch in batches]
        assert AT_THE_TOP.bit_generator.state == before
        AT_THE_TOP.random()
        before = AT_THE_TOP.bit_generator.state
    assert found[0] == found[1]


NUMBERS = list(range(10))


def test_a_generator_is_left_as_it_was():
    sampler = RandomSampler(NUMBERS, generator=torch.Generator().manual_seed(3))
    before = sampler.generator.get_state()
    assert keys_of(DataLoader(NUMBERS, sampler=sampler)) == NUMBERS
    assert torch.equal(sampler.generator.get_state(), before)


class Ours(BatchSampler):
    def __iter__(self):
        yield from ([9, 1], [3])


@pytest.mark.parametrize(
    ("loader", "keys"),
    [
        (lambda: MultiEpochsDataLoader(NUMBERS, 4), NUMBERS),
        (lambda: MultiEpochsDataLoader(NUMBERS, batch_sampler=Ours([], 2, False)), [1, 3, 9]),
        (lambda: DataLoader(NUMBERS, sampler=DistributedSampler(NUMBERS, 2, 1)), NUMBERS),
        (lambda: DataLoader(NUMBERS, None, sampler=[7, 2]), [2, 7]),
        (lambda: DataLoader({"a": 1, "b": 2}, sampler=["b", "a"]), ["b", "a"]),
    ],
    ids=["repeated for ever", "the same, of one's own", "a share", "of batches", "names"],
)
def test_the_keys_of_all(loader, keys):
    assert keys_of(loader()) == keys

"""What a loader asks its data set for, in whatever kind of sampler."""

import pytest
import torch
from timm.data.loader import MultiEpochsDataLoader
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler

from vitx.watch.samplers import keys_of

DATA = list(range(10))


def test_a_generator_is_left_as_it_was():
    sampler = RandomSampler(DATA, generator=torch.Generator().manual_seed(3))
    before = sampler.generator.get_state()
    assert keys_of(DataLoader(DATA, sampler=sampler)) == DATA
    assert torch.equal(sampler.generator.get_state(), before)


class Ours(BatchSampler):
    def __iter__(self):
        yield from ([9, 1], [3])


@pytest.mark.parametrize(
    ("loader", "keys"),
    [
        (lambda: MultiEpochsDataLoader(DATA, 4), DATA),
        (lambda: MultiEpochsDataLoader(DATA, batch_sampler=Ours([], 2, False)), [1, 3, 9]),
        (lambda: DataLoader(DATA, sampler=DistributedSampler(DATA, 2, 1)), DATA),
        (lambda: DataLoader(DATA, None, sampler=[7, 2]), [2, 7]),
        (lambda: DataLoader({"a": 1, "b": 2}, sampler=["b", "a"]), ["b", "a"]),
    ],
    ids=["repeated for ever", "the same, of one's own", "a share", "of batches", "names"],
)
def test_the_keys_of_all(loader, keys):
    assert keys_of(loader()) == keys

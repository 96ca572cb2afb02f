"""The images that are watched are those that the loader reads: of streams, samplers, several loaders."""

import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchvision import transforms

from tests.chosen import Lenient, Numbered, Stream, Watch, chosen, numbers
from tests.lightning_models import IMAGE, fit, samples
from vitx import VitxError
from vitx.watch import Settings


@pytest.mark.parametrize(
    ("loaders", "place"),
    [
        ([DataLoader(samples(4)), DataLoader(Numbered())], 1),
        ({"clean": DataLoader(samples(4)), "marked": DataLoader(Numbered())}, "marked"),
        ({"clean": DataLoader(samples(4)), "marked": DataLoader(Numbered())}, 1),
    ],
)
def test_one_of_several_validation_loaders(loaders, place):
    assert numbers(chosen(loaders, dataloader_idx=place)) == [2, 7, 12, 17]


def test_no_such_loader():
    with pytest.raises(VitxError, match="no validation loader 'clean': there are 0"):
        chosen(DataLoader(Numbered()), dataloader_idx="clean")


def test_a_loader_that_is_none_of_torchs():
    """For example, one of WebDataset: anything that yields batches more than once."""
    batches = [[torch.full((2, 3, IMAGE, IMAGE), float(number))] for number in range(9)]
    found = chosen({"some": batches}, dataloader_idx="some", num_images=3)
    assert numbers(found) == [1, 3, 5, 7]
    assert len(found.shown) == 3
    assert found.places is None


def test_a_loader_that_can_be_read_only_once():
    with pytest.raises(VitxError, match="the validation loader is a generator, which can be read only once"):
        chosen({"some": (batch for batch in [])}, dataloader_idx="some")


class Lazy(Numbered):
    """A data set that opens its file when the first image is read, as those with one large file do."""

    opened = None

    def __getitem__(self, index):
        self.opened = self.opened or object()
        return super().__getitem__(index)


def test_a_data_set_that_is_read_in_workers_is_not_opened_here():
    data = Lazy()
    watch = Watch(Settings(num_images=2))
    loaders = DataLoader(samples(4), 4), DataLoader(data, num_workers=2, multiprocessing_context="fork")
    few = {"max_steps": 1, "num_sanity_val_steps": 0, "limit_val_batches": 1, "val_check_interval": 1}
    fit(watch, module=Lenient, data=loaders, **few)
    assert numbers(watch.found) == [5, 15]
    assert data.opened is None


@pytest.mark.parametrize(
    ("stream", "expected"), [({"images": Stream()}, [0, 1, 2]), ({}, [0, 1, 2])], ids=["given", "validation"]
)
def test_a_stream_gives_its_first_images(stream, expected):
    found = chosen(DataLoader(Stream(), batch_size=2), num_measured=3, num_images=3, **stream)
    assert numbers(found) == expected
    assert found.places is None


class Pipeline:
    """A loader that is not a DataLoader and holds the transforms of its images, like WebDataset's."""

    def __init__(self):
        self.pipeline = [DataLoader(Stream(), batch_size=2), transforms.Normalize(0.25, 0.5)]

    def __iter__(self):
        return iter(self.pipeline[0])


def test_a_loader_of_another_library_tells_how_it_normalizes():
    found = chosen(Pipeline(), num_images=3, num_measured=3)
    assert numbers(found) == [0, 1, 2]
    assert found.source == "Stream"
    assert found.scales == (((0.25,), (0.5,)),)


def test_a_data_set_of_whole_batches():
    found = chosen(DataLoader(Stream(batch=3), batch_size=None))
    assert numbers(found) == [0, 0, 0, 1]


@pytest.mark.parametrize("wanted", [{"images": [3]}, {"per_class": True}])
def test_a_stream_has_no_places(wanted):
    with pytest.raises(VitxError, match="stream"):
        chosen(DataLoader(Stream(), batch_size=2), **wanted)


class Boxes(Sampler):
    """A sampler that yields keys other than numbers, like those of torchgeo."""

    def __iter__(self):
        return iter([(5, 6), (1, 2), (9, 10)])


class ByKey(Numbered):
    def __getitem__(self, key):
        return super().__getitem__(key[0])


class Backwards(BatchSampler):
    """A user-defined batch sampler, which counts how often it is iterated over."""

    def __init__(self):
        self.asked = 0

    def __iter__(self):
        self.asked += 1
        return iter([[3, 2], [1]])

    def __len__(self):
        return 2


def seeded(kind, *arguments, **options):
    return kind(*arguments, generator=torch.Generator().manual_seed(3), **options)


class TestSamplers:
    """The images that are watched are those that the loader reads."""

    @pytest.mark.parametrize(
        ("sampler", "among"),
        [
            (lambda: SubsetRandomSampler([4, 8, 15, 16]), {4, 8, 15, 16}),
            (lambda: seeded(SubsetRandomSampler, [4, 8, 15, 16]), {4, 8, 15, 16}),
            (lambda: seeded(RandomSampler, range(20)), set(range(20))),
            (lambda: seeded(WeightedRandomSampler, [0.0] * 10 + [1.0] * 10, 30), set(range(10, 20))),
        ],
    )
    def test_the_samplers_own_places(self, sampler, among):
        first, again = (chosen(DataLoader(Numbered(), sampler=sampler())) for _ in range(2))
        assert set(first.places) <= among
        assert numbers(first) == list(first.places)
        assert first.places == again.places == tuple(sorted(first.places))

    def test_a_sampler_of_batches(self):
        sampler = Backwards()
        found = chosen(DataLoader(Numbered(), batch_sampler=sampler))
        assert found.places == (1, 2, 3)
        # Lightning iterates once, for the validation of fast_dev_run.
        assert sampler.asked == 1

    def test_keys_that_are_no_numbers(self):
        found = chosen(DataLoader(ByKey(), sampler=Boxes()))
        assert numbers(found) == [5, 1, 9]
        assert found.places == (0, 1, 2)

    def test_one_of_each_class_among_them(self):
        found = chosen(DataLoader(Numbered(), sampler=SubsetRandomSampler([7, 8, 16, 17])), per_class=True)
        assert [number // 5 for number in numbers(found)] == [1, 3]
        assert set(found.places) <= {7, 8, 16, 17}


class TestCombined:
    """Several loaders, combined by Lightning."""

    def loaders(self):
        return {"some": DataLoader(Numbered(4), 3), "more": DataLoader(Numbered(9), 2)}

    def test_one_after_the_other(self):
        both = CombinedLoader(self.loaders(), "sequential")
        assert numbers(chosen(both, dataloader_idx="more")) == [1, 3, 5, 7]

    @pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
    def test_a_batch_of_all(self, mode):
        both = CombinedLoader(self.loaders(), mode)
        found = chosen(both, batch_transform=lambda batch: batch["more"])
        assert numbers(found) == [0, 1, 2, 3]
        assert found.places is None
        with pytest.raises(VitxError, match="have no indices"):
            chosen(both, images=[0])

    def test_streams_from_their_start(self):
        both = CombinedLoader((DataLoader(Stream(), 2), DataLoader(Numbered(9), 2)), "max_size_cycle")
        found = chosen(both, batch_transform=lambda batch: batch[0])
        assert numbers(found) == [0, 1, 2, 3]

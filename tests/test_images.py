import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from PIL import Image
from timm import create_model
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchvision import transforms

from tests.lightning_models import IMAGE, SmallClassifier, fit, samples
from tests.played_runs import open_run
from vitx import VitxError
from vitx.callbacks import RolloutCallback
from vitx.callbacks.lightning import LightningHost
from vitx.watch import Settings
from vitx.watch.images import Selection


class Watch(pl.Callback):
    """A callback that chooses samples when RolloutCallback would."""

    def __init__(self, settings, model=None, before=None):
        self.settings, self.model, self.before = settings, model, before

    def on_train_start(self, trainer, pl_module):
        host = LightningHost(trainer, pl_module)
        host.model = self.model or pl_module
        self.found = Selection(self.settings, host).choose(self.before)


class Lenient(SmallClassifier):
    """A classifier that accepts validation batches of every kind."""

    def validation_step(self, *_):
        pass


def chosen(validation=None, module=Lenient, model=None, before=None, num_measured=4, **selection):
    count = selection.pop("num_images", 4)
    watch = Watch(Settings(num_images=(count, num_measured), **selection), model, before)
    fit(watch, module=module, data=(DataLoader(samples(4), batch_size=4), validation), fast_dev_run=True)
    return watch.found


class Numbered(Dataset):
    """Images that are filled with their own index."""

    classes = ("cat", "dog", "owl")
    label_name = "label"

    def __init__(self, length=20):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"image": torch.full((3, IMAGE, IMAGE), float(index)), self.label_name: index // 5}


def numbers(found):
    return found.images[:, 0, 0, 0].tolist()


def test_evenly_spaced_from_the_validation_set_with_labels_and_masks():
    data = samples(20, seed=3)
    found = chosen(validation=DataLoader(data, batch_size=7))
    assert found.places == (2, 7, 12, 17)
    assert torch.equal(found.images, data.tensors[0][list(found.places)])
    assert found.labels.tolist() == [2, 1, 0, 2]
    assert torch.equal(found.masks, data.tensors[2][list(found.places)])


def test_all_of_a_small_set_and_none_without_one():
    assert chosen(validation=DataLoader(samples(3))).places == (0, 1, 2)
    with pytest.raises(VitxError, match="no validation set"):
        chosen()


def test_the_loaders_own_collate_and_the_sets_own_names():
    def collate(items):
        return {
            "pixel_values": torch.stack([item["image"] for item in items]),
            "labels": torch.tensor([item["label"] for item in items]),
        }

    loader = DataLoader(Subset(Numbered(), [19, 14, 9, 4]), collate_fn=collate)
    found = chosen(loader, num_images=2, num_measured=2)
    assert found.class_names == ("cat", "dog", "owl")
    assert numbers(found) == [14, 4]
    assert found.labels.tolist() == [2, 0]


def test_named_places_are_all_shown_in_their_order():
    found = chosen(DataLoader(Numbered()), images=[7, 3, 19, 0, 3], num_images=2)
    assert numbers(found) == [7, 3, 19, 0, 3]
    assert found.shown == (0, 1, 2, 3, 4)


def test_more_can_be_measured_than_shown():
    found = chosen(DataLoader(Numbered()), num_images=2, num_measured=10)
    assert len(found) == 10
    assert found.shown == (2, 7)


def test_one_image_of_each_class():
    found = chosen(DataLoader(Numbered()), per_class=True)
    assert found.labels.tolist() == [0, 1, 2, 3]


def test_places_chosen_before_a_resume_are_kept_where_they_fit():
    loader = DataLoader(Numbered())
    assert chosen(loader, before=(1, 2, 3, 19)).places == (1, 2, 3, 19)
    for other in ((1, 2, 3, 20), (1, 2, 3)):  # the data set has shrunk, or more images are requested
        assert chosen(loader, before=other).places == (2, 7, 12, 17)


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


def test_a_batch_transform_where_nothing_fits():
    class Odd(Numbered):
        label_name = "kind"

        def __getitem__(self, index):
            return {"data": [super().__getitem__(index)]}

    def transform(batch):
        return batch["data"][0]["image"], batch["data"][0]["kind"]

    assert chosen(DataLoader(Odd())).labels is None
    found = chosen(DataLoader(Odd()), batch_transform=transform)
    assert numbers(found) == [2, 7, 12, 17]
    assert found.labels.tolist() == [0, 1, 2, 3]


BOXES = torch.zeros(20, 4)
BOXES[:, 2:] = torch.arange(20.0)[:, None]


@pytest.mark.parametrize("boxes", [BOXES, BOXES[[2, 7, 12, 17]]], ids=["of all", "of those chosen"])
def test_given_boxes(boxes):
    found = chosen(DataLoader(Numbered()), boxes=boxes)
    assert found.masks.sum((1, 2)).tolist() == [4, 49, 144, 289]


def test_given_masks_come_before_those_of_the_data_set():
    masks = torch.ones(4, 2, 2)
    assert chosen(DataLoader(samples(20)), boxes=masks).masks.all()
    with pytest.raises(VitxError, match="boxes has 3 entries for 4 images"):
        chosen(DataLoader(samples(20)), boxes=masks[:3])


def test_images_are_prepared_as_the_module_prepares_its_batches():
    class OnDevice(Lenient):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            assert self.trainer.world_size == 1
            return {**batch, "image": batch["image"] + 0.5} if isinstance(batch, dict) else batch

    assert numbers(chosen(DataLoader(Numbered()), OnDevice)) == [2.5, 7.5, 12.5, 17.5]


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


class Stream(IterableDataset):
    def __init__(self, batch=None):
        self.batch = batch

    def __iter__(self):
        for value in range(100):
            shape = (3, IMAGE, IMAGE) if self.batch is None else (self.batch, 3, IMAGE, IMAGE)
            yield torch.full(shape, float(value)), torch.tensor([0] * (self.batch or 1))


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


def test_random_transforms_give_the_same_images_in_every_run(tmp_path):
    class Noisy(Numbered):
        def __getitem__(self, index):
            return {"image": torch.rand(3, IMAGE, IMAGE), "label": 0}

    watched = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        callback = RolloutCallback(images=Noisy(), on_error="raise")
        fit(callback, default_root_dir=tmp_path / str(seed), max_epochs=1)
        watched.append(open_run(tmp_path / str(seed)).pixels)
    assert np.array_equal(*watched)


def test_files_go_through_the_models_own_transform(tmp_path):
    path = tmp_path / "gray.png"
    Image.new("RGB", (300, 200), (128, 128, 128)).save(path)
    model = create_model("deit_tiny_patch16_224", depth=1)
    found = chosen(images=[path, path], model=model)
    assert found.images.shape == (2, 3, 224, 224)
    mean, std = torch.tensor(model.pretrained_cfg["mean"]), torch.tensor(model.pretrained_cfg["std"])
    expected = (128 / 255 - mean) / std
    assert torch.allclose(found.images[0].mean((1, 2)), expected, atol=1e-5)


def test_what_holds_no_images_is_refused(tmp_path):
    (tmp_path / "note.jpg").write_text("no picture")
    model = create_model("deit_tiny_patch16_224", depth=1)
    cases = [
        (42, "images must be a tensor, a data set"),
        ([tmp_path / "note.jpg"], "note.jpg"),
        ([tmp_path / "absent.jpg"], "absent.jpg"),
        ([0, 20], "the validation set has 20 images, 0 to 19: there is no 20"),
        ([], "is empty"),
        (torch.rand(3, IMAGE, IMAGE), "no images"),
    ]
    for images, sentence in cases:
        with pytest.raises(VitxError, match=sentence):
            chosen(DataLoader(Numbered()), images=images, model=model)


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

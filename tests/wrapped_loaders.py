"""Loaders of other kinds than torch's, most of which wrap one of torch and double its numbers."""

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

DATA = TensorDataset(torch.arange(20.0)[:, None])


def doubled(batches):
    return (batch[0] * 2 for batch in batches)


class Doubling(DataLoader):
    def __iter__(self):
        yield from doubled(super().__iter__())


class Wrapper:
    """A wrapper with state of its own: counters and a random generator."""

    def __init__(self, inner):
        self.anything, self.passes = inner, 0
        self.draws, self.seen = torch.Generator().manual_seed(3), []

    def __iter__(self):
        self.passes += 1
        for batch in self.anything:
            self.seen.append(len(batch))
            torch.rand(1, generator=self.draws)
            yield batch[0] * 2

    def __len__(self):
        return len(self.anything)


class Delegating(Wrapper):
    def __getattr__(self, name):
        return getattr(self.anything, name)


class ItsOwnIterator(Wrapper):
    def __iter__(self):
        self.batches = iter(self.anything)
        return self

    def __next__(self):
        return next(self.batches)[0] * 2


class Reading(Wrapper):
    """A wrapper that already holds an iterator of its loader, and the number of its batches."""

    def __init__(self, inner):
        super().__init__(inner)
        self.batches, self.length = iter(inner), len(inner)

    def __iter__(self):
        for _ in range(self.length):
            yield next(self.batches)[0] * 2


class ItsOwnMethod(Wrapper):
    def __init__(self, inner):
        super().__init__(inner)
        self.read = self.batches

    def batches(self):
        yield from super().__iter__()

    def __iter__(self):
        return self.read()


class Slots:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner

    def __iter__(self):
        return doubled(self.inner)

    def __len__(self):
        return len(self.inner)


class Closing(Wrapper):
    def __del__(self):
        self.seen.append("closed")


class Made:
    """A wrapper that reaches its loader only through a function."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return iter(self.make())

    def __len__(self):
        return 5


class Several:
    def __init__(self, *loaders):
        self.loaders = {"all": list(loaders)}

    def __iter__(self):
        for loader in self.loaders["all"]:
            yield from doubled(loader)

    def __len__(self):
        return sum(map(len, self.loaders["all"]))


class Batches(Dataset):
    def __getitem__(self, index):
        return DATA[4 * index : 4 * index + 4]

    def __len__(self):
        return 5


class Stream(IterableDataset):
    def __iter__(self):
        yield from DATA


class Library(Wrapper):
    """A loader without a DataLoader inside, as those of DALI and FFCV."""

    def __init__(self):
        super().__init__(list(DATA.tensors[0].view(5, 1, 4, 1)))

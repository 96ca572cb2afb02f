"""Memory, handles, threads and hooks do not grow from firing to firing."""

import gc
import os
import pickle
import threading
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.nn.modules import module as global_hooks
from torch.utils.data import DataLoader

from tests.lightning_models import SmallClassifier, fit, samples
from tests.processes import run_together
from vitx.callbacks import RolloutCallback

EPOCHS, STEPS = 13, 10  # with a firing after each step
WARM = 2  # epochs until all objects that are made only once exist, including those of counting
# In 100 firings, a cache of Python or pytest may fill, and a step above 255 takes two bytes.
FEW = {"objects": 50, "bytes in the callback": 2}
MAY_GROW = 2  # MB of memory in 100 firings; 0.2 is usual, with or without the callback
LIGHTNINGS = {"log", "log_dict"}  # attributes of every callback that lead to the module
PROC = Path("/proc/self")


def fail(logits):
    raise RuntimeError("on purpose")


def hooks(owner):
    return sum(len(value or ()) for name, value in vars(owner).items() if name.endswith("hooks"))


def count(module, callback):
    """Count what could pile up, except for objects from before `gc.freeze`, here or in conftest.py."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [thing for thing in objects if issubclass(type(thing), torch.Tensor)]
    parameters = [p._backward_hooks or () for p in module.parameters()]
    own = {name: value for name, value in vars(callback).items() if name not in LIGHTNINGS}
    return {
        "open files": len(list((PROC / "fd").iterdir())),
        "threads": threading.active_count(),
        "objects": len(objects),
        "tensors": len(tensors),
        "bytes in tensors": sum(tensor.nbytes for tensor in tensors),
        "hooks": sum(map(hooks, (*module.modules(), global_hooks))) + sum(map(len, parameters)),
        "warning filters": len(warnings.filters),
        "modes": torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack(),
        "bytes in the callback": len(pickle.dumps(own)),
        "bytes in its state": len(pickle.dumps(callback.state_dict())),
    }


def memory():
    return int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watcher(pl.Callback):
    """A callback that counts in the middle of every epoch."""

    def __init__(self, callback):
        self.callback = callback
        self.counts, self.memory = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == STEPS // 2:
            self.counts.append(count(pl_module, self.callback))
            self.memory.append(memory())


needs_proc = pytest.mark.skipif(not (PROC / "statm").exists(), reason="no /proc tells open files and memory")


FIRINGS = {
    "firings that work": ({"on_error": "raise"}, EPOCHS * STEPS, 0),
    "firings that fail": ({"target": fail, "methods": ["grad_rollout"]}, 0, 1),
}


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("kind", FIRINGS)
def test_nothing_grows_in_100_firings(kind, tmp_path):
    """Run in a process of its own: free memory left in the heap by other tests would affect the numbers."""
    run_together(1, fires_100_times, tmp_path, kind)


def fires_100_times(tmp_path, kind):
    options, written, said = FIRINGS[kind]
    gc.collect()
    gc.freeze()
    callback = RolloutCallback(num_images=1, every_n_steps=1, **options)
    watcher = Watcher(callback)
    logger = TensorBoardLogger(tmp_path)
    data = [DataLoader(samples(size), batch_size=4) for size in (4 * STEPS, 4)]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message="RolloutCallback")
        fit(callback, watcher, data=data, max_epochs=EPOCHS, logger=logger)

    assert len(list(tmp_path.rglob("firing-*.npz"))) == written
    assert len(warned) == said, [str(warning.message) for warning in warned]
    first, *others = watcher.counts[WARM:]
    assert len(others) * STEPS == 100
    grown = {
        name: [c[name] for c in (first, *others)]
        for name in first
        if max(c[name] for c in others) > first[name] + FEW.get(name, 0)
    }
    assert not grown, str(grown)
    assert max(watcher.memory[WARM:]) - watcher.memory[WARM] < MAY_GROW, watcher.memory


LEAKS = [
    ("hooks", lambda module, _: module.head.register_forward_hook(fail)),
    ("hooks", lambda module, _: module.head.weight.register_hook(fail)),
    ("open files", lambda *_: (PROC / "statm").open()),
    ("bytes in tensors", lambda *_: torch.zeros(3)),
    ("bytes in the callback", lambda _, callback: callback._attempts._said.add("more")),
    ("warning filters", lambda *_: warnings.filterwarnings("ignore", "more")),
    ("objects", lambda *_: []),
]


@needs_proc
@pytest.mark.parametrize(("grown", "leak"), LEAKS, ids=[grown for grown, _ in LEAKS])
def test_the_count_would_notice(grown, leak):
    module, callback = SmallClassifier(), RolloutCallback()
    before = count(module, callback)
    kept = leak(module, callback)
    assert count(module, callback)[grown] > before[grown]
    del kept

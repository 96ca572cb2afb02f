"""Setup shared by all tests: one thread, a fixed seed, and the real weights and images if available."""

import gc
import os
import random
import tempfile
from pathlib import Path
from shutil import copyfile

os.environ["HF_HUB_OFFLINE"] = "1"  # set before its client is imported

import pytest
import torch
from torch.utils.data import _utils

from tests.browsers import CHROMIUM, OFFLINE, WITHOUT, playwright
from tests.class_folders import write_classes
from vitx.attribution import find_method, register
from vitx.attribution.registry import _METHODS

# Seconds that a loader waits for its processes before it ends them; 5 by default. They do not end by
# themselves if garbage collection takes the loader's queues before the loader, as it may in a cycle.
_utils.MP_STATUS_CHECK_INTERVAL = 0.5


def pytest_xdist_auto_num_workers(config):
    """Run the whole suite on all cores, but selected tests in one process, which starts sooner."""
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    return None if everything else 0  # None lets xdist choose: one worker per core


def pytest_sessionfinish():
    """Keep the store that MLflow opens when its process ends out of the working directory."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{tempfile.mkdtemp()}/mlflow.db"


@pytest.fixture(autouse=True)
def _reproducible():
    """Use fixed seeds and one thread: tiny models need no more, and sums would depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)  # used by timm's augmentation
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _few_objects_to_look_through():
    """Freeze existing objects, which libraries that run the garbage collector would scan each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _empty_store(tmp_path_factory):
    """Return a store of MLflow without runs, for tests to copy: a new one takes a second to make."""
    library = pytest.importorskip("mlflow", reason="mlflow is not installed")
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    library.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow(tmp_path, monkeypatch, _empty_store):
    """Yield MLflow with its store in the folder of the test, which leaves no active run or experiment."""
    library = pytest.importorskip("mlflow")
    copyfile(_empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")  # the default one, like the next
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
    library.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield library
    library.end_run()
    library.set_tracking_uri(None)


@pytest.fixture(scope="session")
def assets():
    """Return the folder with DeiT-Tiny's weights and ImageNet validation images; skip if it is missing."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "assets"
    folder = Path(os.environ.get("VITX_ASSETS", beside))
    if not (folder / "deit_tiny_patch16_224.safetensors").is_file():
        pytest.skip("no real weights: set VITX_ASSETS to a folder with deit_tiny_patch16_224.safetensors")
    return folder


class Failing:
    """A method that fails the first few times, and then returns the map of attention rollout.

    Attributes:
        calls: number of calls so far.
        times: number of calls that fail; None if all fail.
    """

    def __init__(self):
        self.calls, self.times = 0, None

    def __call__(self, back):
        self.calls += 1
        if self.times is None or self.calls <= self.times:
            raise RuntimeError("no map today")
        return find_method("rollout").find(back)


@pytest.fixture
def failing():
    """Register a failing method for the duration of the test."""
    method = Failing()
    register("failing", title="failing method")(method)
    yield method
    del _METHODS["failing"]


@pytest.fixture
def pets(tmp_path):
    """Return a folder with five cats and ten dogs."""
    return write_classes(tmp_path / "pets", cat=5, dog=10)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Return a file with the weights of the small model for `vitx explain`."""
    from tests.explain_command import save_weights  # imports timm

    return save_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture
def folder(tmp_path):
    """Return a folder with five pictures and two files that are none."""
    from tests.explain_command import write_photos

    return write_photos(tmp_path / "photos")


@pytest.fixture(scope="module")
def browser():
    """Yield a headless browser; skip if none is installed."""
    if CHROMIUM is None:
        pytest.skip(WITHOUT)
    with (
        playwright().sync_playwright() as engine,
        engine.chromium.launch(executable_path=CHROMIUM, args=OFFLINE) as started,
    ):
        yield started

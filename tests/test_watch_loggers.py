"""The places that a watch writes to."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.loops import Net, accelerator, held_out, watching
from tests.run_folders import events, kept, shown
from tests.weights_and_biases import end, history


def test_what_others_wrote_in_the_same_folder_stays(tmp_path):
    with SummaryWriter(tmp_path) as own:
        own.add_scalar("loss", 1.0, 7)
    watching(tmp_path)(0)
    assert [point.step for point in events(tmp_path).Scalars("loss")] == [7]


class Own:
    """A custom logger."""

    def __init__(self):
        self.numbers, self.pictures = [], []

    def log_metrics(self, metrics, step):
        self.numbers.append((step, sorted(metrics)[0]))

    def log_image(self, key, images, step):
        self.pictures.append((step, key))


def test_several_places_to_write_to(tmp_path):
    writer, own = SummaryWriter(tmp_path / "run"), Own()
    watch = watching(logger=[writer, own])
    watch(3)
    writer.close()
    assert shown(tmp_path / "run") == [3]
    assert own.pictures == [(3, "vitx/maps")]
    assert own.numbers == [(3, "vitx/grad_rollout/energy")]
    assert kept(tmp_path) == tmp_path / "run" / "vitx", "the folder is that of the writer"


def test_the_trackers_of_an_accelerator(tmp_path):
    tracking = accelerator(log_with="tensorboard", project_dir=tmp_path)
    tracking.init_trackers("run")
    net, prepared = tracking.prepare(Net(), held_out())
    watching(tmp_path, net, prepared, logger=tracking)(2)
    tracking.end_training()
    assert shown(tmp_path / "run") == [2]


def test_a_run_of_weights_and_biases(tmp_path):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    quiet = wandb.Settings(console="off", silent=True)
    run = wandb.init(mode="offline", dir=tmp_path, settings=quiet)
    watch = watching(tmp_path, logger=run)
    for step in (4, 9):
        run.log({"loss": 1.0})
        watch(step)
    end(wandb)
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    rows = history(folder)
    for name in ("vitx/rollout/entropy", "vitx/maps/height"):
        assert [row["vitx/step"] for row in rows if name in row] == [4, 9]
    assert len([row for row in rows if "loss" in row]) == 2


def test_a_folder_that_cannot_be_written_is_said_and_the_loop_goes_on(tmp_path):
    (tmp_path / "file").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="Watch cannot write to"):
        assert watching(tmp_path / "file", on_error="warn")(0), "the numbers are lost"


def test_a_run_of_mlflow(tmp_path, mlflow):
    experiment = mlflow.create_experiment("watched", f"{tmp_path}/artifacts")
    with mlflow.start_run(experiment_id=experiment) as run:
        watching(tmp_path, logger=mlflow)(4)
        mlflow.flush_artifact_async_logging()  # outside of a run, this would start another one
    client = mlflow.MlflowClient()
    (entropy,) = client.get_metric_history(run.info.run_id, "vitx/rollout/entropy")
    assert entropy.step == 4
    assert client.list_artifacts(run.info.run_id, "images")

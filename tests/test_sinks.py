import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitx.callbacks.sinks import write_maps, write_picture

PICTURE = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)


def test_a_picture_comes_out_of_tensorboard_as_it_went_in(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    write_picture([logger], tmp_path, "vitx/maps", PICTURE, 7)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    (event,) = events.Images("vitx/maps")
    (tmp_path / "out.png").write_bytes(event.encoded_image_string)
    assert event.step == 7
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), PICTURE)
    assert not list(tmp_path.glob("vitx-maps*")), "a logger holds the picture: no file is needed"


@pytest.mark.parametrize("loggers", [[], [CSVLogger("unused")]], ids=["none", "csv"])
def test_without_a_logger_for_pictures_there_is_a_file(loggers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_picture(loggers, tmp_path / "deep", "vitx/maps", PICTURE, 7)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "deep" / "vitx-maps-000007.png")), PICTURE)


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path):
    write_maps(tmp_path, {"rollout": np.ones((1, 2, 2), np.float32)}, 3)

    class Broken:
        def __array__(self, *_, **__):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_maps(tmp_path, {"rollout": Broken()}, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["maps-000003.npz"]
    assert np.load(tmp_path / "maps-000003.npz")["rollout"].shape == (1, 2, 2)

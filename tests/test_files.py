"""Pictures as files."""

import io
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from tests.loggers import PICTURE, pixels
from vitx.files import encode, write_atomically


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (40, 65)])
def test_a_png_is_what_pillow_reads(size):
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 256, (*size, 3), np.uint8)
    picture[size[0] // 2 :] = 255  # uniform parts, for run-length encoding
    with io.BytesIO() as file:
        encode(file, picture)
        found = Image.open(file)
        assert found.format == "PNG"
        assert np.array_equal(np.asarray(found), picture)


def save_picture(path, picture):
    write_atomically(path, lambda file: encode(file, picture))


def test_a_picture_comes_out_of_a_file_as_it_went_in(tmp_path):
    save_picture(tmp_path / "deep" / "maps.png", PICTURE)
    assert np.array_equal(pixels(tmp_path / "deep" / "maps.png"), PICTURE)


@contextmanager
def full_disk(room):
    """Limit the size of files to some bytes."""
    resource = pytest.importorskip("resource", reason="this system has no limit on the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "maps.png"
    save_picture(path, PICTURE)
    before = path.read_bytes()
    with full_disk(len(before) // 2), pytest.raises(OSError, match="too large"):
        save_picture(path, PICTURE // 2)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
    save_picture(path, PICTURE // 2)
    assert path.read_bytes() != before

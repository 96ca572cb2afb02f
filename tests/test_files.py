"""Pictures as files."""

import io

import numpy as np
import pytest
from PIL import Image

from vitx.files import encode


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

"""The table in docs/models.md says what each kind of model does."""

import pytest

from tests import supported_models


@pytest.mark.slow
def test_the_page_tells_the_truth():
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    _, written, _ = supported_models.parts()
    assert written == supported_models.table(), supported_models.__doc__

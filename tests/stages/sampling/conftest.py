"""Both engines on the tiny model."""

import pytest

from stages.sampling.engines import open_engine


@pytest.fixture(scope="session", params=["transformers", "vllm"])
def engine(request, tiny):
    """Each engine starts once per session."""
    opened = open_engine(request.param, tiny.folder, "float32")
    yield opened
    opened.close()

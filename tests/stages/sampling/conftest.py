"""Both engines on the tiny model."""

import pytest

from stages.sampling.engines import Engine, open_engine


@pytest.fixture(scope="session")
def engines(tiny):
    """Return the engine of a name: each is opened once, when it is first asked for, and stays open for all files."""
    opened: dict[str, Engine] = {}

    def get(name: str) -> Engine:
        if name not in opened:
            opened[name] = open_engine(name, tiny.folder, "float32")
        return opened[name]

    yield get
    for engine in opened.values():
        engine.close()


@pytest.fixture(params=["transformers", "vllm"])
def engine(request, engines):
    return engines(request.param)

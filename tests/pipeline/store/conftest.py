"""Shared by the tests of the store: toy stages that fail when a test says so."""

from collections.abc import Iterator

import pytest

from tests.pipeline.store.test_store import Trouble, toy_stages


@pytest.fixture
def trouble() -> Iterator[Trouble]:
    with toy_stages() as trouble:
        yield trouble

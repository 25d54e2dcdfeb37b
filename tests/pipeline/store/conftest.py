"""Shared by the tests of the store: toy stages that fail when a test says so, and when a table is small.

Tables of toys are as large ones here: their parts stay files of their own, unless a test is about small tables.
"""

from collections.abc import Iterator

import pytest

from tests.pipeline.store.sizes import LARGE
from tests.pipeline.store.test_store import Trouble, toy_stages


@pytest.fixture(autouse=True)
def small_table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.store.store.SMALL_TABLE", getattr(request, "param", LARGE))


@pytest.fixture
def trouble() -> Iterator[Trouble]:
    with toy_stages() as trouble:
        yield trouble

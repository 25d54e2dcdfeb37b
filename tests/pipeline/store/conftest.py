"""Tables of toys are as large ones here: their parts stay files of their own, unless a test is about small tables."""

import pytest

SMALL, LARGE = 8 << 20, 0
both_sizes = pytest.mark.parametrize("small_table", [SMALL, LARGE], indirect=True, ids=["small", "large"])


@pytest.fixture(autouse=True)
def small_table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.store.store.SMALL_TABLE", getattr(request, "param", LARGE))

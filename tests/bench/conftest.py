"""Mark every test in this folder: they test the benchmarks, which no user runs, and are slow.

Where none of them is wanted, none is imported.
"""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_named = any("bench" in argument for argument in config.args)
    return True if config.getoption("markexpr") == "not bench" and not is_named else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.bench)

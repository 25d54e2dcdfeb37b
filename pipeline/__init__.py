"""Recipes, plans, keys, the store, and the two executors.

The names below are those that stages are written with; importing them loads pyarrow and pydantic, no more. Planning and
running (config, execution, sql, store) are imported by their own names.
"""

from typing import TYPE_CHECKING

from pipeline.context import StageContext
from pipeline.registry import EXECUTION, Bound, ExecutionEntries, Finite, Range, Registry
from pipeline.stage import InputStep, stage, stages
from pipeline.store.fingerprints import AdapterPath, DataPath, ModelPath

if TYPE_CHECKING:
    from pipeline.sql.catalog import Catalog
    from pipeline.store.storage import Location

__all__ = [
    "EXECUTION",
    "AdapterPath",
    "Bound",
    "DataPath",
    "ExecutionEntries",
    "Finite",
    "InputStep",
    "ModelPath",
    "Range",
    "Registry",
    "StageContext",
    "open",
    "stage",
    "stages",
]


def open(store: "str | Location", run: str | None = None, round: int | None = None) -> "Catalog":
    """Open a store, in a folder or at a URL, for queries: `pipeline.open("demo/store").sql("SELECT …").arrow()`.

    A result has `.arrow()` and `.pandas()`. Raise WinnowError for a store without runs, and where it has no
    such run or round.
    """
    from pipeline.sql.catalog import open_catalog  # DuckDB is needed by queries alone
    from pipeline.store.store import Store
    from schemas import WinnowError

    opened = Store(store)
    catalog = open_catalog(opened, run, round)
    if not catalog.runs:
        raise WinnowError(f"{opened.root}: no runs in this store; `winnow run` adds one")
    return catalog

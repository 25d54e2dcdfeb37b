"""How things get made: options, keys, recipes, plans, the store, and the two ways to run.

These names are what a stage is written with; they need nothing but pyarrow, so that a training machine
may be bare. Planning and running (plan, recipe, run, catalog) are imported by their own names.
"""

from typing import TYPE_CHECKING

from pipeline.context import StageContext
from pipeline.registry import EXECUTION, Bound, Finite, Range, Registry
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
    """A store to ask, in a folder or at a URL: `pipeline.open("demo/store").sql("SELECT …").arrow()`.

    An answer has `.arrow()`, `.pandas()`, `.polars()`. Raises WinnowError where nothing was ever made, or where the
    store has no such run or round.
    """
    from pipeline.sql.catalog import open_catalog  # DuckDB is not on a bare machine
    from pipeline.store.store import Store
    from schemas import WinnowError

    found = Store(store)
    catalog = open_catalog(found, run, round)
    if not catalog.runs:
        raise WinnowError(f"{found.root}: no runs in this store; winnow run makes one")
    return catalog

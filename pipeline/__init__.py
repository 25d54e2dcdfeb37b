"""How things get made: options, keys, recipes, plans, the store, and the two ways to run.

These names are what a stage is written with; they need nothing but pyarrow, so that a training machine
may be bare. Planning and running (plan, recipe, run, catalog) are imported by their own names.
"""

from typing import TYPE_CHECKING

from pipeline.content import AdapterPath, DataPath, ModelPath
from pipeline.registry import EXECUTION, Bound, Finite, Range, Registry
from pipeline.stage import Wired, stage, stages
from pipeline.workspace import Workspace

if TYPE_CHECKING:
    from pipeline.catalog import Catalog
    from pipeline.places import Place

__all__ = [
    "EXECUTION",
    "AdapterPath",
    "Bound",
    "DataPath",
    "Finite",
    "ModelPath",
    "Range",
    "Registry",
    "Wired",
    "Workspace",
    "open",
    "stage",
    "stages",
]


def open(store: "str | Place", run: str | None = None, round: int | None = None) -> "Catalog":
    """A store to ask, in a folder or at a URL: `pipeline.open("demo/store").sql("SELECT …").arrow()`.

    An answer has `.arrow()`, `.pandas()`, `.polars()`. Raises WinnowError where nothing was ever made, or where the
    store has no such run or round.
    """
    from pipeline.catalog import open_catalog  # DuckDB is not on a bare machine
    from pipeline.store import Store
    from schemas import WinnowError

    found = Store(store)
    catalog = open_catalog(found, run, round)
    if not catalog.runs:
        raise WinnowError(f"{found.root}: no runs in this store; winnow run makes one")
    return catalog

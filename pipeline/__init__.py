"""How things get made: options, keys, recipes, plans, the store, and the two ways to run.

These names are what a stage is written with; they need nothing but pyarrow, so that a training machine
may be bare. Planning and running (plan, recipe, run, catalog) are imported by their own names.
"""

from pipeline.content import AdapterPath, DataPath, ModelPath
from pipeline.registry import EXECUTION, Bound, Finite, Range, Registry
from pipeline.stage import Wired, stage, stages
from pipeline.workspace import Workspace

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
    "stage",
    "stages",
]

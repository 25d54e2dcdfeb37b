"""Recipes, plans, keys, the store, and the two executors.

The names below are those that stages are written with; importing them loads pyarrow and pydantic, no more. Planning and
running (config, execution, sql, store) are imported by their own names.
"""

from pipeline.context import StageContext
from pipeline.registry import ADDED, EXECUTION, Bound, EntryHint, ExecutionEntries, Finite, Range, Registry
from pipeline.stage import Columns, InputStep, stage, stages
from pipeline.store.fingerprints import AdapterPath, DataPath, ModelPath, TemplatePath

__all__ = [
    "ADDED",
    "EXECUTION",
    "AdapterPath",
    "Bound",
    "Columns",
    "DataPath",
    "EntryHint",
    "ExecutionEntries",
    "Finite",
    "InputStep",
    "ModelPath",
    "Range",
    "Registry",
    "StageContext",
    "TemplatePath",
    "stage",
    "stages",
]

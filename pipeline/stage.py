"""Stages: functions from tables to tables.

The positional parameters of a stage are its inputs (tables by their schema, or a Model), its keyword-only parameters
are its options, its return annotation names its outputs. A `StageContext` parameter is filled in by the runner and is
not part of the identity.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pyarrow as pa

from pipeline.context import StageContext
from pipeline.costs import NO_COST, Cost
from pipeline.registry import Entry, Registry
from schemas import Model

stages = Registry("stage", signature=object)


class Columns:
    """Annotation of a stage's input: the columns that the stage reads, which alone are read from the store.

    `Annotated[Rewards, Columns("prompt_id", "reward")]`, or of a function from the stage's options to the names, None
    for all columns.
    """

    def __init__(self, *names: str, by: Callable[[Mapping[str, Any]], Sequence[str] | None] | None = None) -> None:
        self.names = by or (lambda options: names)


@dataclass(frozen=True)
class Input:
    """Input of a stage: a table (by its schema) or a model (schema is None)."""

    name: str
    schema: pa.Schema | None
    optional: bool
    columns: Columns | None = None  # that the stage reads; None: all

    def schema_read(self, options: Mapping[str, Any]) -> pa.Schema:
        """Return the schema of what the stage reads of its table with these options."""
        assert self.schema is not None
        names = self.columns.names(options) if self.columns else None
        return self.schema if names is None else self.schema_of(names)

    def schema_of(self, names: Sequence[str]) -> pa.Schema:
        """Return the schema of some of its table's columns, in the table's order."""
        assert self.schema is not None
        return pa.schema([field for field in self.schema if field.name in names], metadata=self.schema.metadata)

    @property
    def kind(self) -> str:
        return "model" if self.schema is None else self.schema.metadata[b"table"].decode()


@dataclass(frozen=True)
class InputStep:
    """Step that an input comes from, as a stage's check sees it; without options if they did not validate.

    name: as the recipe writes it, which makes no other step of it: two are equal if their results are.
    """

    stage: str
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, "InputStep"] = field(default_factory=dict)
    name: str = field(default="", compare=False)


Check = Callable[[dict[str, Any], Mapping[str, InputStep]], list[str]]
ByPrompt = Callable[[Mapping[str, Any]], bool]
Choose = Callable[[Mapping[str, InputStep]], dict[str, Any]]
Omits = Callable[[Mapping[str, Any]], Mapping[str, str]]


@dataclass(frozen=True)
class StageSignature:
    """Inputs, outputs and version of a stage, read once from its function for the planner and the runner.

    An unsharded stage is called once with every row; any other once per shard, with the rows of that shard. A
    concurrent one is called for several shards at once, in threads of one process.
    """

    version: int
    unsharded: bool
    concurrent: bool
    inputs: tuple[Input, ...]
    outputs: tuple[pa.Schema, ...]
    makes_model: bool
    context_parameter: str | None  # name of the StageContext parameter
    check: Check
    given_by: Mapping[str, str]  # input -> the option that names a function in its place
    choose: Choose  # options that nobody set, by what the inputs are
    cost: Cost
    which_rows: tuple[str, ...]  # options that decide which rows there are, and nothing of what is in any of them
    goes_on: bool  # it takes the rows of steps that differ in those alone
    by_prompt: ByPrompt
    omits: Omits  # tables that are empty with these options, by name: what to do for a step that reads one

    def makes(self, kind: str) -> bool:
        if kind == "model":
            return self.makes_model
        return any(schema.metadata[b"table"].decode() == kind for schema in self.outputs)


def stage(
    *,
    version: int,
    unsharded: bool = False,
    concurrent: bool = False,
    check: Check = lambda options, inputs: [],
    given_by: Mapping[str, str] = MappingProxyType({}),
    choose: Choose = lambda inputs: {},
    cost: Cost = NO_COST,
    which_rows: tuple[str, ...] = (),
    goes_on: bool = False,
    by_prompt: ByPrompt = lambda options: False,
    omits: Omits = lambda options: {},
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that registers a stage.

    Raise `version` when its results change. `check` returns what is wrong with a combination of options and inputs,
    at plan time. `given_by` maps an input to an option: where a recipe's step for that input uses a function that this
    option can name (`ranker: {use: pattern}`), the option is set to it and there is no input. `choose` returns options
    for these inputs, which are set where neither recipe nor user sets them. `cost` says what it takes
    (pipeline/costs.py). `which_rows` names the options that decide which rows there are, and nothing of what is in any
    of them. A stage that `goes_on` finds in `StageContext.earlier` the rows of steps that differ from it, and in their
    inputs, in such options alone, and computes only the others. `by_prompt` returns whether, with these options, the
    rows of a prompt depend on no other prompt and all tables are in order of prompt ids: then the stage is called for a
    part in pieces that fit into memory. `omits` returns the tables that are empty with these options, and what to write
    for a step that reads one: such a plan is refused. In it, `$source`, `$reader` and `$item` stand for the two steps
    and the input.
    """

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        hints = get_type_hints(fn, include_extras=True)
        inputs, context_parameter = [], None
        for name, parameter in inspect.signature(fn).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                continue
            hint = hints[name]
            if hint is StageContext:
                context_parameter = name
                continue
            optional = get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)
            if optional:
                hint = next(arm for arm in get_args(hint) if arm is not NoneType)
            columns = next((mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Columns)), None)
            inputs.append(Input(name, _table_schema(hint), optional, columns))
        returned = get_args(hints["return"]) if get_origin(hints["return"]) is tuple else (hints["return"],)
        outputs = [_table_schema(hint) for hint in returned]
        tables = tuple(schema for schema in outputs if schema is not None)
        signature = StageSignature(
            version,
            unsharded,
            concurrent,
            tuple(inputs),
            tables,
            None in outputs,
            context_parameter,
            check,
            given_by,
            choose,
            cost,
            which_rows,
            goes_on,
            by_prompt,
            omits,
        )
        return stages(signature=signature)(fn)

    return register


def signature_of(entry: Entry) -> StageSignature:
    return entry.metadata["signature"]


def _table_schema(hint: Any) -> pa.Schema | None:
    """Return the schema of a table's annotation, None for Model. Raise TypeError for anything else."""
    if hint is Model:
        return None
    if get_origin(hint) is Annotated and isinstance(hint.__metadata__[0], pa.Schema):
        return hint.__metadata__[0]
    raise TypeError(f"a stage reads and returns tables and models, not {hint}")

"""A stage is a function from tables to tables.

Its positional parameters are its inputs (tables by their schema, or a Model), its keyword-only
parameters are its options, its return annotation is its output. A `StageContext` parameter is injected
and has no part in the identity.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pyarrow as pa

from pipeline.context import StageContext
from pipeline.registry import Entry, Registry
from schemas import Model

stages = Registry("stage", "signature")


@dataclass(frozen=True)
class Input:
    """One thing a stage reads: a table (by its schema) or a model (schema is None)."""

    name: str
    schema: pa.Schema | None
    optional: bool

    @property
    def kind(self) -> str:
        return "model" if self.schema is None else self.schema.metadata[b"table"].decode()


@dataclass(frozen=True)
class InputStep:
    """The step behind an input, as a plan-time check sees it; no options where they did not validate."""

    stage: str
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, "InputStep"] = field(default_factory=dict)


Check = Callable[[dict[str, Any], Mapping[str, InputStep]], list[str]]


@dataclass(frozen=True)
class StageSignature:
    """What the planner and the runner need to know of a stage, read once from its signature.

    An unsharded stage is called once with every row; any other once a shard, with that shard's rows. A
    concurrent one works on several shards at once in threads of one process.
    """

    version: int
    unsharded: bool
    concurrent: bool
    inputs: tuple[Input, ...]
    outputs: tuple[pa.Schema, ...]
    makes_model: bool
    workspace: str | None
    check: Check

    def makes(self, kind: str) -> bool:
        if kind == "model":
            return self.makes_model
        return any(schema.metadata[b"table"].decode() == kind for schema in self.outputs)


def no_check(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    return []


def stage(
    *,
    version: int,
    unsharded: bool = False,
    concurrent: bool = False,
    check: Check = no_check,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a stage. Raise `version` when its results change; `check` refuses senseless recipes at plan time."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        return stages(signature=_signature(fn, version, unsharded, concurrent, check))(fn)

    return register


def signature_of(entry: Entry) -> StageSignature:
    signature: StageSignature = entry.metadata["signature"]
    return signature


def _signature(fn: Callable[..., Any], version: int, unsharded: bool, concurrent: bool, check: Check) -> StageSignature:
    hints = get_type_hints(fn, include_extras=True)
    inputs, workspace = [], None
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            continue
        if hints[name] is StageContext:
            workspace = name
        else:
            inputs.append(_input(name, hints[name]))
    outputs = _outputs(hints["return"])
    tables = tuple(schema for schema in outputs if schema is not None)
    return StageSignature(version, unsharded, concurrent, tuple(inputs), tables, None in outputs, workspace, check)


def _input(name: str, hint: Any) -> Input:
    optional = get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)
    if optional:
        hint = next(arm for arm in get_args(hint) if arm is not NoneType)
    return Input(name, _schema(hint), optional)


def _outputs(hint: Any) -> list[pa.Schema | None]:
    arms = get_args(hint) if get_origin(hint) is tuple else (hint,)
    return [_schema(arm) for arm in arms]


def _schema(hint: Any) -> pa.Schema | None:
    if hint is Model:
        return None
    if get_origin(hint) is Annotated and isinstance(hint.__metadata__[0], pa.Schema):
        return hint.__metadata__[0]
    raise TypeError(f"a stage reads and makes tables and models, not {hint}")

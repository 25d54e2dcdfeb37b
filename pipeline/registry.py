"""Named functions whose keyword-only parameters are their typed options.

Stages, objectives, pair rules and engines are all this one idea: the signature is the schema, the
documentation and the key. Options are checked by pydantic, strictly, when the recipe is read; it is
imported only then, for running a stage does not need it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from schemas import WinnowError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic_core import CoreSchema


def nearest(name: str, names: list[str]) -> str:
    """The hint at the end of an unknown-name message."""
    close = get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(names))}"


@dataclass(frozen=True)
class Range:
    """Bounds of a number: `Annotated[float, Range(gt=0)]`."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        bounds = {name: bound for name, bound in vars(self).items() if bound is not None}
        schema: CoreSchema = {**handler(source), **bounds}
        return schema


Finite = Annotated[float, Range(gt=-float("inf"), lt=float("inf"))]
EXECUTION = "how it runs, not what it makes: no part of the identity"  # in Annotated[...], beside the type


@dataclass(frozen=True)
class Entry:
    """One registered function and the metadata declared beside it."""

    name: str
    fn: Callable[..., Any]
    metadata: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def options(self) -> type[BaseModel]:
        return options_of(self.fn)

    @cached_property
    def execution(self) -> frozenset[str]:
        """Options marked EXECUTION."""
        hints = _option_hints(self.fn)
        return frozenset(name for name, hint in hints.items() if EXECUTION in getattr(hint, "__metadata__", ()))

    def validate(self, given: dict[str, Any], place: str) -> dict[str, Any]:
        """Every option with its value, defaults included; raises WinnowError with all mistakes."""
        from pydantic import ValidationError

        try:
            checked = self.options.model_validate(given)
        except ValidationError as error:
            names = list(self.options.model_fields)
            items = [item for item in error.errors() if item["type"] != "none_required"]
            lines = [line for item in items for line in _explain(item, place, names)]
            raise WinnowError(*lines) from None
        return {name: getattr(checked, name) for name in self.options.model_fields}

    def __reduce__(self) -> tuple[Callable[..., Entry], tuple[Callable[..., Any]]]:
        return entry_of, (self.fn,)  # to a worker by reference: importing the function registers it


def entry_of(fn: Callable[..., Any]) -> Entry:
    """The entry that registering `fn` made."""
    entry: Entry = fn.entry  # type: ignore[attr-defined]
    return entry


@dataclass(frozen=True)
class Bound:
    """A registered function with its options filled in; call it with its positional arguments."""

    entry: Entry
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def metadata(self) -> dict[str, Any]:
        return self.entry.metadata

    def __call__(self, *args: Any) -> Any:
        return self.entry.fn(*args, **self.options)

    def __hash__(self) -> int:
        return hash(str(self))  # its options are a dict; bound functions of equal name and options are one value

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.name}({options})"


class Registry:
    """Functions of one kind by name. As an annotation, `Annotated[Bound, registry]` is an option type.

    metadata: those that every entry must declare.
    """

    def __init__(self, kind: str, *metadata: str) -> None:
        self.kind, self.metadata = kind, metadata
        self.entries: dict[str, Entry] = {}
        self.aliases: dict[str, str] = {}  # other name -> name of the entry

    def __call__(
        self, *, aliases: tuple[str, ...] = (), **metadata: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Raises TypeError if a fact is missing. aliases: other names that recipes may use for the same entry."""

        def register(fn: Callable[..., Any]) -> Callable[..., Any]:
            if missing := [fact for fact in self.metadata if fact not in metadata]:
                raise TypeError(f"{self.kind} {fn.__name__}: its decorator must say {', '.join(missing)}")
            entry = Entry(fn.__name__, fn, metadata)
            self.entries[fn.__name__] = entry
            self.aliases |= dict.fromkeys(aliases, fn.__name__)
            setattr(fn, "entry", entry)  # noqa: B010 - functions have no such attribute for mypy
            return fn

        return register

    def find(self, name: str) -> Entry:
        name = self.aliases.get(name, name)
        if name not in self.entries:
            raise WinnowError(f"unknown {self.kind} {name!r}; {nearest(name, [*self.entries, *self.aliases])}")
        return self.entries[name]

    def bind(self, value: Any) -> Bound:
        """From a recipe: a name, or a mapping with `name` and options."""
        if isinstance(value, Bound):
            return value
        given = {"name": value} if isinstance(value, str) else value
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise WinnowError(f"must name one {self.kind}, or be a mapping with `name`; got {value!r}")
        entry = self.find(given["name"])
        return Bound(entry, entry.validate({k: v for k, v in given.items() if k != "name"}, ""))

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(self.bind)


def _option_parameters(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(fn).parameters
    return {name: each for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY}


def _option_hints(fn: Callable[..., Any]) -> dict[str, Any]:
    """Only the options' hints: the others may name types of libraries that planning does not import."""
    options = _option_parameters(fn)
    own = SimpleNamespace(__annotations__={name: each.annotation for name, each in options.items()})
    return get_type_hints(own, fn.__globals__, include_extras=True)


def options_of(fn: Callable[..., Any]) -> type[BaseModel]:
    """A strict pydantic model of the keyword-only parameters."""
    from pydantic import ConfigDict, create_model

    options, hints = _option_parameters(fn), _option_hints(fn)
    fields: dict[str, Any] = {
        name: (hints[name], ... if each.default is each.empty else each.default) for name, each in options.items()
    }
    config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, validate_default=True)
    return create_model(fn.__name__, __config__=config, **fields)


def _explain(item: Any, place: str, names: list[str]) -> list[str]:
    """One pydantic error as lines that name place, value, cause and cure."""
    where = ".".join([place, *(str(part) for part in item["loc"] if not _branch(part))]).strip(".")
    cause = item.get("ctx", {}).get("error")
    if isinstance(cause, WinnowError):
        return [_nested(where, problem) for problem in cause.problems]
    if item["type"] == "extra_forbidden":
        return [f"{where}: unknown option; {nearest(str(item['loc'][-1]), names)}"]
    if item["type"] == "missing":
        return [f"{where}: required, and the recipe does not set it"]
    message = str(cause) if cause else item["msg"][0].lower() + item["msg"][1:]
    return [f"{where}: {message} (got {item['input']!r})"]


def _branch(part: Any) -> bool:
    """Pydantic's own names of validators and union arms, which are no places in a recipe."""
    return isinstance(part, str) and part.startswith(("function-", "none"))


def _nested(where: str, problem: str) -> str:
    inner, colon, rest = problem.partition(": ")
    return f"{where}.{inner}: {rest}" if colon and " " not in inner else f"{where}: {problem}"

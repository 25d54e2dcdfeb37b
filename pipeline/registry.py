"""Registries of functions by name; the keyword-only parameters of a function are its typed options.

Stages, objectives, rankers and rules are all registered in this way: the signature is the schema, the
documentation and part of the key. Options are validated by pydantic, strictly, when a recipe is planned.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, cached_property, wraps
from hashlib import sha256
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    NotRequired,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

from annotated_types import Interval
from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import core_schema

from schemas import WinnowError

if TYPE_CHECKING:
    from pydantic_core import CoreSchema, ErrorDetails

M = TypeVar("M", bound=BaseModel)
Function = Callable[..., Any]
PlainFunction = Callable[[Function, dict[str, Any]], tuple[tuple[str, ...], dict[str, Any]]]
LONGEST_VALUE = 300  # characters of a value in a message
FROM_FILE = "python"  # name under which a function is named by `file` and `function`, without a decorator
EXECUTION = "how a step runs, not what it computes: not part of its identity"  # in Annotated[...], beside the type
# Likewise beside the type. Without it, a new option would change the key of every result that does not use it.
ADDED = "added when results were stored already: part of the identity only where it is not the default"


@dataclass(frozen=True)
class ExecutionEntries:
    """EXECUTION of some entries of a mapping: in Annotated[...], beside its type."""

    names: frozenset[str]


@dataclass(frozen=True)
class EntryHint:
    """Say, in Annotated[...] of a mapping, what to do about an entry of it that is written as an option beside it.

    `of` takes the entry's name and value, and returns "" for what is no entry.
    """

    of: Callable[[str, Any], str]


FORMER = {  # names of options before the first release (CHANGELOG.md)
    "lr": "learning_rate", "schedule": "lr_scheduler_type", "warmup": "warmup_ratio", "clip": "max_grad_norm",
    "recompute": "gradient_checkpointing", "micro_tokens": "tokens_per_pass", "ranks": "world_size", "lora": "lora_r",
    "lora_targets": "lora_target_modules", "part": "dataset_split",
}  # fmt: skip
# Names of options in TRL, transformers, OpenRLHF, LLaMA-Factory and vLLM -> what does their work here. A nearest name
# would be wrong: `gradient_accumulation_steps` is not like `gradient_checkpointing`.
ELSEWHERE = {
    "bf16": "dtype", "fp16": "dtype", "torch_dtype": "dtype", "precision": "dtype", "mixed_precision": "dtype",
    "per_device_train_batch_size": "batch_size", "train_batch_size": "batch_size",
    "micro_batch_size": "tokens_per_pass",
    "per_device_batch_size": "batch_size", "micro_train_batch_size": "tokens_per_pass", "minibatch": "tokens_per_pass",
    "gradient_accumulation": "tokens_per_pass", "gradient_accumulation_steps": "tokens_per_pass",
    "num_train_epochs": "epochs", "num_epochs": "epochs", "max_epochs": "epochs", "max_steps": "epochs",
    "warmup_steps": "warmup_ratio", "lr_warmup_ratio": "warmup_ratio", "lr_scheduler": "lr_scheduler_type",
    "max_norm": "max_grad_norm", "loss": "objective", "loss_type": "objective", "beta": "objective",
    "label_smoothing": "objective", "method": "objective", "pref_loss": "objective", "pref_beta": "objective",
    "lora_rank": "lora_r", "r": "lora_r", "lora_target": "lora_target_modules", "target_modules": "lora_target_modules",
    "nproc_per_node": "world_size", "num_processes": "world_size", "deepspeed": "world_size", "fsdp": "world_size",
    "save_steps": "checkpoint_every", "max_length": "max_tokens", "max_prompt_length": "max_tokens",
    "max_completion_length": "max_tokens", "max_new_tokens": "max_tokens", "cutoff_len": "max_tokens",
    "num_return_sequences": "n", "num_generations": "n", "best_of": "n", "n_samples_per_prompt": "n",
    "model": "path", "model_name_or_path": "path", "dataset_name": "dataset", "train_file": "path",
    "split": "dataset_split", "prompt_key": "prompt", "input_key": "prompt", "messages": "prompt",
    "test_size": "heldout", "eval_steps": "evaluate_every", "eval_strategy": "evaluate_every",
    "load_best_model_at_end": "keep", "metric_for_best_model": "keep",
}  # fmt: skip


LISTED = 3  # names that a message says one may have meant


def nearest(name: str, names: list[str], listed: list[str] | None = None) -> str:
    """Return the hint that ends a message about an unknown name: the nearest one, or all (as `listed`, if given).

    Of a former name it is today's, of another program's what says the same here. Before a name that is like it come
    those that it begins: the one of about one letter more, or all, without those that begin with one of them.
    """
    if FORMER.get(str(name)) in names:
        return f"it is called {FORMER[str(name)]!r} now"
    if ELSEWHERE.get(str(name)) in names:
        return f"here, {ELSEWHERE[str(name)]!r} says that"
    longer = [other for other in names if name and other.startswith(str(name))]
    close = get_close_matches(str(name), longer, n=1, cutoff=0.85)
    if not close:
        close = [other for other in longer if not any(other != start and other.startswith(start) for start in longer)]
    if not 0 < len(close) <= LISTED:
        close = get_close_matches(str(name), names, n=1, cutoff=0.5)
    meant = " or ".join(map(repr, sorted(close)))
    return f"did you mean {meant}?" if close else f"known: {', '.join(sorted(listed or names))}"


Range = Interval  # bounds of a number: `Annotated[float, Range(gt=0)]`
Finite = Annotated[float, Range(gt=-float("inf"), lt=float("inf"))]
# What the decorator of every registry may set.
COMMON_METADATA = {"version": NotRequired[Annotated[int, Range(ge=1)]], "aliases": NotRequired[tuple[str, ...]]}


@dataclass(eq=False)
class Plugin:
    """File of a user whose functions are registered when a plan is made (pipeline/plugins.py loads it)."""

    path: Path
    source: str = field(repr=False)
    package: str = ""  # of an entry point, which workers import as they import us
    registered: list[tuple[Registry, Entry]] = field(default_factory=list, repr=False)

    @cached_property
    def digest(self) -> str:
        return sha256(self.source.encode()).hexdigest()

    @property
    def module(self) -> str:
        """Return the name of the module, which for a file is made of its content."""
        return self.package or f"winnow_plugin_{self.digest[:16]}"

    def entry(self, kind: str, name: str) -> Entry:
        return next(entry for _, entry in self.registered if (entry.kind, entry.name) == (kind, name))

    def __reduce__(self) -> tuple[Callable[..., Plugin], tuple[Path, str]]:
        from pipeline.plugins import load_source

        # A worker need not see the path, and if it does, the file may have changed since the plan was made.
        return load_source, (self.path, self.source)


loading: ContextVar[Plugin | None] = ContextVar("loading", default=None)  # the plugin whose module is executed now
plugin_packages: set[str] = set()  # top-level packages of entry points in the group `winnow.plugins`


@dataclass(frozen=True)
class Entry:
    """Registered function with its metadata: what its decorator declares."""

    name: str
    fn: Function
    metadata: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    aliases: tuple[str, ...] = ()
    plugin: Plugin | None = None
    from_file: bool = False  # named by file and function, and registered by nothing
    declared: dict[str, Any] = field(default_factory=dict)  # options of the recipe in place of a decorator's metadata

    @cached_property
    def options(self) -> type[BaseModel]:
        return options_of(self.fn)

    @cached_property
    def execution(self) -> frozenset[str]:
        """Return the names of the options marked EXECUTION."""
        hints = _option_hints(self.fn)
        return frozenset(name for name, hint in hints.items() if EXECUTION in getattr(hint, "__metadata__", ()))

    @cached_property
    def added(self) -> dict[str, Any]:
        """Return the defaults of the options marked ADDED, by name."""
        defaults = options_of(self.fn, lambda hint: ADDED in getattr(hint, "__metadata__", ()))()
        return {name: getattr(defaults, name) for name in type(defaults).model_fields}

    @cached_property
    def execution_entries(self) -> dict[str, frozenset[str]]:
        """Return the entries that are EXECUTION, by the name of the option that is a mapping of them."""
        hints = _option_hints(self.fn)
        return {
            name: mark.names
            for name, hint in hints.items()
            for mark in getattr(hint, "__metadata__", ())
            if isinstance(mark, ExecutionEntries)
        }

    def identity_of(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options, and of mappings the entries, that decide the result.

        What the recipe declares in place of a decorator is among them: no digest of the file has it.
        """
        deciding = self.declared | {
            name: value
            for name, value in options.items()
            if name not in self.execution and not (name in self.added and value == self.added[name])
        }
        for name, entries in self.execution_entries.items():
            value = deciding.get(name) or {}
            deciding[name] = {entry: value[entry] for entry in value if entry not in entries} or None
        return deciding

    @property
    def version(self) -> int:
        """Return the version that is part of the key: of a stage in its signature, of any other function beside it."""
        return getattr(self.metadata.get("signature"), "version", self.metadata.get("version", 1))

    @property
    def plugin_file(self) -> Path | None:
        """Return the plugin file that registers this function, None for a function of ours.

        Of an installed plugin it is the file that defines the function, whatever imported it first.
        """
        if self.plugin:
            return self.plugin.path
        fn = inspect.unwrap(self.fn)
        if str(fn.__module__).partition(".")[0] not in plugin_packages:  # code that is executed has none
            return None
        return Path(inspect.getfile(fn))

    @property
    def plugin_digest(self) -> str | None:
        """Return the digest of the plugin file that registers this function, None for a function of ours."""
        if self.plugin:
            return self.plugin.digest
        return sha256(self.plugin_file.read_bytes()).hexdigest() if self.plugin_file else None

    def location(self, line: int | None = None) -> str:
        """Return kind and name, and of a plugin's function its file and a line, by default where it is defined."""
        if not self.plugin_file:
            return f"{self.kind} {self.name}"
        fn = inspect.unwrap(self.fn)
        code = getattr(fn, "py_func", fn).__code__  # numba's dispatchers have a py_func
        return f"{self.kind} {self.name} of {self.plugin_file}, line {line or code.co_firstlineno}"

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Raise what a plugin's function raises inside as a WinnowError of one line, from the exception itself.

        What a function of ours raises keeps its traceback, because it is our mistake.
        """
        try:
            yield
        except WinnowError:
            raise
        except (Exception, SystemExit) as error:
            # Training halves its passes when memory runs out, whoever asked for the last of it.
            if not self.plugin_file or (isinstance(error, RuntimeError | MemoryError) and "memory" in str(error)):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == str(self.plugin_file)]
            message = f"{self.location(lines[-1] if lines else None)}: {describe(error)}"
            raise WinnowError(message) from error

    def validate(self, options: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Return every option with its value, defaults included. Raise WinnowError with all mistakes."""
        with self.failures():  # of its own validators
            values = validated(self.options, options, prefix)
        return {name: getattr(values, name) for name in self.options.model_fields}

    def __reduce__(self) -> tuple[Callable[..., Entry], tuple[Any, ...]]:
        if self.plugin and self.from_file:
            return entry_in_file, (self.plugin, self.name, self.metadata, self.kind, self.declared)
        if self.plugin:
            return Plugin.entry, (self.plugin, self.kind, self.name)
        return entry_of, (self.fn, self.kind)  # by reference: importing the function on a worker registers it there


def describe(error: BaseException) -> str:
    """Return the type and the message of an exception, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def entry_of(fn: Function, kind: str = "") -> Entry:
    """Return the entry of a registered function, of this kind if it is registered as several."""
    entries: dict[str, Entry] = fn.entries  # type: ignore[attr-defined]
    return entries.get(kind) or fn.entry  # type: ignore[attr-defined]


def entry_in_file(plugin: Plugin, name: str, metadata: dict[str, Any], kind: str, declared: dict[str, Any]) -> Entry:
    """Return the entry of a function that a user's file defines and does not register."""
    return Entry(name, getattr(sys.modules[plugin.module], name), metadata, kind, (), plugin, True, declared)


@dataclass(frozen=True)
class Bound:
    """Registered function with its options filled in; call it with its positional arguments."""

    entry: Entry
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def metadata(self) -> dict[str, Any]:
        return self.entry.metadata

    def __call__(self, *args: Any) -> Any:
        """Return what the function returns; raise WinnowError for what a function of a plugin raises."""
        with self.entry.failures():
            result = self.entry.fn(*args, **self.options)
        return self._items(result) if isinstance(result, Iterator) else result

    def _items(self, iterator: Iterator[Any]) -> Iterator[Any]:
        with self.entry.failures():  # of a generator, which runs only now
            yield from iterator

    def wrong_result(self, result: Any, expected: str, of: str = "") -> WinnowError:
        """Return the error that the function returned, `of` some argument, something else than it must return."""
        if hasattr(result, "dtype") and hasattr(result, "__len__"):  # an array or a tensor, of any size
            text = f"{type(result).__name__} of {result.dtype} and shape {list(result.shape)}"
        else:
            text = " ".join(repr(result).split())
        text = text if len(text) <= 80 else f"{text[:77]}..."
        return WinnowError(f"{self.entry.location()}: must return {expected}; got {text}{of and f' for {of}'}")

    def __hash__(self) -> int:
        return hash(str(self))  # the options are a dict; equal name and equal options are one value

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in (self.entry.declared | self.options).items())
        return f"{self.name}({options})"


def bound_entries(value: Any) -> Iterator[Entry]:
    """Yield the entries of all functions bound in an option, however deeply nested."""
    if isinstance(value, Bound):
        yield value.entry
        yield from bound_entries(value.options)
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from bound_entries(item)


class RegistryDecorator(Protocol):
    """Decorator with or without arguments."""

    @overload
    def __call__(self, fn: Function, /) -> Function: ...
    @overload
    def __call__(self, *, aliases: tuple[str, ...] = (), **metadata: Any) -> Callable[[Function], Function]: ...


class Registry:
    """Functions of one kind by name. As an annotation, `Annotated[Bound, registry]` is an option type.

    arguments: names of the positional arguments that a function is called with; any if there are none. metadata: type
    of what its decorator sets, `NotRequired[...]` what it may leave out. All may set `version` and `aliases`.
    plain: of a function in a file that `{name: python, file: ..., function: ...}` names, from the function and the
    other options: its arguments and its metadata; None if no option may name a file. Options that it removes, because
    it makes metadata of them, stay in the key.
    """

    def __init__(self, kind: str, *arguments: str, plain: PlainFunction | None = None, **metadata: Any) -> None:
        self.kind, self.arguments, self.plain = kind, arguments, plain
        config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
        optional: Any = NotRequired  # mypy knows no type of such a form
        fields: dict[str, Any] = {
            name: (get_args(hint)[0], None) if get_origin(hint) is optional else (hint, ...)
            for name, hint in (COMMON_METADATA | metadata).items()
        }
        self.metadata = create_model(kind, __config__=config, **fields)
        self.entries: dict[str, Entry] = {}
        self.aliases: dict[str, str] = {}  # alias -> name of the entry

    @overload
    def __call__(self, fn: Function, /) -> Function: ...
    @overload
    def __call__(
        self, /, *, arguments: tuple[str, ...] | None = None, aliases: tuple[str, ...] = (), **metadata: Any
    ) -> Callable[[Function], Function]: ...

    def __call__(
        self,
        fn: Function | None = None,
        /,
        *,
        arguments: tuple[str, ...] | None = None,
        aliases: tuple[str, ...] = (),
        **metadata: Any,
    ) -> Any:
        """Return a decorator that registers a function by its name, or register a function.

        Recipes may write an alias for the name; the key is the same. Raise TypeError for metadata that are wrong, for
        a function that no recipe could use, and for a name or alias of another function. A name may be registered
        again, as a reloaded module does, but not by a plugin: it would silently replace what a recipe means.
        """

        def register(fn: Function) -> Function:
            name, plugin = str(getattr(fn, "__name__", fn)), loading.get()
            problems = _problems(fn, self.arguments if arguments is None else arguments)
            required = [item for item, field in self.metadata.model_fields.items() if field.is_required()]
            if missing := [item for item in required if item not in metadata]:
                problems.append(f"its decorator must set {', '.join(missing)}")
            else:
                try:
                    validated(self.metadata, metadata | {"aliases": aliases}, noun="metadata")
                except WinnowError as error:
                    problems += error.problems
            if problems:
                raise TypeError(f"{self.kind} {name}: {'; '.join(problems)}")
            if plugin and str(fn.__module__).partition(".")[0] != plugin.module:
                plugin = None  # a module of ours that the plugin is the first to import
            for word in (name, *aliases):
                owner = self.aliases.get(word, word if word in self.entries else None)
                if owner and (plugin or owner != name):
                    other = self.entries[owner]
                    origin = other.plugin.path if other.plugin else other.fn.__module__
                    raise TypeError(f"{self.kind} {word!r} is already registered, in {origin}; choose another name")
            if any(map(registry_in, _option_hints(fn).values())):
                fn = _binding_options(fn)
            entry = Entry(name, fn, metadata, self.kind, aliases, None if plugin and plugin.package else plugin)
            self.entries[name] = entry
            self.aliases |= dict.fromkeys(aliases, name)
            if plugin:
                plugin.registered.append((self, entry))
            # A verifier is a reward and a gold reward.
            setattr(fn, "entries", {**getattr(fn, "entries", {}), self.kind: entry})  # noqa: B010 - unknown to mypy
            setattr(fn, "entry", entry)  # noqa: B010
            return fn

        return register if fn is None else register(fn)

    def decorator(self, *arguments: str, **defaults: Any) -> RegistryDecorator:
        """Return a decorator with arguments and metadata of its own, used as `@verifiable` or `@verifiable(version=3)`.

        Without `arguments`, they are those of the registry.
        """

        def decorate(fn: Function | None = None, /, *, aliases: tuple[str, ...] = (), **metadata: Any) -> Any:
            register = self(arguments=arguments or self.arguments, aliases=aliases, **defaults | metadata)
            return register if fn is None else register(fn)

        return decorate

    def forget(self, entry: Entry) -> None:
        """Remove an entry and its aliases, unless its name belongs to another entry by now."""
        if self.entries.get(entry.name) is entry:
            del self.entries[entry.name]
            self.aliases = {alias: name for alias, name in self.aliases.items() if name != entry.name}

    def find(self, name: str) -> Entry:
        """Return the entry of a name or an alias. Raise WinnowError with the nearest name, or with all of them."""
        canonical = self.aliases.get(name, name)
        if canonical not in self.entries:
            listed = [f"{name} ({', '.join(e.aliases)})" if e.aliases else name for name, e in self.entries.items()]
            from_file = [FROM_FILE] if self.plain else []
            hint = nearest(name, [*self.entries, *self.aliases, *from_file], [*listed, *from_file])
            raise WinnowError(f"unknown {self.kind} {name!r}; {hint}")
        return self.entries[canonical]

    def bind(self, value: Any) -> Bound:
        """Return what a recipe names: a function by its name, or by a mapping with `name` and options."""
        if isinstance(value, Bound):
            return value
        options = {"name": value} if isinstance(value, str) else value
        if not isinstance(options, dict) or not isinstance(options.get("name"), str):
            raise WinnowError(f"must name one {self.kind}, or be a mapping with `name`; got {_shown(value)}")
        rest = {key: item for key, item in options.items() if key != "name"}
        entry = self._in_file(rest) if self.plain and options["name"] == FROM_FILE else self.find(options["name"])
        try:
            return Bound(entry, entry.validate(rest, ""))
        except WinnowError as error:
            raise WinnowError(*(line + self._owners_hint(entry, line, rest) for line in error.problems)) from None

    def having(self, option: str) -> list[str]:
        """Return the names of the functions that have an option of this name."""
        return [name for name, entry in self.entries.items() if option in entry.options.model_fields]

    def _owners_hint(self, entry: Entry, problem: str, options: dict[str, Any]) -> str:
        """Return the end of a problem with an option that other functions have: how to say which one is meant."""
        option = problem.partition(":")[0]
        others = self.having(option)
        if option not in options or option in entry.options.model_fields or not others:
            return ""
        return (
            f"; {entry.name} has none, and of {', '.join(others)} it is one: in a config, "
            f"`{{name: {others[0]}, {option}: {options[option]}}}` is for recipes with that {self.kind} alone"
        )

    def _in_file(self, options: dict[str, Any]) -> Entry:
        """Return the entry of the function that `file` and `function` name, and take both from the options."""
        from pipeline.plugins import load_file

        values = [options.pop(name, None) for name in ("file", "function")]
        if not all(isinstance(value, str) for value in values):
            raise WinnowError(f"`name: {FROM_FILE}` needs `file`, a Python file, and `function`, a name in it")
        file, name = values
        plugin = load_file(Path(file).expanduser().absolute())
        fn = getattr(sys.modules[plugin.module], name, None)
        if not inspect.isfunction(fn):
            functions = [key for key, item in vars(sys.modules[plugin.module]).items() if inspect.isfunction(item)]
            hint = nearest(name, functions) if functions else "it defines no function"
            raise WinnowError(f"function: no function {name!r} in {plugin.path}; {hint}")
        assert self.plain is not None
        written = dict(options)
        arguments, metadata = self.plain(fn, options)
        declared = {name: value for name, value in written.items() if name not in options and value is not None}
        if problems := _problems(fn, arguments):
            raise WinnowError(*(f"function: {name} of {plugin.path} {problem}" for problem in problems))
        return entry_in_file(plugin, name, metadata, self.kind, declared)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.bind)


def _problems(fn: Function, arguments: tuple[str, ...]) -> list[str]:
    """Return why no recipe could use a function that is called with these positional arguments."""
    inner = inspect.unwrap(fn)
    if not inspect.isfunction(inner):
        return ["must be a function, written with `def`"]
    if inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner):
        return ["must not be async, because nothing awaits it"]
    if not inner.__name__.isidentifier():
        return ["has no name that a recipe could write; write it with `def`"]
    by_kind: dict[Any, list[inspect.Parameter]] = defaultdict(list)
    for item in inspect.signature(inner).parameters.values():
        by_kind[item.kind].append(item)
    problems = []
    if by_kind[inspect.Parameter.VAR_KEYWORD]:
        problems.append("takes ** of any name, and options need names and types: write them after `*`")
    taken = [item.name for item in by_kind[inspect.Parameter.POSITIONAL_ONLY]]
    taken += [item.name for item in by_kind[inspect.Parameter.POSITIONAL_OR_KEYWORD]]
    fits = len(taken) <= len(arguments) if by_kind[inspect.Parameter.VAR_POSITIONAL] else len(taken) == len(arguments)
    if arguments and not fits:
        problems.append(
            f"is called with {len(arguments)} positional arguments ({', '.join(arguments)}), and takes {len(taken)} "
            f"({', '.join(taken) or 'none'}); options are written after `*`"
        )
    for item in by_kind[inspect.Parameter.KEYWORD_ONLY]:
        if item.annotation is item.empty:
            problems.append(f"option {item.name} has no type; write it as `{item.name}: float`")
        if item.name.startswith("_") or hasattr(BaseModel, item.name) or (arguments and item.name == "name"):
            problems.append(f"an option cannot be called {item.name}; choose another name")
    return problems


def registry_in(hint: Any) -> Registry | None:
    """Return the registry in a type, which is `Annotated[Bound, registry]` somewhere in it, or None."""
    if isinstance(hint, Registry):
        return hint
    return next(filter(None, map(registry_in, get_args(hint))), None)


def registry_of(option: FieldInfo) -> Registry | None:
    """Return the registry of which an option names one function, or None; an option that is a list names several."""
    if get_origin(option.annotation) is list:
        return None
    return next(filter(None, map(registry_in, (*option.metadata, option.annotation))), None)


def _binding_options(fn: Function) -> Function:
    """Let a direct call from Python name functions as a recipe does: `compare(..., by="pairwise")`, defaults included.

    Only functions with such options are wrapped. The wrapper has the name of what it wraps, so that both pickle by
    reference; the runner's options are bound already, and pass through it unchanged.
    """

    @cache
    def registry_options() -> type[BaseModel]:
        return options_of(fn, registry_in)

    @wraps(fn)
    def call(*args: Any, **options: Any) -> Any:
        model = registry_options()
        names = {name: options[name] for name in model.model_fields if name in options}
        values = validated(model, names, fn.__name__)
        return fn(*args, **options | {name: getattr(values, name) for name in model.model_fields})

    return call


def _option_hints(fn: Function) -> dict[str, Any]:
    """Return the hints of the options alone: others may name types of libraries that planning does not import."""
    fn = inspect.unwrap(fn)
    annotations = {
        name: item.annotation
        for name, item in inspect.signature(fn).parameters.items()
        if item.kind is item.KEYWORD_ONLY
    }
    return get_type_hints(SimpleNamespace(__annotations__=annotations), fn.__globals__, include_extras=True)


def options_of(fn: Function, chosen: Callable[[Any], object] = lambda hint: True) -> type[BaseModel]:
    """Return a strict pydantic model of the keyword-only parameters; `chosen` selects them by their type."""
    parameters = inspect.signature(fn).parameters
    fields: dict[str, Any] = {
        name: (hint, ... if parameters[name].default is inspect.Parameter.empty else parameters[name].default)
        for name, hint in _option_hints(fn).items()
        if chosen(hint)
    }
    config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, validate_default=True)
    return create_model(fn.__name__, __config__=config, **fields)


def validated(model: type[M], content: Any, prefix: str = "", noun: str = "option") -> M:
    """Return the content as an instance of a pydantic model.

    Raise WinnowError with one line per mistake: place, value, cause and cure. A field's `description` says what its
    value must be, where pydantic's own words would not help; `noun` says what a field is to the user.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        inner = inner_options(model)
        # Of `X | None` pydantic reports both alternatives; that the value is not None helps nobody.
        items = [item for item in error.errors() if item["type"] != "none_required"]
        marks = [mark for field in model.model_fields.values() for mark in field.metadata]
        hints = [mark for mark in marks if isinstance(mark, EntryHint)]
        lines = [line for item in items for line in _error_lines(item, prefix, model, noun, inner, hints)]
        raise WinnowError(*lines) from None


def name_or(model: type[BaseModel], expected: str) -> PlainValidator:
    """Return a validator of a name, null, or a mapping that a model describes; `expected` says so in a message."""

    def parse(value: Any) -> Any:
        if not isinstance(value, str | dict | None):
            raise ValueError(f"must be {expected}")
        return validated(model, value, noun="key") if isinstance(value, dict) else value

    return PlainValidator(parse)


def _shown(value: Any) -> str:
    """Return a value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def inner_options(model: type[BaseModel]) -> dict[str, list[str]]:
    """Return the options of the functions that a model's own options can name: for each, the latter (beta: [rule])."""
    inner: dict[str, list[str]] = {}
    for option, info in model.model_fields.items():
        entries = registry.entries.values() if (registry := registry_of(info)) else ()
        for name in dict.fromkeys(name for entry in entries for name in entry.options.model_fields):
            inner.setdefault(name, []).append(option)
    return inner


def _model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """Return the model of a value inside of another's, `judges.gold` for example, or None if that is no model."""
    hint: Any = model
    for part in [*path, ""]:
        while get_origin(hint) in (Annotated, Union, UnionType):
            hint = next(arm for arm in get_args(hint) if arm is not NoneType)
        is_model = isinstance(hint, type) and issubclass(hint, BaseModel)
        if not part:
            return hint if is_model else None
        if is_model:
            hint = next(
                (info.annotation for name, info in hint.model_fields.items() if part in (name, info.alias)), None
            )
        else:  # of a list, or of a dict's values
            hint = next(iter(get_args(hint)[-1:]), None)
    return None


def _error_lines(
    item: ErrorDetails,
    prefix: str,
    model: type[BaseModel],
    noun: str,
    inner: dict[str, list[str]],
    hints: list[EntryHint],
) -> list[str]:
    """Return one error of pydantic as lines that name place, value, cause and cure."""
    # Names that pydantic gives to validators and alternatives are not places in a recipe.
    path = [str(part) for part in item["loc"] if not str(part).startswith(("function-", "none", "["))]
    where, cause = ".".join([prefix, *path]).strip("."), item.get("ctx", {}).get("error")
    level = _model_at(model, path[:-1])
    fields = {field.alias or name: field.description for name, field in level.model_fields.items()} if level else {}
    description = fields.get(path[-1]) if path else None
    if isinstance(cause, WinnowError):  # of a nested function: its places continue ours
        nested = (problem.partition(": ") for problem in cause.problems)
        return [
            f"{where}.{option}: {rest}" if colon and " " not in option else f"{where}: {option}{colon}{rest}"
            for option, colon, rest in nested
        ]
    if item["type"] == "extra_forbidden":
        if len(path) == 1 and path[0] in inner:
            options = " or ".join(f"{prefix}.{option}.{path[0]}".strip(".") for option in inner[path[0]])
            return [f"{where}: unknown {noun}; set {options}"]
        is_called_otherwise = not {FORMER.get(path[-1]), ELSEWHERE.get(path[-1])}.isdisjoint(fields)
        for hint in hints if len(path) == 1 and not is_called_otherwise else ():
            if text := hint.of(path[0], item["input"]):
                return [f"{where}: unknown {noun}; {text}"]
        return [
            f"{where}: unknown {noun}; {nearest(path[-1], list(fields)) if fields else f'there are no {noun}s here'}"
        ]
    if item["type"] == "missing":
        return [f"{where}: required, but not set" + (f"; it must be {description}" if description else "")]
    if cause:
        return [f"{where}: {cause} (got {_shown(item['input'])})"]
    message = item["msg"].replace("Input should be", "must be")
    message = f"must be {description}" if description else message[0].lower() + message[1:]
    return [f"{where}: {message}, got {_shown(item['input'])}"]

"""Reference of recipes, stages and options, generated from signatures and docstrings.

`winnow recipes` and `winnow options` print it, and tests/readmes.py writes it into the READMEs.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa

from jobs.recipes import FOLDER, names
from pipeline.config.recipe import load_recipe
from pipeline.config.rounds import split_round
from pipeline.registry import FROM_FILE, Entry, Range, Registry, nearest
from pipeline.stage import signature_of, stages
from pipeline.store.fingerprints import AdapterPath, ContentPath, DataPath, ModelPath, TemplatePath
from schemas import WinnowError, table_name

PIPELINE_ORDER = ("data", "sampling", "ranking", "selection", "network", "training", "head", "evaluation")
PATHS = {
    DataPath: "path of a file or folder",
    ModelPath: "path of a model folder, or org/name",
    AdapterPath: "path of an adapter folder, or org/name",
    TemplatePath: "path of a Jinja file",
    ContentPath: "path",
}
ABOUT_FILE = "Call a function of a Python file of yours, which needs no decorator."


def recipe_table() -> pa.Table:
    """Return a row per recipe that ships: its name, what it is, and the objective of its policy."""
    rows = []
    for name in names():
        recipe = load_recipe(FOLDER / f"{name}.yaml", library=(FOLDER,))  # no plan: that would need data and models
        needed = recipe.targets
        for step in needed:
            sources = (recipe.steps[step].get("from") or {}).values()
            needed += [source for source in sources if source and source not in needed]
        options = {split_round(step)[0]: recipe.steps[step].get("with") or {} for step in needed}
        objective = "none"
        if policy := options.get("optimize"):
            objective = _function_name(policy["objective"])
            if "nll_weight" in policy:
                objective += f" + {policy['nll_weight']:g} nll"
            if "mix" in policy:
                objective += f", mix {_function_name(policy['mix'])} with nll"
        elif "preference_head" in options:
            objective = f"{_function_name(options['preference_head']['head'])} (head)"
        rows.append({"recipe": name, "about": recipe.about, "objective": objective})
    return pa.Table.from_pylist(rows)


def _function_name(value: Any) -> str:
    return str(value["name"] if isinstance(value, dict) else value)


def stage_table() -> pa.Table:
    """Return a row per stage, in the order of the pipeline, with the first line of its docstring."""
    return pa.Table.from_pylist([{"stage": entry.name, "about": first_line(entry)} for entry in stage_entries()])


def stage_entries() -> list[Entry]:
    """Return the stages of this package in the order of the pipeline, then those of plugins."""

    def position(entry: Entry) -> tuple[int, str]:
        package = [*entry.fn.__module__.split("."), ""][1]
        return (PIPELINE_ORDER.index(package) if package in PIPELINE_ORDER else len(PIPELINE_ORDER)), entry.name

    return sorted(stages.entries.values(), key=position)


def registries() -> dict[str, Registry]:
    """Return the registries of the functions that an option of a stage or of another function can name, by kind."""
    by_kind: dict[str, Registry] = {}
    entries = list(stages.entries.values())
    for entry in entries:
        for field in entry.options.model_fields.values():
            for registry in _registries_in(Annotated[field.annotation, None, *field.metadata]):
                if registry.kind not in by_kind:
                    by_kind[registry.kind] = registry
                    entries += registry.entries.values()
    return by_kind


def _registries_in(hint: Any) -> Iterator[Registry]:
    for arg in get_args(hint):  # the metadata of Annotated among them
        if isinstance(arg, Registry):
            yield arg
        else:
            yield from _registries_in(arg)


def option_pages(name: str) -> list[str]:
    """Return Markdown pages of the stage, and of all registered functions, with this name or alias.

    Raise WinnowError with the nearest name if there are none.
    """
    pages = [stage_page(entry) for entry in stages.entries.values() if name == entry.name]
    by_kind = {"stage": list(stages.entries)}
    for kind, registry in registries().items():
        by_kind[kind] = [*registry.entries, *registry.aliases, *([FROM_FILE] if registry.plain else [])]
        if name in (kind, _variable(registry)):
            rows = [{"name": f"`{entry.name}`", "about": first_line(entry)} for entry in registry.entries.values()]
            rows += [{"name": f"`{FROM_FILE}`", "about": ABOUT_FILE}] if registry.plain else []
            pages.append("\n".join([f"# {kind}", "", rows_as_markdown(rows)]))
        for entry in registry.entries.values():
            if name in (entry.name, *entry.aliases):
                pages.append(function_page(entry, registry.kind))
        if registry.plain and name == FROM_FILE:
            pages.append(file_page(registry))
    if not pages:
        every = list(dict.fromkeys([*by_kind, *(item for names in by_kind.values() for item in names)]))
        hint = nearest(name, every)
        listed = [] if "did you mean" in hint else [f"{kind}: {', '.join(sorted(by_kind[kind]))}" for kind in by_kind]
        unknown = f"options {name}: no stage, kind of function or function {name!r}"
        raise WinnowError(f"{unknown}; {'known are' if listed else hint}", *listed)
    return pages


def _variable(registry: Registry) -> str | None:
    """Return the name by which code imports a registry, as in `from stages.data.formats import preference_reader`."""
    modules = {entry.fn.__module__ for entry in registry.entries.values()}
    values = (item for module in modules for item in vars(sys.modules[module]).items())
    return next((name for name, value in values if value is registry), None)


def stage_page(entry: Entry) -> str:
    """Return Markdown of a stage: docstring, inputs, outputs, options, and the functions that they can name."""
    signature = signature_of(entry)
    inputs = [f"`{i.name}` ({'model' if i.schema is None else f'table `{i.kind}`'}{', optional' if i.optional else ''})"
              for i in signature.inputs]  # fmt: skip
    outputs = [f"table `{table_name(schema)}`" for schema in signature.outputs] + ["model"] * signature.makes_model
    lines = [f"# {entry.name}", "", docstring(entry), ""]
    lines += [f"Inputs: {', '.join(inputs) or 'none'}.  ", f"Outputs: {', '.join(outputs)}."]
    lines += ["", options_markdown(entry)]
    for option, field in entry.options.model_fields.items():
        for registry in _registries_in(Annotated[field.annotation, None, *field.metadata]):
            rows = [{option: ", ".join(f"`{name}`" for name in (item.name, *item.aliases)), "about": first_line(item)}
                    for _, item in sorted(registry.entries.items())]  # fmt: skip
            rows += [{option: f"`{FROM_FILE}`", "about": ABOUT_FILE}] if registry.plain else []
            lines += ["", rows_as_markdown(rows)]
    return "\n".join(lines)


def function_page(entry: Entry, kind: str) -> str:
    """Return Markdown of a registered function: docstring and options."""
    return "\n".join([f"# {entry.name} ({kind})", "", docstring(entry), "", options_markdown(entry)])


def file_page(registry: Registry) -> str:
    """Return Markdown of a function in a file of the user's, which an option takes in place of a registered one."""
    about = f"{ABOUT_FILE} Its content is part of the key, and its keyword-only parameters are further options."
    options = [{"option": "`file`", "type": "path of a Python file", "default": "required"},
               {"option": "`function`", "type": "name of a function in it", "default": "required"}]  # fmt: skip
    return "\n".join([f"# {FROM_FILE} ({registry.kind})", "", about, "", rows_as_markdown(options)])


def options_markdown(entry: Entry) -> str:
    """Return a Markdown table of the options of a stage or function, or a sentence if it has none."""
    rows = []
    for name, field in entry.options.model_fields.items():
        value = json.dumps(field.default, default=str).replace("Infinity", ".inf")  # as YAML writes it
        default = "required" if field.is_required() else f"`{value}`"
        note = " (not part of the key)" if name in entry.execution else ""
        note += " (in part not part of the key)" if name in entry.execution_entries else ""
        rows.append({
            "option": f"`{name}`",
            "type": describe_type(field.annotation, tuple(field.metadata)) + note,
            "default": default,
        })  # fmt: skip
    return rows_as_markdown(rows) if rows else "No options."


def describe_type(hint: Any, metadata: tuple[Any, ...] = ()) -> str:
    """Return the type of an option in words, with bounds and choices: `int > 0`, `vllm` or `fake`, list of str."""
    if get_origin(hint) is Annotated:
        base, *more = get_args(hint)
        return describe_type(base, (*metadata, *more))
    for item in metadata:
        if isinstance(item, Registry):
            return item.kind
    bounds = [item for item in metadata if isinstance(item, Range)]
    args = get_args(hint)
    match get_origin(hint):
        case origin if origin in (Union, UnionType):
            return " or ".join(describe_type(arg) for arg in args)
        case origin if origin is Literal:
            return " or ".join(f"`{value}`" for value in args)
        case origin if origin is list:
            return f"list of {describe_type(args[0])}"
        case origin if origin is dict:
            return f"mapping of {describe_type(args[0])} to {describe_type(args[1])}"
    if hint is NoneType:
        return "null"
    text = PATHS.get(hint) or str(getattr(hint, "__name__", hint))
    symbols = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    limits = [
        (symbol, value)
        for item in bounds
        for name, symbol in symbols.items()
        if (value := getattr(item, name)) is not None
    ]
    finite = "finite " if any(abs(value) == float("inf") for _, value in limits) else ""
    written = [(symbol, f"{value:,}" if isinstance(value, int) else f"{value:g}") for symbol, value in limits]
    words = [f"{symbol} {value}" for symbol, value in written if "inf" not in value]
    return f"{finite}{text} {', '.join(words)}".strip()


def docstring(entry: Entry) -> str:
    """Return the docstring of a function as Markdown."""
    text = inspect.cleandoc(entry.fn.__doc__ or "")
    return re.sub(r"([*<])", r"\\\1", text)


def first_line(entry: Entry) -> str:
    """Return the first line of a function's docstring."""
    return docstring(entry).partition("\n")[0]


def rows_as_markdown(rows: list[dict[str, str]]) -> str:
    """Return a Markdown table with the keys of the first row as its header."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)

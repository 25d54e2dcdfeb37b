"""Precision of a whole recipe: `dtype` at its top is the option `dtype` of each stage and function that has one.

What a recipe, a config or --set says of a step outranks it. Without it each stage has its own default, which does not
depend on the machine: a plan made on a laptop and one made beside a GPU have the same keys.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from pipeline.config.layers import Origin
from pipeline.config.recipe import Recipe
from pipeline.config.rounds import split_round
from pipeline.registry import Bound, registry_of
from pipeline.stage import stages
from schemas import WinnowError

DTYPE = "dtype"


def with_dtype(recipe: Recipe) -> Recipe:
    """Return the recipe with its `dtype` in the options of each step that has one, and the origins of these."""
    if recipe.dtype is None:
        return recipe
    dtype, origin = recipe.dtype
    steps, origins = dict(recipe.steps), dict(recipe.origins)
    for name, body in recipe.steps.items():
        try:
            entry = stages.find(body.get("use", name))
        except WinnowError:  # reported when the plan is checked
            continue
        options, paths = _inherit(entry.options, body.get("with") or {}, dtype)
        if paths:
            steps[name] = body | {"with": options}
            origins[name] = origins.get(name, {}) | dict.fromkeys(paths, origin)
    return replace(recipe, steps=steps, origins=origins)


def mixed_precision(steps: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Origin]]]) -> list[str]:
    """Return a note if a config sets bfloat16 for some steps, and others compute in float32 by default.

    steps: options and their origins by name of the step.
    """
    written: dict[str, None] = {}
    defaults: dict[str, None] = {}
    for name, (options, origins) in steps.items():
        step = split_round(name)[0]
        for path, value in _dtypes(options):
            if value == "bfloat16" and ".".join(path) in origins:
                written[".".join([step, *path[:-1]])] = None
        defaults |= dict.fromkeys(".".join(filter(None, [step, of])) for of in float32_by_default(options, origins))
    if not written or not defaults:
        return []
    return [
        f"dtype: {', '.join(defaults)} compute in float32, the default, and {', '.join(written)} in bfloat16, as you "
        "say; `dtype: bfloat16` at the top of a config is for all of them"
    ]


def float32_by_default(options: Mapping[str, Any], origins: Mapping[str, Origin]) -> list[str]:
    """Return which precisions of a step, by the function that has it or "", are float32 because nobody said another."""
    return [
        ".".join(path[:-1]) for path, value in _dtypes(options) if value == "float32" and ".".join(path) not in origins
    ]


def _inherit(model: type[BaseModel], options: Mapping[str, Any], dtype: str) -> tuple[dict[str, Any], list[str]]:
    """Return the options of a stage or function with `dtype` where it has one and is not given one, and their paths.

    So do functions in its options, by name or by default: `by: pairwise` becomes `by: {name: pairwise, dtype: ...}`.
    """
    options, paths = dict(options), list[str]()
    for name, field in model.model_fields.items():
        if name == DTYPE and name not in options:
            options[name] = dtype
            paths.append(name)
        registry = registry_of(field)
        written = options.get(name, field.default)
        function = {"name": written} if isinstance(written, str) else written
        if registry and isinstance(function, dict) and isinstance(function.get("name"), str):
            with suppress(WinnowError):  # an unknown function, reported when the plan is checked
                inner, inner_paths = _inherit(registry.find(function["name"]).options, function, dtype)
                if inner_paths:
                    options[name] = inner
                    paths += [f"{name}.{path}" for path in inner_paths]
    return options, paths


def _dtypes(options: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield path and value of each `dtype` in checked options, of functions in them too."""
    for name, value in options.items():
        if name == DTYPE:
            yield (name,), value
        if isinstance(value, Bound):
            yield from (((name, *path), inner) for path, inner in _dtypes(value.options))

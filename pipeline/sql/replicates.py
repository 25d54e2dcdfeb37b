"""Replicates: steps that differ in seeds alone, in their own or in those of what they were computed from.

Nothing of it is stored: it follows from the identities in the manifests, so it holds for runs of any age and name. A
seed is an option called `seed` of a stage or of a registered function; another library's options, such as
`engine_options`, are taken as they are.
"""

import json
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Any

from pipeline.config.keys import key_of
from pipeline.store.manifests import VERIFY_HINT
from pipeline.store.store import Json
from schemas import WinnowError

SEED = "seed"


def seeds_of(options: Any, path: str = "", is_owner: bool = True) -> Iterator[tuple[str, int]]:
    """Yield each seed by its dotted path, given options as a manifest has them."""
    if isinstance(options, dict):
        for name, value in options.items():
            below = f"{path}.{name}" if path else name
            if name == SEED and is_owner and type(value) is int:
                yield below, value
            else:
                yield from seeds_of(value, below, _is_function(value))
    elif isinstance(options, list):
        for number, value in enumerate(options):
            yield from seeds_of(value, f"{path}.{number}", _is_function(value))


def without_seeds(options: Any, is_owner: bool = True) -> Any:
    """Return the options without seeds."""
    if isinstance(options, dict):
        return {
            name: without_seeds(value, _is_function(value))
            for name, value in options.items()
            if not (name == SEED and is_owner and type(value) is int)
        }
    if isinstance(options, list):
        return [without_seeds(value, _is_function(value)) for value in options]
    return options


def _is_function(value: Any) -> bool:
    """Return whether options are those of a registered function, as pipeline/config/keys.py writes them."""
    return isinstance(value, dict) and {"name", "version"} <= value.keys()


def method_keys(manifests: list[Json]) -> dict[str, str]:
    """Return key -> the key that the step would have if neither it nor any step behind it had a seed.

    An input that is not finished here, as behind an adopted result, counts by its own key. Raises WinnowError for steps
    that were computed from each other, which only a damaged store has.
    """
    identities = {manifest["key"]: {"stage": manifest["stage"]} | manifest["identity"] for manifest in manifests}
    inputs = {key: list(identity["inputs"].values()) for key, identity in identities.items()}
    try:
        order = list(TopologicalSorter(inputs).static_order())
    except CycleError as error:
        raise WinnowError(f"manifests name each other as inputs: {' -> '.join(error.args[1])}; {VERIFY_HINT}") from None
    methods: dict[str, str] = {}
    for key in order:
        if key not in identities:
            methods[key] = key
            continue
        identity = identities[key]
        sources = {name: methods[source] for name, source in identity["inputs"].items()}
        methods[key] = key_of(identity | {"options": without_seeds(identity["options"]), "inputs": sources})
    return methods


def drawn_from(identity: Json) -> str:
    """Return the key of a step without its own seeds: two samples with one of it are draws from one policy."""
    return key_of(identity | {"options": without_seeds(identity["options"])})


def with_methods(runs: dict[str, Json], manifests: list[Json]) -> dict[str, Json]:
    """Return the links of runs with `method` and `seeds` of each finished step.

    `seeds` is JSON of every seed that the step depends on, by step of the run: {"optimize.seed": 0, "sample.seed": 0}.
    """
    identities = {manifest["key"]: manifest["identity"] for manifest in manifests}
    methods = method_keys(manifests)
    step_seeds = {key: list(seeds_of(identity["options"])) for key, identity in identities.items()}
    result: dict[str, Json] = {}
    for run, steps in runs.items():
        names: dict[str, str] = {}
        for step, link in steps.items():
            names.setdefault(link["key"], step)
        result[run] = {}
        for step, link in steps.items():
            method, seeds = None, None
            if link["key"] in identities:
                method = methods[link["key"]]
                values = {
                    f"{names.get(key, key)}.{path}": seed
                    for key in keys_behind(link["key"], identities)
                    for path, seed in step_seeds.get(key, ())
                }
                seeds = json.dumps(values, sort_keys=True)
            result[run][step] = link | {"method": method, "seeds": seeds}
    return result


def keys_behind(key: str, identities: dict[str, Json]) -> list[str]:
    """Return the key of a step, and those of all steps that it was computed from."""
    keys = [key]
    for reached in keys:  # grows while it is read
        sources = identities[reached]["inputs"].values() if reached in identities else ()
        keys += [source for source in dict.fromkeys(sources) if source not in keys]
    return keys

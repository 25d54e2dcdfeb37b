"""Profiles: a YAML file of `default` and names of stages, each with the resources that differ from the default."""

import math
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from pipeline.config.yaml import parse
from pipeline.registry import nearest
from pipeline.resources import Profile, Resources
from schemas import WinnowError

LEAST = {"cpus": 0, "gpus": 0, "memory": 0, "min_workers": 0, "max_workers": 1, "in_flight": 1, "tensor_parallel": 1}
WHOLE = ("min_workers", "max_workers", "in_flight", "tensor_parallel")
DEFAULTS = {each.name: None if each.default is MISSING else each.default for each in fields(Resources)}


def load_profile(path: Path, stages: list[str]) -> Profile:
    """Raises WinnowError with all that is wrong in the file; `stages` are the names that it may use."""
    try:
        content = parse(path.read_text(encoding="utf-8"), f"profile {path}") or {}
    except (OSError, UnicodeDecodeError) as error:
        raise WinnowError(f"profile {path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise WinnowError(f"profile {path}: must be a mapping of stages, got {content!r}")
    autoscaling = content.pop("autoscaling", False)
    problems = [] if isinstance(autoscaling, bool) else [f"autoscaling: must be true or false, got {autoscaling!r}"]
    for name, body in content.items():
        if name not in ("default", *stages):
            problems.append(f"{name}: unknown stage; {nearest(str(name), ['default', 'autoscaling', *stages])}")
        problems += _problems(str(name), body)
    default = content.get("default") or {}
    whole = {name: default | (body or {}) for name, body in content.items()} if not problems else {}
    problems += [problem for name, body in whole.items() for problem in _contradictions(name, body)]
    if problems:
        raise WinnowError(*(f"profile {path}: {problem}" for problem in problems))
    return Profile(
        Resources(**whole.pop("default", {})), {n: Resources(**body) for n, body in whole.items()}, autoscaling
    )


def _problems(stage: str, body: Any) -> list[str]:
    """What is wrong with each of a stage's resources by itself."""
    if not isinstance(body, dict | None):
        return [f"{stage}: must be a mapping of resources, got {body!r}"]
    problems = []
    for name, value in (body or {}).items():
        if name not in DEFAULTS:
            problems.append(f"{stage}.{name}: unknown; {nearest(str(name), list(DEFAULTS))}")
        elif (value, DEFAULTS[name]) != (None, None) and (wrong := _misfit(name, value)):
            problems.append(f"{stage}.{name}: must be {wrong}, got {value!r}")
    return problems


def _misfit(name: str, value: Any) -> str | None:
    """What the value must be, if it is not."""
    if name == "accelerator_type":
        return None if isinstance(value, str) else "Ray's name of an accelerator, such as H100"
    kinds = int if name in WHOLE else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not LEAST[name] <= value < math.inf:
        return f"{'a whole number' if name in WHOLE else 'a number'} from {LEAST[name]}"
    if name == "gpus" and value > 1 and value != int(value):
        return "a whole number, or a share below 1"
    return None


def _contradictions(stage: str, body: dict[str, Any]) -> list[str]:
    """What does not go together in a stage's resources, the default's among them."""
    each: dict[str, Any] = DEFAULTS | body
    problems = []
    if each["max_workers"] is not None and each["min_workers"] > each["max_workers"]:
        problems.append(f"{stage}.min_workers: {each['min_workers']} is more than max_workers, {each['max_workers']}")
    if each["tensor_parallel"] > max(1, each["gpus"] or 0):
        has = "not said" if each["gpus"] is None else each["gpus"]
        problems.append(f"{stage}.gpus: {has}, and tensor_parallel: {each['tensor_parallel']} needs as many")
    return problems

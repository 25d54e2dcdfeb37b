"""Profiles: a YAML file of `default` and names of stages, each with the resources that differ from the default."""

from pathlib import Path
from typing import Any

from pipeline.registry import nearest
from pipeline.resources import Profile, Resources
from pipeline.syntax import parse
from schemas import WinnowError

LEAST = {"cpus": 0, "gpus": 0, "memory": 0, "min_workers": 0, "max_workers": 1, "in_flight": 1, "tensor_parallel": 1}
WHOLE = ("min_workers", "max_workers", "in_flight", "tensor_parallel")


def load_profile(path: Path, stages: list[str]) -> Profile:
    """Raises WinnowError with all that is wrong in the file; `stages` are the names that it may use."""
    try:
        content = parse(path.read_text(encoding="utf-8"), f"profile {path}")
    except OSError as error:
        raise WinnowError(f"profile {path}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise WinnowError(f"profile {path}: must be a mapping of stages, got {type(content).__name__}")
    autoscaling = content.pop("autoscaling", False)
    problems = [] if isinstance(autoscaling, bool) else [f"autoscaling: must be true or false, got {autoscaling!r}"]
    for name, body in content.items():
        if name not in ("default", *stages):
            problems.append(f"{name}: unknown stage; {nearest(str(name), ['default', 'autoscaling', *stages])}")
        problems += _problems(str(name), body)
    if problems:
        raise WinnowError(*(f"profile {path}: {problem}" for problem in problems))
    default = content.pop("default", None) or {}
    made = {name: Resources(**(default | (body or {}))) for name, body in content.items()}
    return Profile(Resources(**default), made, autoscaling)


def _problems(stage: str, body: Any) -> list[str]:
    if not isinstance(body, dict | None):
        return [f"{stage}: must be a mapping of resources, got {body!r}"]
    known = list(Resources.__dataclass_fields__)
    problems = []
    for name, value in (body or {}).items():
        if name not in known:
            problems.append(f"{stage}.{name}: unknown; {nearest(str(name), known)}")
        elif value is not None and (wrong := _misfit(name, value)):
            problems.append(f"{stage}.{name}: must be {wrong}, got {value!r}")
    least, most = (body or {}).get("min_workers"), (body or {}).get("max_workers")
    if isinstance(least, int) and isinstance(most, int) and least > most:
        problems.append(f"{stage}.min_workers: {least} is more than max_workers, {most}")
    return problems


def _misfit(name: str, value: Any) -> str | None:
    """What the value must be, if it is not."""
    if name == "accelerator_type":
        return None if isinstance(value, str) else "Ray's name of an accelerator, such as H100"
    kinds = int if name in WHOLE else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not value >= LEAST[name]:
        return f"{'a whole number' if name in WHOLE else 'a number'} from {LEAST[name]}"
    return None

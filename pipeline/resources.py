"""What each stage's workers have, as a profile says it. Resources are never part of a key."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.registry import nearest, validated
from schemas import WinnowError

STRICT = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
CPU_WORKERS = 2  # of a step on a cluster without GPUs, unless the profile or the command says how many
Amount = Annotated[float, Field(ge=0)]


class Resources(BaseModel):
    """Resources of one worker of a stage, and how many workers the stage has.

    The workers of a stage without `cpus` share all that the cluster has. Without `gpus`, each has one if the stage
    reads a model, be it for the tokenizer. `min_workers` stay up while their step waits for parts of the previous step,
    unless another step waits for their resources. `max_workers` is the most there may be (None: `--workers`, or as many
    as there are GPUs for, or `min_workers` if that is more). `gpu_memory` is what one GPU has: a step that cannot fit
    is refused when it is planned.
    `piece_memory` GiB of its tables are read at a time by a stage that treats each prompt by itself.
    `in_flight` parts are with a worker at a time, so that its engine does not idle between two.
    """

    model_config = STRICT

    cpus: Amount | None = None
    gpus: Amount | None = None
    memory: Amount | None = Field(default=None, description="a finite number of GiB, at least 0")
    gpu_memory: Annotated[float, Field(gt=0)] | None = Field(default=None, description="GiB of one GPU, above 0")
    accelerator_type: str | None = Field(default=None, description="Ray's name of an accelerator, such as H100")
    piece_memory: Annotated[float, Field(gt=0)] = Field(default=0.125, description="GiB of tables, above 0")
    min_workers: int = Field(default=0, ge=0)
    max_workers: int | None = Field(default=None, ge=1)
    in_flight: int = Field(default=2, ge=1)
    tensor_parallel: int = Field(default=1, ge=1)

    @field_validator("gpus")
    @classmethod
    def check_share_of_gpu(cls, gpus: float | None) -> float | None:
        """Raise WinnowError for 1.5 GPUs: Ray gives whole ones, or a share of one."""
        if gpus and gpus > 1 and not gpus.is_integer():
            raise WinnowError(f"must be a whole number, or a share below 1, got {gpus}")
        return gpus

    @model_validator(mode="after")
    def check_contradictions(self) -> "Resources":
        """Raise WinnowError with all pairs of fields that contradict each other."""
        problems = []
        if self.max_workers is not None and self.min_workers > self.max_workers:
            problems.append(f"min_workers: must be <= max_workers ({self.max_workers}), got {self.min_workers}")
        if self.tensor_parallel > max(1, self.gpus or 0):
            gpus = "no value" if self.gpus is None else f"{self.gpus:g}"
            problems.append(f"gpus: must be >= tensor_parallel ({self.tensor_parallel}), got {gpus}")
        if problems:
            raise WinnowError(*problems)
        return self


_current: ContextVar[Resources] = ContextVar("resources", default=Resources())  # noqa: B039 - frozen


def current_resources() -> Resources:
    """Return the resources of the worker whose task runs in this thread; without a task, those that set nothing."""
    return _current.get()


@contextmanager
def working_with(resources: Resources) -> Iterator[None]:
    """Let what runs inside have these resources as its own."""
    token = _current.set(resources)
    try:
        yield
    finally:
        _current.reset(token)


def hide_gpus() -> None:
    """Let libraries of this process see no GPU: Ray leaves all of them visible to a worker that has reserved none."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def visible_gpus() -> int:
    """Return how many NVIDIA GPUs this process may use; torch, which knows better, takes seconds to load."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is not None:
        return len([name for name in names.split(",") if name.strip()])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


class Profile(BaseModel):
    """Resources by stage. With `autoscaling`, a cluster that is too small now is accepted: it may grow.

    rates: by stage, what one device does in a second, for `plan` to say how long a step takes: tokens of `sample`,
    `reference`, `features` and `optimize`, calls of a ranker of the others. They outrank what the store has measured.
    """

    model_config = STRICT

    default: Resources = Resources()
    stages: dict[str, Resources] = {}
    autoscaling: bool = False
    rates: dict[str, Annotated[float, Field(ge=1e-6, le=1e12)]] = {}

    def of(self, stage: str) -> Resources:
        """Return the resources of a stage: its own, or the default."""
        return self.stages.get(stage, self.default)


def load_profile(path: Path, stages: list[str]) -> Profile:
    """Read a profile from YAML: `default`, `autoscaling`, and stages with the resources that differ from the default.

    Raise WinnowError with all problems of the file; `stages` are the names that it may use.
    """
    from pipeline.config.yaml import read_yaml  # PyYAML may be missing on a training machine, which reads no profile

    content = read_yaml(path, "profile") or {}
    if not isinstance(content, dict):
        raise WinnowError(f"profile {path}: must be a mapping of stages, got {content!r}")
    names = ["default", "autoscaling", "rates", *stages]
    problems = [f"{name}: unknown stage; {nearest(str(name), names)}" for name in content if name not in names]

    # The default first: its problems are reported once, not again for each stage that inherits them
    default: dict[str, Any] = {}
    resources: dict[str, Any] = {}
    for name in sorted(content, key=lambda name: name != "default"):
        if name in ("autoscaling", "rates"):
            continue
        body = {} if content[name] is None else content[name]
        try:
            if not isinstance(body, dict):
                raise WinnowError(f"{name}: must be a mapping of resources, got {body!r}")
            resources[str(name)] = validated(Resources, default | body, str(name), noun="resource")
            default = body if name == "default" else default
        except WinnowError as error:
            problems += error.problems
    try:
        base, autoscaling = resources.pop("default", Resources()), content.get("autoscaling", False)
        rates = content.get("rates") or {}
        profile = validated(Profile, {"default": base, "stages": resources, "autoscaling": autoscaling, "rates": rates})
        problems += [f"rates.{name}: unknown stage; {nearest(name, stages)}" for name in rates if name not in stages]
    except WinnowError as error:
        problems += error.problems
    if problems:
        raise WinnowError(*(f"profile {path}: {problem}" for problem in problems))
    return profile

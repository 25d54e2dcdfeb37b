"""What a stage's workers are given: never part of a key."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Resources:
    """Of one worker of a stage, and how many there are.

    A stage without `cpus` and `gpus` shares all that the cluster has among its workers, GPUs only if it reads a model,
    be it for its tokenizer. `min_workers` are kept while their step waits for parts of the one before, unless another
    step waits for what they hold; there are never more than `max_workers` (None: what `--workers` says, or
    `min_workers` if those are more). `in_flight` parts are with a worker at a time, so that its engine never runs dry
    between two. `memory` is GiB.
    """

    cpus: float | None = None
    gpus: float | None = None
    memory: float | None = None
    accelerator_type: str | None = None
    min_workers: int = 0
    max_workers: int | None = None
    in_flight: int = 2
    tensor_parallel: int = 1


@dataclass(frozen=True)
class Profile:
    """Resources by stage. `autoscaling`: a cluster that is too small today is not refused, for it may grow."""

    default: Resources = field(default_factory=Resources)
    stages: dict[str, Resources] = field(default_factory=dict)
    autoscaling: bool = False

    def of(self, stage: str) -> Resources:
        return self.stages.get(stage, self.default)

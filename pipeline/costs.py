"""Estimate what a step will take: memory of a device, rows, work and hours, each exact, a bound or a guess.

A stage says what it takes as functions of its options and inputs (`Cost`, in its decorator); this file asks them for
the steps of a plan, beside what the store has of them. Estimates are marked as such everywhere.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

GIB = 2**30
MODEL_ERROR = 0.15  # of an estimate of memory, as stages/training/README.md has it measured


@dataclass(frozen=True)
class Device:
    """Device that holds the network of one worker: a GPU, or a machine's RAM. memory: bytes, None if unknown.

    count: GPUs of a worker, among which vLLM divides a network (`tensor_parallel` of the profile).
    """

    kind: Literal["cpu", "cuda"] = "cpu"
    memory: float | None = None
    count: int = 1


@dataclass(frozen=True)
class Need:
    """Memory that a step takes of each device, in bytes by what it is for, and the network that it holds.

    note: what the step will do to take so little, if it decides that by the device's memory.
    """

    parameters: int
    dtype: str
    parts: Mapping[str, float]
    note: str = ""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


class NotEstimatedError(Exception):
    """Error of a stage's `need` for a network whose memory it does not count; the text says what it is."""


Known = Literal["exactly", "estimated", "at most", "at most about"]


@dataclass(frozen=True)
class Amount:
    """Number, and what is known of it; a value of None is unknown.

    It is a count, an estimate, an upper bound, or an upper bound that is made of an estimate.
    """

    value: float | None
    known: Known = "exactly"

    def times(self, factor: "float | Amount") -> "Amount":
        """Return the product; known as `worse` says."""
        other = factor if isinstance(factor, Amount) else Amount(factor)
        if self.value is None or other.value is None:
            return UNKNOWN
        return Amount(self.value * other.value, worse(self, other))

    def plus(self, other: "Amount") -> "Amount":
        """Return the sum; known as `worse` says."""
        if self.value is None or other.value is None:
            return UNKNOWN
        return Amount(self.value + other.value, worse(self, other))


UNKNOWN = Amount(None)


def worse(one: Amount, other: Amount) -> Known:
    """Return how well a combination of two is known."""
    kinds = {one.known, other.known} - {"exactly"}
    if len(kinds) > 1:
        return "at most about"
    return kinds.pop() if kinds else "exactly"


@dataclass(frozen=True)
class Work:
    """Rows that a step makes, by table, and the units that it works through: tokens, or calls of a ranker.

    splits: rows of prompts by split. A stage's `work` may leave out what it does not know.
    """

    rows: Mapping[str, Amount] = field(default_factory=dict)
    units: Amount = UNKNOWN
    unit: str = "tokens"
    splits: Mapping[str, Amount] = field(default_factory=dict)

    def of(self, table: str) -> Amount:
        return self.rows.get(table, UNKNOWN)


Change = tuple[str, Mapping[str, Any], Device]  # a setting to name, the options with it, the device with it
NeedOf = Callable[[Mapping[str, Any], Mapping[str, Any], Device], Need | None]  # of options, inputs, device
LessOf = Callable[[Mapping[str, Any], Device], Iterable[Change]]
DeviceProblemOf = Callable[[Mapping[str, Any], Mapping[str, Any], Device], str]  # of options, inputs, device
GpusOf = Callable[[Mapping[str, Any], Device], int]  # of options, device
WorkOf = Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Work]], Work]  # of options, inputs, their work


@dataclass(frozen=True)
class Cost:
    """What a stage takes, as functions that a plan can call: no weight is loaded, and torch is not imported.

    need: memory per device, None where no network is held, or none is known yet; it raises NotEstimatedError for one
    whose memory is not counted. less: changes that take less memory, in the order in which to try them. work: what it
    makes and goes through, from what its inputs have. device_problem: why it cannot run on such a device, whatever its
    memory, and the cure; "" if it can. gpus: on how many GPUs one worker computes, where it computes on any. The inputs
    are `InputStep`s, as in a stage's `check`.
    """

    need: NeedOf = lambda options, inputs, device: None
    less: LessOf = lambda options, device: ()
    work: WorkOf = lambda options, inputs, work: Work()
    device_problem: DeviceProblemOf = lambda options, inputs, device: ""
    gpus: GpusOf = lambda options, device: 1


NO_COST = Cost()


def memory_problem(
    cost: Cost, options: Mapping[str, Any], inputs: Mapping[str, Any], device: Device
) -> tuple[Need | None, str]:
    """Return the need of a step on a device, and why it cannot fit, with the setting that would; "" if it can.

    An estimate may be off by MODEL_ERROR: what is above the device's memory by less is not refused. Raises
    NotEstimatedError where `need` does.
    """
    need = cost.need(options, inputs, device)
    if need is None or device.memory is None or need.total <= device.memory * (1 + MODEL_ERROR):
        return need, ""
    cure = "no setting would make it fit: take a smaller model or a larger device"
    for setting, changed, changed_device in cost.less(options, device):
        less = cost.need(changed, inputs, changed_device)
        if less and changed_device.memory is not None and less.total <= changed_device.memory:
            cure = f"{setting} would take {less.total / GIB:,.1f} GiB"
            break
    largest = sorted(need.parts.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {size / GIB:,.1f}" for name, size in largest if size >= need.total / 20)
    has = f"{'a GPU has' if device.kind == 'cuda' else 'there are'} {device.memory / GIB:,.1f} GiB"
    return need, f"needs about {need.total / GIB:,.1f} GiB of memory ({parts}), and {has}; {cure}"

"""Costs of a plan's steps: memory per device, rows, work, and time, before they run.

Of finished steps the counts are exact. Of others the stage gives bounds (`Cost.work`), and the store's own finished
steps of the same stage estimates; rates are those that a profile gives, or that the store measured with a network of
the same size. Nothing else is guessed: what is not known is None.
"""

import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.plan import Plan, Step
from pipeline.costs import GIB, UNKNOWN, Amount, Device, Need, NotEstimatedError, Work, memory_problem
from pipeline.resources import Profile
from pipeline.stage import InputStep
from pipeline.store.storage import read
from pipeline.store.store import Json, Store, table_of
from pipeline.store.weights import tensor_shapes, weight_files
from schemas import TABLES, WinnowError

COUNTERS = {"tokens": "tokens", "calls": "ranker_calls"}  # of manifests, by unit
SAME_SIZE = 0.05  # by which two networks of one size may differ: an adapter, a padded vocabulary
DRIVER = Path("/dev/nvidiactl")  # exists where NVIDIA's driver is loaded
LARGEST_READ = GIB // 4  # bytes of a table that is read to count its tokens


@dataclass(frozen=True)
class StepCost:
    """Cost of a step. need: of each device, if it holds a network and its memory is known; problem: why it cannot run.

    not_estimated: why the memory of its network is not known, "" if it is, or there is none.
    rate: units per second and device, `source` where it is from, `devices` how many there are; seconds: of them all.
    """

    step: Step
    is_finished: bool
    work: Work
    device: Device
    need: Need | None
    not_estimated: str
    problem: str
    rate: float | None
    source: str
    devices: float
    seconds: Amount


def step_costs(
    plan: Plan,
    store: Store | None,
    profile: Profile,
    *,
    local: bool,
    machine: Device | None = None,
    manifests: list[Json] | None = None,
) -> list[StepCost]:
    """Return the costs of a plan's steps in their order.

    local: the steps run on this machine, so that its memory is theirs where the profile says nothing; machine: what
    networks are on here, by default the GPU or the RAM that there is. Without a store nothing is known of other runs.
    manifests: those of the store (`finished_manifests`), for who asks about many plans.
    """
    machine = machine or (this_machine() if local else Device())
    manifests = finished_manifests(store) if manifests is None else manifests
    finished = {manifest["key"]: manifest for manifest in manifests}
    inputs_seen: dict[str, InputStep] = {}
    work: dict[str, Work] = {}
    costs = []
    for step in plan.steps:
        inputs = {name: inputs_seen[source.name] for name, source in step.inputs.items()}
        inputs_seen[step.name] = InputStep(step.stage, {**step.identity["options"], **step.options}, inputs)
        source_work = {name: work[source.name] for name, source in step.inputs.items()}
        cost = step.signature.cost
        bound = cost.work(step.options, inputs, source_work)
        manifest = finished.get(step.key)
        if manifest:
            work[step.name] = _finished_work(manifest, bound)
        else:
            work[step.name] = _estimated_work(step, bound, source_work, manifests, finished)

        resources = profile.of(step.stage)
        device = device_of(profile, step, machine)
        need, problem, not_estimated = None, "", ""
        try:
            need, problem = memory_problem(cost, step.options, inputs, device)
        except NotEstimatedError as error:
            not_estimated = str(error)
        devices = float(step.options.get("world_size", resources.max_workers or 1) * device.count)
        rate, source = profile.rates.get(step.stage), "given"
        if rate is None and need is not None:
            rate, source = _measured_rate(step, bound.unit, need, manifests, finished), "measured"
        seconds = UNKNOWN
        if rate and (units := work[step.name].units).value is not None:
            seconds = units.times(Amount(1 / rate / devices, "estimated"))
        if local or resources.gpus is not None:  # else nobody knows what a cluster's workers have
            problem = cost.device_problem(step.options, inputs, device) or problem
        if need is not None and resources.gpus and resources.gpus > (used := cost.gpus(step.options, device)):
            problem = (
                f"the profile gives each worker gpus: {resources.gpus:g}, and it computes on {used}; others would be "
                f"idle: set `gpus: {used}`, and `max_workers` to as many workers as there are GPUs for"
            )
        problem = problem and f"{step.name}: {problem}"
        source = source if rate else ""
        is_finished = manifest is not None
        costs.append(
            StepCost(
                step, is_finished, work[step.name], device, need, not_estimated, problem, rate, source, devices, seconds
            )
        )  # fmt: skip
    return costs


def check_memory(plans: list[Plan], steps: Iterable[Step], profile: Profile, *, local: bool) -> None:
    """Raise WinnowError with every one of these steps of the plans, which will run, that its device cannot run."""
    keys = {step.key for step in steps}
    costs = [cost for plan in plans for cost in step_costs(plan, None, profile, local=local)]
    if problems := [cost.problem for cost in costs if cost.problem and cost.step.key in keys]:
        raise WinnowError(*dict.fromkeys(problems))


def device_of(profile: Profile, step: Step, machine: Device) -> Device:
    """Return the device of a step's workers: as the profile says, else what there is on the machine."""
    resources = profile.of(step.stage)
    count = resources.tensor_parallel
    memory = resources.gpu_memory and resources.gpu_memory * GIB
    if resources.gpus or (resources.gpus is None and memory):
        installed = machine.memory if machine.kind == "cuda" else None
        return Device("cuda", memory or installed, count)
    if resources.gpus is None and machine.kind == "cuda":
        return replace(machine, count=count)
    installed = machine.memory if machine.kind == "cpu" else None
    return Device("cpu", resources.memory * GIB if resources.memory else installed)


@lru_cache
def this_machine() -> Device:
    """Return the smallest GPU of this machine, or its RAM if there is no GPU."""
    if not DRIVER.exists():
        return Device("cpu", float(psutil.virtual_memory().total))
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return Device("cuda", min(map(float, lines)) * 2**20)
    except (OSError, ValueError, subprocess.SubprocessError):
        return Device("cuda", None)


def finished_manifests(store: Store | None) -> list[Json]:
    """Return the manifests of a store, the latest first; none of one that cannot be read, for nothing depends on it."""
    try:
        return sorted(store.sealed() if store else [], key=lambda manifest: manifest["made"], reverse=True)
    except (OSError, WinnowError):
        return []


def _finished_work(manifest: Json, bound: Work) -> Work:
    """Return what a finished step made and went through; tokens of prompts and examples are counted in their tables."""
    rows = {name: Amount(count) for name, count in manifest["rows"].items()}
    counted = manifest["counters"].get(COUNTERS[bound.unit])
    if counted is None and "examples" in rows:
        prompts, responses = (_column(manifest, "examples", name) for name in ("prompt_ids", "responses"))
        if prompts is not None and responses is not None:
            ids = (prompts, pc.struct_field(pc.list_flatten(responses), "token_ids"))
            counted = sum(pc.sum(pc.list_value_length(column)).as_py() or 0 for column in ids)
    splits = bound.splits
    if "prompts" in rows and splits and (column := _column(manifest, "prompts", "split")) is not None:
        splits = {name: Amount(pc.sum(pc.equal(column, name)).as_py() or 0) for name in splits}
    return Work(rows, Amount(counted), bound.unit, splits)


def _estimated_work(
    step: Step, bound: Work, inputs: Mapping[str, Work], manifests: list[Json], finished: Mapping[str, Json]
) -> Work:
    """Return the stage's bounds, and of what it leaves open or only bounds, estimates from a finished step like it."""
    source = next((item for item in step.signature.inputs if item.schema is not None and item.name in inputs), None)
    similar = [manifest for manifest in manifests if manifest["stage"] == step.stage]
    # The same step, or that with the most options and inputs alike (another ranker rejects others): the latest

    def likeness(manifest: Json) -> tuple[int, str]:
        alike = (
            step.identity[part].get(name) == value
            for part in ("options", "inputs")
            for name, value in manifest["identity"][part].items()
        )
        return sum(alike), manifest.get("made", "")

    similar.sort(key=likeness, reverse=True)
    rows, units = dict(bound.rows), bound.units
    for manifest in similar[:1]:
        before = manifest["rows"]
        read = finished.get(manifest["identity"]["inputs"].get(source.name, "")) if source else None
        scale = UNKNOWN
        if source and read and (count := read["rows"].get(source.kind)):
            scale = inputs[source.name].of(source.kind).times(Amount(1 / count, "estimated"))
        for name, count in before.items():
            if name != "rejects" and rows.get(name, UNKNOWN).value is None:
                rows[name] = scale.times(count)
        counted = manifest["counters"].get(COUNTERS[bound.unit])
        main = next((name for name in before if name != "rejects" and bound.of(name).value is not None), None)
        if counted and main and before[main]:
            estimate = bound.of(main).times(Amount(counted / before[main], "estimated"))
        elif counted:
            epochs = step.options.get("epochs", 1) / manifest["identity"]["options"].get("epochs", 1)
            estimate = scale.times(Amount(counted * epochs, "estimated"))
        else:
            continue
        if estimate.value is not None and (units.value is None or estimate.value < units.value):
            units = replace(estimate, known="estimated")
    return Work(rows, units, bound.unit, bound.splits)


def _measured_rate(
    step: Step, unit: str, need: Need, manifests: list[Json], finished: Mapping[str, Json]
) -> float | None:
    """Return the units per second and device of a finished step of this stage with a network of this size.

    Of several, the one that went through the most: what it takes to open an engine weighs least in it.
    """
    most, rate = 0.0, None
    for manifest in manifests:
        counted, options = manifest["counters"].get(COUNTERS[unit]), manifest["identity"]["options"]
        seconds = manifest.get("gpu_seconds") or manifest["seconds"]
        alike = all(options.get(name) == step.identity["options"].get(name) for name in ("dtype", "engine", "by"))
        if manifest["stage"] != step.stage or not counted or counted <= most or not seconds or not alike:
            continue
        models = [finished[key] for key in manifest["identity"]["inputs"].values() if key in finished]
        sizes = [_parameters(Path(model["folder"]) / "model") for model in models if model.get("model")]
        if any(abs(size - need.parameters) <= SAME_SIZE * need.parameters for size in sizes):
            most, rate = counted, float(counted / seconds)
    return rate


@lru_cache
def _parameters(folder: Path) -> int:
    """Return the number of weights in a folder; 0 if they cannot be read from here."""
    try:
        shapes = tensor_shapes(weight_files(folder)).values()
    except Exception:  # safetensors raises what it likes, and nothing depends on it
        return 0
    return sum(map(prod, shapes))


def _column(manifest: Json, table: str, name: str) -> pa.ChunkedArray | None:
    """Return a column of a finished table, None if it is too large or gone."""
    files = [file for file in manifest["files"] if table_of(file) == table]
    if sum(file["bytes"] for file in files) > LARGEST_READ:
        return None
    try:
        folder = Path(manifest["folder"])
        # Not `read_table`, whose data sets take as long as the rest for a small file.
        sources = [pa.BufferReader(read(folder / file["file"])) for file in files]
        columns = [pq.ParquetFile(source).read(columns=[name])[name] for source in sources]
    except (OSError, pa.ArrowException):
        return None
    chunks = [chunk for column in columns for chunk in column.chunks]
    if not chunks:  # of a table without rows
        return pa.chunked_array([], TABLES[table].field(name).type) if table in manifest["rows"] else None
    return pa.chunked_array(chunks)


def as_rows(costs: list[StepCost]) -> list[dict[str, Any]]:
    """Return the costs as plain rows, for a program to read: numbers with what is known of each."""
    return [
        {
            "step": cost.step.name,
            "stage": cost.step.stage,
            "key": cost.step.key,
            "finished": cost.is_finished,
            "rows": {name: {"value": rows.value, "known": rows.known} for name, rows in cost.work.rows.items()},
            cost.work.unit: {"value": cost.work.units.value, "known": cost.work.units.known},
            "parameters": cost.need.parameters if cost.need else None,
            "dtype": cost.need.dtype if cost.need else None,
            "memory": dict(cost.need.parts) if cost.need else None,
            "not_estimated": cost.not_estimated or None,
            "device_memory": cost.device.memory,
            "rate": cost.rate,
            "rate_source": cost.source or None,
            "devices": cost.devices,
            "seconds": {"value": cost.seconds.value, "known": cost.seconds.known},
        }
        for cost in costs
    ]

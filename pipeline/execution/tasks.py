"""One unit of work: a part of one step, or a piece of a part, in whatever process it runs."""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.plan import Step
from pipeline.context import ProgressCallback, StageContext, WarmCache
from pipeline.registry import Entry
from pipeline.resources import Resources
from pipeline.stage import Input, signature_of
from pipeline.store.fingerprints import model_digest
from pipeline.store.storage import copy_here, send
from pipeline.store.store import StepFolder, Store, model_name
from schemas import Model, WinnowError, conform, shard_of, table_name
from schemas.tables import REJECTS

POISON = "killed its worker"


@dataclass(frozen=True)
class Task:
    """A part; shard 0 for all of a whole stage's; or, of a part, the prompts from `span[0]` to before `span[1]`."""

    shard: int
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class StepSpec:
    """A step as its workers see it: no plan, no store, only what the call needs."""

    name: str
    entry: Entry
    options: dict[str, Any]
    sources: dict[str, StepFolder]
    out: StepFolder
    shards: int

    @property
    def unsharded(self) -> bool:
        return signature_of(self.entry).unsharded

    @property
    def made_of(self) -> dict[str, str]:
        """The keys of what it reads: a part says so too, before there is a manifest to say it."""
        return {name: source.path.name for name, source in self.sources.items()}

    @property
    def reads_model(self) -> bool:
        return any(item.schema is None and item.name in self.sources for item in signature_of(self.entry).inputs)

    def units(self) -> list[Task]:
        """What is left to do: missing parts, or the one call of a whole stage."""
        missing = self.out.missing(self.shards)
        return [Task(0)] if missing and self.unsharded else [Task(shard) for shard in missing]

    def inputs(self, unit: Task) -> dict[str, pa.Table | Model | None]:
        """What the stage's function is called with."""
        shard = None if self.unsharded else unit.shard
        made = {item.name: _read(self, item, shard) for item in signature_of(self.entry).inputs}
        return made if unit.span is None else _cut(made, *unit.span)

    def prompts(self, shard: int) -> list[str]:
        """The ids of a part's prompts, in order: what a span counts."""
        dealt = [item for item in signature_of(self.entry).inputs if by_prompt(item)]
        return _prompts({item.name: _read(self, item, shard) for item in dealt})

    def piece(self, unit: Task) -> StepFolder:
        """Where the piece of a part lies until all of them are there."""
        first, last = unit.span or (0, 0)
        return StepFolder(self.out.path / "pieces" / f"{unit.shard:05d}.{first}-{last}")


def step_spec(step: Step, store: Store) -> StepSpec:
    sources = {name: store.folder(source) for name, source in step.inputs.items()}
    return StepSpec(step.name, step.entry, step.options, sources, store.folder(step), step.shards)


@dataclass(frozen=True)
class ResourceTime:
    """Seconds of a worker, times its GPUs, times its CPUs.

    Where nothing says what a worker has (in this process, without a profile), it is taken for one CPU.
    """

    seconds: float = 0.0
    gpu_seconds: float = 0.0
    cpu_seconds: float = 0.0

    @classmethod
    def of(cls, work: StepSpec, resources: Resources, seconds: float) -> "ResourceTime":
        ranks = work.options.get("world_size", 1)  # the resources are of one
        gpus, cpus = resources.gpus or 0.0, 1.0 if resources.cpus is None else resources.cpus
        return cls(seconds, seconds * ranks * gpus, seconds * ranks * cpus)


def execute(
    work: StepSpec,
    unit: Task,
    warm: WarmCache,
    tell: ProgressCallback,
    resources: Resources = Resources(),  # noqa: B008 - frozen
) -> int:
    """Run one unit, commit what it made, and return its rows."""
    with warm.clock.share() as seconds, folder_here(work.out) as here:
        workspace = StageContext(here, warm, tell, resources, work.out.path)
        tables = _call(work, work.inputs(unit), workspace)
        spent = ResourceTime.of(work, resources, seconds())
        if work.unsharded:
            return _commit_whole(work, tables, workspace, spent)
    out = work.out if unit.span is None else work.piece(unit)
    return _commit(work, out, unit.shard, tables, part_record(tables, workspace.counters, spent))


@contextmanager
def folder_here(out: StepFolder) -> Iterator[Path]:
    """Where a stage writes by itself: the step's own folder, or one of this call's alone that ends with it.

    What an earlier attempt kept in an object store is brought back to it.
    """
    if isinstance(out.path, Path):
        yield out.path
        return
    with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
        if (out.path / "checkpoint").exists():
            copy_here(out.path / "checkpoint", Path(folder) / "checkpoint")
        yield Path(folder)


def _read(work: StepSpec, item: Input, shard: int | None) -> pa.Table | Model | None:
    source = work.sources.get(item.name)
    if source is None:
        return None
    if item.schema is None:
        return source.model()
    return source.read(item.schema, shard if by_prompt(item) else None)


def by_prompt(item: Input) -> bool:
    """Are its rows dealt to shards by prompt? Tables of anything else stand in part 0, and every call reads them."""
    return item.schema is not None and "prompt_id" in item.schema.names


def _dealt(inputs: Mapping[str, Any]) -> list[pa.Table]:
    return [each for each in inputs.values() if isinstance(each, pa.Table) and "prompt_id" in each.schema.names]


def _prompts(inputs: Mapping[str, Any]) -> list[str]:
    return sorted({prompt for table in _dealt(inputs) for prompt in pc.unique(table["prompt_id"]).to_pylist()})


def _cut(inputs: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    """The inputs of some prompts of the part alone."""
    wanted = pa.array(_prompts(inputs)[first:last], pa.string())
    own = {id(table) for table in _dealt(inputs)}
    return {
        name: each.filter(pc.is_in(each["prompt_id"], wanted)) if id(each) in own else each
        for name, each in inputs.items()
    }


def _call(work: StepSpec, inputs: dict[str, Any], workspace: StageContext) -> dict[str, pa.Table]:
    """The stage's tables by name, checked against their schemas; a shard without rows wakes nothing."""
    shape, tables_in = signature_of(work.entry), _dealt(inputs)
    if tables_in and not shape.unsharded and not any(table.num_rows for table in tables_in):
        made: list[Any] = [schema.empty_table() for schema in shape.outputs]
    else:
        extra = {shape.workspace: workspace} if shape.workspace else {}
        result = work.entry.fn(**inputs, **extra, **work.options)
        made = [item for item in _listed(result) if not isinstance(item, Model)]
    tables = {table_name(schema): conform(table, schema) for schema, table in zip(shape.outputs, made, strict=True)}
    return tables | {"rejects": workspace.rejects}


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]


def part_record(tables: dict[str, pa.Table], counters: Mapping[str, int], spent: ResourceTime) -> dict[str, Any]:
    """What a part's sidecar says beside its files."""
    reasons = Counter(tables["rejects"].column("reason").to_pylist())
    times = {name: round(seconds, 3) for name, seconds in asdict(spent).items()}
    return times | {"counters": dict(counters), "rejects": dict(reasons)}


def _commit(work: StepSpec, out: StepFolder, shard: int, tables: dict[str, pa.Table], record: dict[str, Any]) -> int:
    out.write_part(shard, tables, record | {"inputs": work.made_of})
    return sum(table.num_rows for name, table in tables.items() if name != "rejects")


def _commit_whole(work: StepSpec, tables: dict[str, pa.Table], workspace: StageContext, spent: ResourceTime) -> int:
    """The model, and the tables, dealt to their shards by prompt: shard i of every table has the same prompts."""
    digest = keep_model(work.out, workspace.folder / "model") if signature_of(work.entry).makes_model else None
    parts = []
    for shard, part in enumerate(deal(tables, work.shards)):
        own = (workspace.counters, spent) if shard == 0 else ({}, ResourceTime())
        said = {"inputs": work.made_of} | ({"model": digest} if shard == 0 else {})
        parts.append((part, part_record(part, *own) | said))
    work.out.write_whole(parts)
    return sum(table.num_rows for name, table in tables.items() if name != "rejects")


def keep_model(out: StepFolder, folder: Path) -> str:
    """The digest of a model that lies where the step does from now on."""
    digest = model_digest(folder)
    if not isinstance(out.path, Path):
        send(folder, out.path / model_name(digest))
    return digest


def deal(tables: dict[str, pa.Table], shards: int) -> list[dict[str, pa.Table]]:
    """Each shard's rows of each table; part 0 has what belongs to no prompt, and the rejects."""
    homes = {name: _homes(name, table, shards) for name, table in tables.items()}
    return [
        {name: table.filter(pa.array(homes[name] == shard)) for name, table in tables.items()}
        for shard in range(shards)
    ]


def _homes(name: str, table: pa.Table, shards: int) -> np.ndarray:
    if name == "rejects" or "prompt_id" not in table.schema.names:
        return np.zeros(table.num_rows, dtype=np.int64)
    prompts = table.column("prompt_id").to_pylist()
    shard_by_prompt = {prompt: shard_of(prompt, shards) for prompt in set(prompts)}
    return np.array([shard_by_prompt[prompt] for prompt in prompts], dtype=np.int64)


def join(work: StepSpec, shard: int, pieces: list[Task], poison: dict[str, str]) -> int:
    """Make the part of its pieces, in order, and of the prompts that killed their workers, each with the last words."""
    found = [(work.piece(unit), work.piece(unit).sidecar(shard) or {}) for unit in pieces]
    tables = {
        table_name(schema): pa.concat_tables(
            [schema.empty_table(), *(folder.read(schema, shard) for folder, _ in found)]
        ).combine_chunks()
        for schema in (*signature_of(work.entry).outputs, REJECTS)
    }
    rows = [
        dict(prompt_id=prompt, candidate_id=None, place=f"part {shard}", reason=POISON, detail=words[:500])
        for prompt, words in sorted(poison.items())
    ]
    tables["rejects"] = pa.concat_tables([tables["rejects"], pa.Table.from_pylist(rows, schema=REJECTS)])
    counters: Counter[str] = sum((Counter(record["counters"]) for _, record in found), Counter())
    spent = ResourceTime(
        **{each.name: sum(record.get(each.name, 0.0) for _, record in found) for each in fields(ResourceTime)}
    )
    return _commit(work, work.out, shard, tables, part_record(tables, counters, spent))


def fail_if_nothing_left(name: str, options: dict[str, Any], manifest: dict[str, Any]) -> None:
    """A stage that left out every row of a table has failed, whatever its exit."""
    made = {table: rows for table, rows in manifest["rows"].items() if table != "rejects"}
    if manifest["model"] or (all(made.values()) if manifest["rejects"] else any(made.values())):
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(manifest["rejects"].items()))
    empty = " and ".join(table for table, rows in made.items() if not rows)
    split = f" of split {options['split']}: see `heldout` of the data" if "split" in options else ""
    raise WinnowError(f"{name}: every row of {empty} was left out ({reasons or f'its inputs have no rows{split}'})")

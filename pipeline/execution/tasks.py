"""One task: a part of a step, or a piece of a part, in whatever process it runs."""

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.keys import content_paths
from pipeline.config.plan import Step
from pipeline.context import ProgressCallback, StageContext, WarmCache
from pipeline.registry import Entry
from pipeline.resources import Resources, working_with
from pipeline.stage import Input, StageSignature, signature_of
from pipeline.store.fingerprints import digests_of, model_digest
from pipeline.store.storage import download, named, send, sync_tree
from pipeline.store.store import IdRange, Json, StepFolder, Store, add_records, model_name, shards_of_rows
from schemas import MachineError, Model, WinnowError, combine_chunks, conform, table_name
from schemas.tables import REJECTS

ID_RANGES = 16**4  # by the first four hex digits of a prompt's id
POISON = "killed its worker"  # reason of a reject: stored in tables
NO_COST = {"seconds": 0.0, "gpu_seconds": 0.0, "cpu_seconds": 0.0}


@dataclass(frozen=True)
class Task:
    """Part `shard` of a step; of an unsharded stage its one call, as shard 0.

    With `span`, a piece of that part: its prompts from `span[0]` to before `span[1]`, in the order of their ids.
    """

    shard: int
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class StepSpec:
    """Step as its workers see it: no plan and no store, only what the stage's call needs."""

    name: str
    entry: Entry
    options: dict[str, Any]
    sources: dict[str, StepFolder]
    out: StepFolder
    run: str = ""  # name of the run that computes it, for people
    earlier: tuple[StepFolder, ...] = ()  # finished steps whose rows it can take

    @property
    def signature(self) -> StageSignature:
        """Return the signature of the step's stage."""
        return signature_of(self.entry)

    @property
    def key(self) -> str:
        return self.out.path.name

    @property
    def shards(self) -> int:
        """Return the number of parts of its result."""
        return self.out.parts

    @property
    def world_size(self) -> int:
        """Return the number of processes that train together: above 1, the stage starts them itself."""
        return self.options.get("world_size", 1)

    def prompts(self, shard: int) -> list[str]:
        """Return the ids of a part's prompts in order, over all inputs: what a span counts."""
        prompts = set[str]()
        for item in self.signature.inputs:
            if is_split_by_prompt(item) and item.name in self.sources:
                table = self.sources[item.name].read(item.schema_of(["prompt_id"]), shard, of=self.shards)
                prompts.update(pc.unique(table["prompt_id"]).to_pylist())
        return sorted(prompts)

    def piece(self, task: Task) -> StepFolder:
        """Return the folder of a part's piece, until all pieces are there and are joined."""
        first, last = task.span or (0, 0)
        return StepFolder(
            self.out.path / "pieces" / f"{task.shard:05d}-of-{self.shards:05d}.{first}-{last}", self.shards
        )

    def cost(self, resources: Resources, seconds: float) -> dict[str, float]:
        """Return the seconds of a task, and those times the GPUs and the CPUs of all processes that train together.

        A worker of unknown size (in this process, without a profile) counts as one CPU.
        """
        gpus, cpus = resources.gpus or 0.0, 1.0 if resources.cpus is None else resources.cpus
        total = seconds * self.world_size
        cost = {"seconds": seconds, "gpu_seconds": total * gpus, "cpu_seconds": total * cpus}
        return {name: round(value, 3) for name, value in cost.items()}


def step_spec(step: Step, store: Store, run: str = "", running: Mapping[str, StepFolder] = {}) -> StepSpec:
    """Return what workers need of a step whose inputs and result are in this store.

    running: the folders of inputs that are not finished yet, by their keys.
    """
    sources = {name: running.get(source.key) or store.folder(source).divided() for name, source in step.inputs.items()}
    out, earlier = store.folder(step).divided(), tuple(store.earlier(step))
    return StepSpec(step.name, step.entry, step.options, sources, out, run, earlier)


def is_split_by_prompt(item: Input) -> bool:
    """Return whether an input's rows are split by prompt; any other table is in part 0, and every call reads it all."""
    return item.schema is not None and "prompt_id" in item.schema.names


@dataclass(frozen=True)
class TaskResult:
    """End of a task: the error that it failed with, or none."""

    spec: StepSpec
    task: Task
    error: Exception | None = None


def execute(
    spec: StepSpec,
    task: Task,
    cache: WarmCache,
    progress: ProgressCallback,
    resources: Resources = Resources(),  # noqa: B008 - frozen
) -> None:
    """Run one task: read its inputs, call the stage, check the tables against their schemas, and write them."""
    signature = spec.signature
    keys = {name: source.path.name for name, source in spec.sources.items()}  # no manifest records them yet
    running = working_with(resources)
    with running, named(spec.out.path), cache.clock.share() as seconds, local_folder(spec.out) as folder:
        title = f"{spec.run} {spec.name}".strip()
        earlier = [partial(folder.read, shard=task.shard, of=spec.shards) for folder in spec.earlier]
        ctx = StageContext(folder, cache, progress, resources, spec.out.path, title, earlier)

        if signature.unsharded:
            tables = _call_stage(spec, task, ctx) | {"rejects": ctx.rejects}
            cost = spec.cost(resources, seconds())
            # The model, and the tables split by prompt: part i of every table holds the same prompts
            model = store_model(spec.out, ctx.folder / "model") if signature.makes_model else {"model": None}
            parts = []
            for shard, part in enumerate(split_by_shard(tables, spec.shards)):
                record = (
                    part_record(part, ctx.counters, cost, ctx.measures) | model if shard == 0 else part_record(part)
                )
                parts.append((part, record | {"inputs": keys}))
            spec.out.write_whole(parts)
            return
        out = spec.out if task.span is None else spec.piece(task)
        with out.part_writer(task.shard) as writer:
            for ids in _pieces(spec, task, resources):
                writer.write(_call_stage(spec, task, ctx, ids))
            tables = {"rejects": ctx.rejects}
            writer.write(tables)
            record = part_record(tables, ctx.counters, spec.cost(resources, seconds()), ctx.measures)
            writer.finish(record | {"inputs": keys})


def input_bytes(spec: StepSpec, shard: int) -> int:
    """Return about how many bytes a part's rows, of the columns that the stage reads, take in memory."""
    return sum(
        spec.sources[item.name].decoded_bytes(item.schema_read(spec.options), shard, spec.shards)
        for item in spec.signature.inputs
        if is_split_by_prompt(item) and item.name in spec.sources
    )


def _pieces(spec: StepSpec, task: Task, resources: Resources) -> list[IdRange | None]:
    """Return the ranges of prompt ids that a part is read by, so that each piece fits into memory; None: all of it.

    Ids are hashes: ranges of one width hold about as many prompts each.
    """
    if task.span is not None or not spec.signature.by_prompt(spec.options):
        return [None]
    count = min(ID_RANGES, math.ceil(input_bytes(spec, task.shard) / 2**30 / resources.piece_memory))
    if count <= 1:
        return [None]
    bounds = [f"{ID_RANGES * n // count:04x}" for n in range(1, count)]
    return list(zip(["", *bounds], [*bounds, None], strict=True))


def _call_stage(spec: StepSpec, task: Task, ctx: StageContext, ids: IdRange | None = None) -> dict[str, pa.Table]:
    """Return the tables of a stage, called with the rows of its task, of these prompt ids."""
    signature = spec.signature
    # Arguments of the stage's function: tables (of the part, of its piece), models, None for optional inputs
    inputs: dict[str, Any] = {}
    rows = []
    for item in signature.inputs:
        source, is_split = spec.sources.get(item.name), is_split_by_prompt(item)
        if source is None or item.schema is None:
            inputs[item.name] = source.model() if source else None
            continue
        schema = item.schema_read(spec.options)
        of_part = (task.shard, ids, spec.shards) if is_split and not signature.unsharded else ()
        table = source.read(schema, *of_part)
        if task.span and is_split:
            prompts = spec.prompts(task.shard)[slice(*task.span)]
            table = table.filter(pc.is_in(table["prompt_id"], pa.array(prompts, pa.string())))
        if is_split:
            rows.append(table.num_rows)
        inputs[item.name] = table

    if rows and not any(rows) and not signature.unsharded:  # a part without rows must not open an engine
        results: list[Any] = [schema.empty_table() for schema in signature.outputs]
    else:
        context = {signature.context_parameter: ctx} if signature.context_parameter else {}
        with _unchanged(spec), _named(spec), spec.entry.failures():
            result = spec.entry.fn(**inputs, **context, **spec.options)
        items = result if isinstance(result, tuple) else (result,)
        results = [item for item in items if not isinstance(item, Model)]
        expected = [*map(table_name, signature.outputs), *["a Model"] * signature.makes_model]
        if len(items) != len(expected) or not all(isinstance(item, pa.Table) for item in results):
            types = ", ".join(type(item).__name__ for item in items)
            raise WinnowError(f"{spec.entry.location()}: must return tables {', '.join(expected)}; got {types}")
    return {
        table_name(schema): conform(table, schema) for schema, table in zip(signature.outputs, results, strict=True)
    }


@contextmanager
def _named(spec: StepSpec) -> Iterator[None]:
    """Put the step's name before what its stage raises inside, which does not know of which step it is called."""
    try:
        yield
    except WinnowError as error:
        lines = (text.removeprefix(f"{spec.name}: ") for text in error.problems)
        raise type(error)(*(f"{spec.name}: {text}" for text in lines)) from error


@contextmanager
def _unchanged(spec: StepSpec) -> Iterator[None]:
    """Raise MachineError if files of a step's options are not, while they are read inside, what the plan has digested.

    Otherwise the result would be stored, for good, as that of the content before; a later run plans with the new one.
    A file that is put back meanwhile has its digest again, but another time of its last change.
    """
    paths = list(content_paths(spec.options))
    before = [path.states() for path in paths]

    def refuse(changed: Iterable[str]) -> None:
        if files := list(dict.fromkeys(changed)):
            raise MachineError(
                f"{spec.name}: {', '.join(files)} changed after the plan was made, so that the step's key stands for "
                "other content than what was read; nothing of this step is stored: run again once nothing writes there"
            )

    def written_to() -> Iterator[str]:
        for path, states in zip(paths, before, strict=True):
            yield from sorted(file for file, _ in states.items() ^ path.states().items())

    refuse(file for path in paths for file in path.changes())
    try:
        yield
    except Exception:  # perhaps because a file was half written
        refuse(written_to())
        raise
    refuse(written_to())


@contextmanager
def local_folder(out: StepFolder) -> Iterator[Path]:
    """Yield the folder for a stage's own files: the step's, or a temporary one if that is in an object store.

    The checkpoint that an earlier attempt left in the object store is copied into it.
    """
    if isinstance(out.path, Path):
        yield out.path
        return
    with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
        if (out.path / "checkpoint").exists():
            download(out.path / "checkpoint", Path(folder) / "checkpoint")
        yield Path(folder)


def store_model(out: StepFolder, folder: Path) -> Json:
    """Sync a model, or copy it to its step's folder in an object store; return what its sidecar records of it.

    That is the model's digest, and those of all files in its folder by their names, its card's among them.
    """
    digest = model_digest(folder)
    if isinstance(out.path, Path):
        sync_tree(folder)
    else:
        send(folder, out.path / model_name(digest))
    return {"model": digest, "model_files": digests_of(folder)}


def part_record(
    tables: dict[str, pa.Table],
    counters: Mapping[str, int] = {},
    cost: Mapping[str, float] = NO_COST,
    measures: Mapping[str, dict[str, float]] = {},
) -> Json:
    """Return what a part's sidecar records besides its files."""
    reasons = Counter(tables["rejects"].column("reason").to_pylist())
    return {**cost, "counters": dict(counters), "measures": dict(measures), "rejects": dict(reasons)}


def split_by_shard(tables: dict[str, pa.Table], shards: int) -> list[dict[str, pa.Table]]:
    """Split tables into parts by prompt; part 0 has the rejects, and all tables whose rows belong to no prompt."""
    shard_of_row = {}
    for name, table in tables.items():
        if name == "rejects" or "prompt_id" not in table.schema.names:
            shard_of_row[name] = np.zeros(table.num_rows, dtype=np.int64)
        else:
            shard_of_row[name] = shards_of_rows(table, shards)
    return [
        {name: table.filter(pa.array(shard_of_row[name] == shard)) for name, table in tables.items()}
        for shard in range(shards)
    ]


def join(spec: StepSpec, shard: int, pieces: list[Task], poison: dict[str, str]) -> None:
    """Write a part from its pieces, in order, and a reject for each prompt that killed its workers.

    `poison` has those prompts, each with the last message of its last worker.
    """
    folders = [spec.piece(task) for task in pieces]
    records = [folder.sidecar(shard) or {} for folder in folders]
    tables = {
        table_name(schema): combine_chunks(
            pa.concat_tables([schema.empty_table(), *(folder.read(schema, shard) for folder in folders)])
        )
        for schema in (*spec.signature.outputs, REJECTS)
    }
    rejects = [
        dict(prompt_id=prompt, candidate_id=None, place=f"part {shard}", reason=POISON, detail=message[:500])
        for prompt, message in sorted(poison.items())
    ]
    tables["rejects"] = pa.concat_tables([tables["rejects"], pa.Table.from_pylist(rejects, schema=REJECTS)])
    record = add_records([*records, {"counters": {}, "rejects": {POISON: len(poison)}}])
    keys = {name: source.path.name for name, source in spec.sources.items()}
    spec.out.write_part(shard, tables, record | {"inputs": keys})


def read_rejects(folder: StepFolder) -> pa.Table:
    """Return the rejected rows of all parts of a step, which need not have its manifest yet."""
    return pa.concat_tables([folder.read(REJECTS, shard) for shard in range(folder.parts)])


def check_not_empty(
    name: str,
    options: dict[str, Any],
    manifest: dict[str, Any],
    rejects: Callable[[], pa.Table] = REJECTS.empty_table,
    omitted: Collection[str] = (),
) -> None:
    """Raise WinnowError for a step with an empty table: a stage that rejects every row has failed.

    rejects: returns the rejected rows, of which the message has the detail of the first. omitted: the tables that are
    empty with the step's options.
    """
    rows = {table: count for table, count in manifest["rows"].items() if table not in ("rejects", *omitted)}
    if manifest["model"] or (all(rows.values()) if manifest["rejects"] else any(rows.values())):
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(manifest["rejects"].items()))
    empty = " and ".join(table for table, count in rows.items() if not count)
    split = options.get("split")
    share = "validation" if split == "validation" else "heldout"
    of_split = f" of split {split}: see `{share}` of the data" if split else ""
    if reasons:
        details = (detail for detail in rejects()["detail"].to_pylist() if detail)
        example = f"; of the first: {detail}" if (detail := next(details, "")) else ""
        raise WinnowError(f"{name}: every row of {empty} was rejected ({reasons}{example})")
    raise WinnowError(f"{name}: {empty} would be empty, because the step's inputs have no rows{of_split}")

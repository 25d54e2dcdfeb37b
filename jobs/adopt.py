"""Registration of files from elsewhere as the finished result of a step.

For users who sampled with another system, and for those whose stage has a new version although its results did not
change. Everything is checked before anything is written; the manifest says where the files came from.
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.partial import matching
from pipeline.config.plan import Plan, Step
from pipeline.execution.run import record_of
from pipeline.execution.tasks import (
    check_not_empty,
    local_folder,
    part_record,
    split_by_shard,
    store_model,
)
from pipeline.registry import nearest
from pipeline.sql.views import KEY, STAGE
from pipeline.store.fingerprints import ModelPath, digest_of, model_digest, model_files
from pipeline.store.manifests import DamagedError
from pipeline.store.storage import delete, parse_location
from pipeline.store.store import Json, StepFolder, Store
from schemas import COMMAND, WinnowError, conform, table_name
from schemas.tables import REJECTS

Tables = dict[str, pa.Table]
UNIQUE_IDS = {  # tables with one row per id
    "prompts": "prompt_id",
    "candidates": "candidate_id",
    "rewards": "candidate_id",
    "selections": "candidate_id",
    "reference": "candidate_id",
    "features": "candidate_id",
}
IDS = ("prompt_id", "candidate_id")
PANDAS_INDEX = re.compile(r"__index_level_\d+__")
MANIFEST_FIELDS = {"stage", "key", "identity", "rows", "files", "model"}


@dataclass(frozen=True)
class Artifact:
    """Tables by part, a model folder, and where the manifest says that they came from."""

    part: Callable[[int], Tables]
    model: Path | None
    origin: Json


def adopt_artifact(plan: Plan, name: str, path: str, store: Store) -> tuple[Step, Json]:
    """Return the step and its new manifest. Raise WinnowError, with nothing written, for all that does not fit."""
    steps = matching(plan, name)
    if not steps:
        raise WinnowError(
            f"adopt: no step {name!r} in {plan.name}; {nearest(name, [step.name for step in plan.steps])}"
        )
    if len(steps) > 1:
        raise WinnowError(f"adopt {name}: give the round too: {', '.join(step.name for step in steps)}")
    step, source = steps[0], parse_location(path)
    folder, where = store.folder(step), f"adopt {step.name}: {path}"
    _check_vacant(step, folder)
    if folder.path in (source, *source.parents):
        raise WinnowError(f"{where}: is inside the folder of the step itself; move it elsewhere first")
    artifact = _read_artifact(step, path, where)
    if problems := list(_content_problems(step, artifact, store)):
        raise WinnowError(*(f"{where}: {problem}" for problem in problems))

    store.check()
    store.link_run(plan.name, plan.steps)
    claim = folder.try_lock()
    if claim is None:
        raise WinnowError(f"adopt {step.name}: another run is computing it; wait for it, or stop it")
    try:
        _check_vacant(step, folder)  # again: another run may have finished it while the files were read
        delete(folder.path)  # the remains of an adoption that was interrupted
        model: Json = {}
        if artifact.model:
            with local_folder(folder) as local:
                (local / "model").mkdir(parents=True)  # new: the step's folder has just been deleted
                for file in model_files(artifact.model):
                    shutil.copyfile(file, local / "model" / file.name)
                model = store_model(folder, local / "model")
        for shard in range(step.shards):
            tables = artifact.part(shard)
            record = part_record(tables) | {"adopted": artifact.origin["from"]}
            folder.write_part(shard, tables, record | (model if shard == 0 else {}))
        record = record_of(step, 0.0) | {"adopted": artifact.origin}
        return step, folder.seal(record, lambda manifest: None)
    finally:
        claim.release()


def _check_vacant(step: Step, folder: StepFolder) -> None:
    if folder.manifest:
        raise WinnowError(f"adopt {step.name}: {folder.path} is finished already, and is not overwritten")
    folder = folder.divided()
    computed = [part for shard in range(folder.parts) if (part := folder.sidecar(shard)) and "adopted" not in part]
    if computed:
        raise WinnowError(
            f"adopt {step.name}: {len(computed)} of {folder.parts} parts are finished already; `{COMMAND} run --only "
            f"{step.name}` computes the others, or move {folder.path} out of the store"
        )


def _read_artifact(step: Step, path: str, where: str) -> Artifact:
    """Read a step's folder of a store, Parquet files, a model folder, or the last two in one folder."""
    location = parse_location(path)
    source = StepFolder(location)
    try:
        manifest = None if isinstance(location, Path) and not location.is_dir() else source.read_manifest()
    except DamagedError as error:
        raise WinnowError(
            f"{where}: its manifest.json is not a step's, or is damaged ({error}); move it elsewhere to adopt the "
            "other files"
        ) from None
    if manifest is not None:
        return _read_step(step, source, manifest, where)
    if not isinstance(location, Path):
        raise WinnowError(f"{where}: no finished step is there; copy other files to this machine first")
    if not location.exists():
        raise WinnowError(f"{where}: no such file or folder")
    if any(location.glob("part-*.json")):
        raise WinnowError(f"{where}: a step that is not finished; finish its run first")

    # One Parquet file per table, or all files that begin with the table's name.
    tables, problems, missing = {}, [], []
    for schema in [*step.signature.outputs, REJECTS]:
        name = table_name(schema)
        if location.is_file():  # a file is the only table of the step, whatever its name
            files = [location] if schema is not REJECTS and len(step.signature.outputs) == 1 else []
        else:
            files = sorted(file for file in location.glob(f"{name}*.parquet") if file.name[len(name)] in ".-_")
        if not files and schema is not REJECTS:
            missing.append(name)
        try:
            tables[name] = pa.concat_tables([schema.empty_table(), *(_read_parquet(file, schema) for file in files)])
        except WinnowError as error:
            problems += [f"{where}: {problem}" for problem in error.problems]
    if missing:
        files_like = f"{missing[0]}.parquet, {missing[0]}-00001.parquet"
        raise WinnowError(f"{where}: lacks {', '.join(missing)} (files like {files_like})")
    if problems:
        raise WinnowError(*problems)
    parts = split_by_shard(tables, step.shards)

    model = None
    if step.signature.makes_model:
        beside = not (location / "config.json").is_file() and (location / "model").is_dir()
        try:
            model = ModelPath(str(location / "model" if beside else location)).path
        except ValueError as error:
            raise WinnowError(f"{where}: {error}") from None
    origin = {"from": location.name, "identity": None, "digest": digest_of(location)}
    return Artifact(parts.__getitem__, model, origin)


def _read_step(step: Step, source: StepFolder, manifest: Json, where: str) -> Artifact:
    """Read a finished step, part by part if both have as many: the prompt id alone decides a row's part."""
    if not manifest.keys() >= MANIFEST_FIELDS:
        raise WinnowError(f"{where}: its manifest.json is not a step's; move it elsewhere to adopt the other files")
    outputs = [table_name(schema) for schema in step.signature.outputs] + ["model"] * step.signature.makes_model
    available = set(manifest["rows"]) | ({"model"} if manifest["model"] else set())
    if missing := [kind for kind in outputs if kind not in available]:
        raise WinnowError(f"{where}: {manifest['stage']} has no {' and no '.join(missing)}")
    schemas = [*step.signature.outputs, REJECTS]

    def part(shard: int | None) -> Tables:
        return {table_name(schema): conform(source.divided().read(schema, shard), schema) for schema in schemas}

    files = "".join(f"{file['file']} {file['sha256']}\n" for file in manifest["files"])
    origin = {
        "from": f"{manifest['stage']}/{manifest['key']}",
        "identity": manifest["identity"],
        "digest": sha256(f"{files}{manifest['model']}".encode()).hexdigest(),
    }
    model = source.model().folder if step.signature.makes_model else None
    if model and model_digest(model) != manifest["model"]:
        raise WinnowError(f"{where}: its model is not the one that its manifest names; use the original folder")
    if manifest.get("parts") == step.shards:
        return Artifact(part, model, origin)
    return Artifact(split_by_shard(part(None), step.shards).__getitem__, model, origin)


def _read_parquet(file: Path, schema: pa.Schema) -> pa.Table:
    """Read a file; columns that may be null may be missing, and pandas' index and those of SQL's views be there."""
    try:
        table = pq.read_table(file, partitioning=None)
    except (OSError, pa.ArrowInvalid) as error:
        raise WinnowError(f"{file.name} cannot be read as Parquet ({error})") from None
    table = table.drop_columns([name for name in table.column_names if PANDAS_INDEX.fullmatch(name)])
    for name in (KEY.name, STAGE.name):
        if table.column_names.count(name) == 1:
            values = pc.unique(table[name]).to_pylist()
            if len(values) > 1:
                raise WinnowError(f"{file.name}: has rows of several steps; select one: WHERE {name} = '{values[0]}'")
            table = table.drop_columns(name)
    for field in schema:
        if field.nullable and field.name not in table.column_names:
            table = table.append_column(field.name, pa.nulls(table.num_rows, field.type))
    try:
        return conform(table, schema)
    except WinnowError as error:
        raise WinnowError(*(f"{file.name}: {problem}" for problem in error.problems)) from None


def _content_problems(step: Step, artifact: Artifact, store: Store) -> Iterator[str]:
    """Yield what schemas do not check: duplicate or unknown ids, numbers that are not finite, nulls in lists."""
    not_finite, missing, rows, reasons = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    ids: dict[str, list[pa.Table]] = {table_name(schema): [] for schema in step.signature.outputs}
    for shard in range(step.shards):
        tables = artifact.part(shard)
        reasons.update(tables["rejects"]["reason"].to_pylist())
        for name, table in tables.items():
            rows[name] += table.num_rows
            for field in table.schema:
                for numbers, are_listed in _numbers(table[field.name]):
                    infinite = pc.sum(pc.invert(pc.is_finite(numbers))).as_py() or 0
                    not_finite[f"{name}.{field.name}"] += infinite
                    missing[f"{name}.{field.name}"] += numbers.null_count if are_listed else 0
            if name in ids:
                ids[name].append(table.select([column for column in table.column_names if column in IDS]))
    yield from (f"{count:,} values of {column} are not finite" for column, count in not_finite.items() if count)
    yield from (f"{count:,} values in lists of {column} are null" for column, count in missing.items() if count)
    for name, parts in ids.items():
        table = pa.concat_tables(parts)
        if column := UNIQUE_IDS.get(name):
            duplicates = table.num_rows - pc.count_distinct(table[column]).as_py()
            if duplicates:
                yield f"{duplicates:,} rows of {name} have a {column} that another row has"
        for column in table.column_names:
            if column == "candidate_id" and step.signature.makes("candidates"):
                continue  # they are new
            source, input_ids = _input_ids(step, column, store)
            unknown = [] if input_ids is None else table.filter(pc.invert(pc.is_in(table[column], input_ids)))[column]
            if len(unknown):
                yield (
                    f"{len(unknown):,} of {table.num_rows:,} rows of {name} have a {column} that is not among those of "
                    f"{source}, such as {unknown[0]}"
                )
    manifest = {"rows": rows, "rejects": reasons, "model": artifact.model}
    check_not_empty(step.name, step.options, manifest, omitted=step.signature.omits(step.options))


def _numbers(
    column: pa.ChunkedArray | pa.Array, are_listed: bool = False
) -> Iterator[tuple[pa.ChunkedArray | pa.Array, bool]]:
    """Yield the numbers of a column, at any depth, and whether they are elements of a list."""
    if pa.types.is_list(column.type):
        yield from _numbers(pc.list_flatten(column), True)
    elif pa.types.is_struct(column.type):
        for field in column.type:
            yield from _numbers(pc.struct_field(column, field.name))
    elif pa.types.is_map(column.type):
        for chunk in column.chunks:
            yield from _numbers(chunk.items)
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        yield column, are_listed


def _input_ids(step: Step, column: str, store: Store) -> tuple[str, pa.ChunkedArray | None]:
    """Return the names of the input steps with such ids, and the ids; None if there are none, or one is not finished.

    Of prompts, only those of the split that the step works on.
    """
    split = step.options.get("split")
    ids_by_source: dict[str, pa.ChunkedArray] = {}
    for item in step.signature.inputs:
        source = step.inputs.get(item.name)
        if item.schema is None or source is None or column not in item.schema.names:
            continue
        if store.folder(source).manifest is None:
            return "", None
        table = store.folder(source).read(item.schema)
        if split is not None and "split" in table.column_names:
            table = table.filter(pc.equal(table["split"], split))
            ids_by_source[f"{source.name} (split {split})"] = table[column]
        else:
            ids_by_source[source.name] = table[column]
    chunks = [chunk for ids in ids_by_source.values() for chunk in ids.chunks]
    return " and ".join(ids_by_source), pa.chunked_array(chunks, pa.string()) if ids_by_source else None

"""An artifact made elsewhere, registered as the sealed result of a step.

For those who sampled with another system, and for those whose stage has a new version though its results did not
change. All is checked before anything is written; the manifest says where it came from and what it was there.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.partial import chosen
from pipeline.config.plan import Plan, Step
from pipeline.execution.run import record_of
from pipeline.execution.tasks import ResourceTime, deal, fail_if_nothing_left, folder_here, keep_model, part_record
from pipeline.registry import nearest
from pipeline.store.fingerprints import ModelPath, digest_of, model_digest, model_files
from pipeline.store.storage import delete, parse_location
from pipeline.store.store import Json, StepFolder, Store
from schemas import WinnowError, conform, table_name
from schemas.tables import REJECTS

Tables = dict[str, pa.Table]
ONE_ROW_EACH = {
    "prompts": "prompt_id",
    "candidates": "candidate_id",
    "rewards": "candidate_id",
    "selections": "candidate_id",
    "reference": "candidate_id",
    "features": "candidate_id",
}
IDS = ("prompt_id", "candidate_id")
OURS = {"stage", "key", "identity", "rows", "files", "model"}  # in a manifest


@dataclass(frozen=True)
class Artifact:
    """What is taken: the tables of each part, a model's folder, and what the manifest says of both."""

    part: Callable[[int], Tables]
    model: Path | None
    origin: Json


def adopt(plan: Plan, name: str, path: str, store: Store) -> tuple[Step, Json]:
    """The step and its new manifest. Raises WinnowError, with nothing written, for all that does not fit."""
    step = _step(plan, name)
    place = f"adopt {step.name}: {path}"
    folder = store.folder(step)
    _refuse_if_made(step, folder)
    if folder.path in (parse_location(path), *parse_location(path).parents):
        raise WinnowError(f"{place}: lies where the step itself will be made; move it elsewhere first")
    artifact = _artifact(step, path, place)
    problems = list(_problems(step, artifact, store))
    if problems:
        raise WinnowError(*(f"{place}: {problem}" for problem in problems))
    store.check()
    store.link_run(plan.name, plan.steps)
    return step, _seal(step, folder, artifact)


def _step(plan: Plan, name: str) -> Step:
    found = chosen(plan, name)
    if len(found) == 1:
        return found[0]
    if found:
        raise WinnowError(f"adopt {name}: of which round? {', '.join(step.name for step in found)}")
    raise WinnowError(f"adopt: no step {name!r} in {plan.name}; {nearest(name, [step.name for step in plan.steps])}")


def _refuse_if_made(step: Step, folder: StepFolder) -> None:
    if folder.manifest:
        raise WinnowError(f"adopt {step.name}: {folder.path} is sealed already; nothing is put over it")
    own = [part for shard in range(step.shards) if (part := folder.sidecar(shard)) and "adopted" not in part]
    if own:
        raise WinnowError(
            f"adopt {step.name}: {len(own)} of {step.shards} parts are made already; winnow run --only {step.name} "
            f"makes the others, or delete {folder.path}"
        )


def _artifact(step: Step, path: str, place: str) -> Artifact:
    """A step's folder of a store, Parquet files, a model's folder, or the last two in one folder."""
    where = parse_location(path)
    source = StepFolder(where)
    manifest = None if isinstance(where, Path) and not where.is_dir() else source.manifest
    if manifest is not None:
        return _of_step(step, source, manifest, place)
    if not isinstance(where, Path):
        raise WinnowError(f"{place}: no sealed step lies there; copy other files to this machine first")
    if not where.exists():
        raise WinnowError(f"{place}: there is no such file or folder")
    if any(where.glob("part-*.json")):
        raise WinnowError(f"{place}: a step that is not sealed; finish its run first")
    dealt = deal(_tables(step, where, place), step.shards)
    origin = {"from": where.name, "identity": None, "digest": digest_of(where)}
    return Artifact(dealt.__getitem__, _model(step, where, place), origin)


def _of_step(step: Step, source: StepFolder, manifest: Json, place: str) -> Artifact:
    """Part by part where both have as many of them, for the prompt id alone says which part a row is in."""
    if not manifest.keys() >= OURS:
        raise WinnowError(f"{place}: its manifest.json is none of a step's; move it elsewhere to take what lies there")
    has = set(manifest["rows"]) | ({"model"} if manifest["model"] else set())
    lacks = [kind for kind in _kinds(step) if kind not in has]
    if lacks:
        raise WinnowError(f"{place}: {manifest['stage']} made no {' and no '.join(lacks)}")
    schemas = [*step.shape.outputs, REJECTS]

    def part(shard: int | None) -> Tables:
        return {table_name(schema): conform(source.read(schema, shard), schema) for schema in schemas}

    files = "".join(f"{file['file']} {file['sha256']}\n" for file in manifest["files"])
    origin = {
        "from": f"{manifest['stage']}/{manifest['key']}",
        "identity": manifest["identity"],
        "digest": sha256(f"{files}{manifest['model']}".encode()).hexdigest(),
    }
    model = source.model().folder if step.shape.makes_model else None
    if model and model_digest(model) != manifest["model"]:
        raise WinnowError(f"{place}: its model is not the one that its manifest names; take it from where it was made")
    if manifest["identity"]["shards"] == step.shards:
        return Artifact(part, model, origin)
    return Artifact(deal(part(None), step.shards).__getitem__, model, origin)


def _kinds(step: Step) -> list[str]:
    return [table_name(schema) for schema in step.shape.outputs] + ["model"] * step.shape.makes_model


def _tables(step: Step, where: Path, place: str) -> Tables:
    """Each table of one Parquet file, or of all that begin with its name; raises WinnowError with all misfits."""
    schemas = [*step.shape.outputs]
    found = {table_name(schema): _files(where, table_name(schema), len(schemas)) for schema in schemas}
    lacks = [name for name, files in found.items() if not files]
    if lacks:
        raise WinnowError(f"{place}: lacks {', '.join(lacks)} (files as {lacks[0]}.parquet, {lacks[0]}-00001.parquet)")
    tables, problems = {}, []
    for schema in [*schemas, REJECTS]:
        name = table_name(schema)
        files = found[name] if name in found else _files(where, name, 0)
        try:
            tables[name] = pa.concat_tables([schema.empty_table(), *(_read(file, schema) for file in files)])
        except WinnowError as error:
            problems += [f"{place}: {problem}" for problem in error.problems]
    if problems:
        raise WinnowError(*problems)
    return tables


def _files(where: Path, table: str, tables: int) -> list[Path]:
    """One file is the one table that the step makes, whatever its name."""
    if where.is_file():
        return [where] if tables == 1 else []
    return sorted(file for file in where.glob(f"{table}*.parquet") if file.name[len(table)] in ".-_")


def _read(file: Path, schema: pa.Schema) -> pa.Table:
    """Columns that may be null need not be there."""
    try:
        table = pq.read_table(file, partitioning=None)
    except (OSError, pa.ArrowInvalid) as error:
        raise WinnowError(f"{file.name} cannot be read as Parquet ({error})") from None
    for field in schema:
        if field.nullable and field.name not in table.column_names:
            table = table.append_column(field.name, pa.nulls(table.num_rows, field.type))
    try:
        return conform(table, schema)
    except WinnowError as error:
        raise WinnowError(*(f"{file.name}: {problem}" for problem in error.problems)) from None


def _model(step: Step, where: Path, place: str) -> Path | None:
    if not step.shape.makes_model:
        return None
    beside = not (where / "config.json").is_file() and (where / "model").is_dir()
    folder = where / "model" if beside else where
    try:
        return ModelPath(str(folder)).path
    except ValueError as error:
        raise WinnowError(f"{place}: {error}") from None


def _problems(step: Step, artifact: Artifact, store: Store) -> Iterator[str]:
    """What no schema says: ids that stand twice or that nobody knows, numbers that are none."""
    wrong, rows, reasons = Counter[str](), Counter[str](), Counter[str]()
    ids: dict[str, list[pa.Table]] = {table_name(schema): [] for schema in step.shape.outputs}
    for shard in range(step.shards):
        tables = artifact.part(shard)
        reasons.update(tables["rejects"]["reason"].to_pylist())
        for name, table in tables.items():
            rows[name] += table.num_rows
            wrong.update(_not_finite(name, table))
            if name in ids:
                ids[name].append(table.select([each for each in table.column_names if each in IDS]))
    yield from (f"{count:,} rows of {column} are no finite number" for column, count in wrong.items() if count)
    for name, parts in ids.items():
        yield from _bad_ids(step, name, pa.concat_tables(parts), store)
    fail_if_nothing_left(step.name, step.options, {"rows": rows, "rejects": reasons, "model": artifact.model})


def _not_finite(name: str, table: pa.Table) -> Counter[str]:
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    rows = {f"{name}.{each}": pc.sum(pc.invert(pc.is_finite(table[each]))).as_py() or 0 for each in floats}
    return Counter(rows)


def _bad_ids(step: Step, name: str, table: pa.Table, store: Store) -> Iterator[str]:
    if column := ONE_ROW_EACH.get(name):
        double = table.num_rows - pc.count_distinct(table[column]).as_py()
        if double:
            yield f"{double:,} rows of {name} have a {column} that another row has"
    for column in table.column_names:
        if column == "candidate_id" and step.shape.makes("candidates"):
            continue  # they are new
        source, known = _ids_read(step, column, store)
        foreign = [] if known is None else table.filter(pc.invert(pc.is_in(table[column], known)))[column]
        if len(foreign):
            yield (
                f"{len(foreign):,} of {table.num_rows:,} rows of {name} have a {column} that is not among those of "
                f"{source}, such as {foreign[0]}"
            )


def _ids_read(step: Step, column: str, store: Store) -> tuple[str, pa.ChunkedArray | None]:
    """The steps that it reads such ids from, and the ids; None where there are none, or one is not sealed.

    Of prompts, those of the split that the step is about.
    """
    split = step.options.get("split")
    found: dict[str, pa.ChunkedArray] = {}
    for item in step.shape.inputs:
        source = step.inputs.get(item.name)
        if item.schema is None or source is None or column not in item.schema.names:
            continue
        if store.folder(source).manifest is None:
            return "", None
        table = store.folder(source).read(item.schema)
        of_split = split is not None and "split" in table.column_names
        own = table.filter(pc.equal(table["split"], split)) if of_split else table
        found[f"{source.name} (split {split})" if of_split else source.name] = own[column]
    chunks = [chunk for ids in found.values() for chunk in ids.chunks]
    return " and ".join(found), pa.chunked_array(chunks, pa.string()) if found else None


def _seal(step: Step, folder: StepFolder, artifact: Artifact) -> Json:
    claim = folder.claim()
    if claim is None:
        raise WinnowError(f"adopt {step.name}: another run is making it; wait for it, or stop it")
    try:
        _refuse_if_made(step, folder)  # while all was read
        delete(folder.path)  # what an adoption that was cut short left
        model = _bring(artifact.model, folder) if artifact.model else None
        for shard in range(step.shards):
            tables = artifact.part(shard)
            own = {"adopted": artifact.origin["from"]} | ({"model": model} if shard == 0 else {})
            folder.write_part(shard, tables, part_record(tables, {}, ResourceTime()) | own)
        record = record_of(step, 0.0) | {"adopted": artifact.origin}
        return folder.seal(record, step.shards, lambda manifest: None)
    finally:
        claim.release()


def _bring(source: Path, folder: StepFolder) -> str:
    """The digest of the model, which lies in the step's folder now."""
    with folder_here(folder) as here:
        (here / "model").mkdir(parents=True)  # not there: the step's folder has just been cleared
        for file in model_files(source):
            shutil.copyfile(file, here / "model" / file.name)
        return keep_model(folder, here / "model")

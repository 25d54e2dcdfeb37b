"""Reading what people bring: JSONL, Parquet, CSV, or a `datasets` data set, row by row, never all or nothing."""

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import DataPath, Wired, Workspace
from schemas import WinnowError

Row = dict[str, Any]
READERS = (".jsonl", ".ndjson", ".parquet", ".csv")


def one_source(options: dict[str, Any], wired: Mapping[str, Wired]) -> list[str]:
    """Plan-time check: a path or a data set's name, not both; a hub name needs a revision to be an identity."""
    path, dataset = options["path"], options["dataset"]
    if (path is None) == (dataset is None):
        return ["give either `path` (a file or folder) or `dataset` (a hub name)"]
    if dataset is not None and options["revision"] is None:
        return [f"dataset {dataset!r} needs `revision`: a name alone says nothing about the content"]
    if path is not None and path.path.is_file() and path.path.suffix not in READERS:
        return [f"path {path}: reads {', '.join(READERS)} and folders that datasets.load_dataset takes"]
    return []


def gives_demonstrations(options: dict[str, Any], wired: Mapping[str, Wired]) -> list[str]:
    """Plan-time check of a stage that reads demonstrations: the step behind `prompts` names a column of them."""
    step = wired.get("prompts")
    if step is None or not step.options or step.options.get("demonstration"):
        return []
    cure = "wire it to a step of stage prompts that names their column in `demonstration`"
    return [f"demonstrations are read from `prompts`, and {step.stage} gives none; {cure}"]


def read_rows(
    ws: Workspace,
    path: DataPath | None,
    dataset: str | None,
    revision: str | None,
    part: str,
    columns: Sequence[str],
) -> Iterator[tuple[str, Row]]:
    """Rows with the place each stood at; what cannot be read goes to the rejects.

    Raises WinnowError if the file as a whole lacks one of `columns`.
    """
    file = path.path if path is not None else None
    if file is None or file.is_dir():
        yield from _from_datasets(str(file or dataset), revision, part, columns)
    elif file.suffix == ".parquet":
        yield from _from_parquet(ws, file, columns)
    elif file.suffix == ".csv":
        yield from _from_csv(ws, file, columns)
    else:
        yield from _from_jsonl(ws, file, columns)


def text_of(row: Row, name: str) -> str:
    """The row's text in a column; raises ValueError with the reason for the rejects table."""
    value = row.get(name)
    if value is None:
        raise ValueError(f"no {name}")
    if not isinstance(value, str):
        raise ValueError(f"{name} is not text")
    if not value.strip():
        raise ValueError(f"empty {name}")
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can write and no tokenizer reads
        raise ValueError(f"{name} is not valid Unicode") from None
    return value


def prompt_of(row: Row, name: str) -> str | list[dict[str, str]]:
    """A plain string, or chat messages with a role and a content each; raises ValueError."""
    value = row.get(name)
    if not isinstance(value, list):
        return text_of(row, name)
    messages = [{"role": text_of(each, "role"), "content": text_of(each, "content")} for each in _mappings(value, name)]
    if not messages:
        raise ValueError(f"empty {name}")
    return messages


def _mappings(values: list[Any], name: str) -> list[Row]:
    if not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{name} is not text")
    return values


def _require(have: Sequence[str], columns: Sequence[str], what: str) -> None:
    missing = [column for column in columns if column not in have]
    if missing:
        raise WinnowError(f"{what}: no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, have))}")


def _from_jsonl(ws: Workspace, file: Path, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    seen: set[str] = set()
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file.name}:{number}"
            if not line.strip():
                continue
            row = _decode(ws, place, line)
            if row is not None:
                seen |= row.keys()
                yield place, row
    if seen:
        _require(sorted(seen), columns, file.name)


def _decode(ws: Workspace, place: str, line: bytes) -> Row | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        ws.reject("bad UTF-8", place=place, detail=str(error))
    except (ValueError, RecursionError) as error:
        ws.reject("not JSON", place=place, detail=str(error))
    else:
        if isinstance(row, dict):
            return row
        ws.reject("not a JSON object", place=place, detail=repr(row))
    return None


def _from_csv(ws: Workspace, file: Path, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 128 KiB
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines)
        _require(reader.fieldnames or [], columns, file.name)
        for row in reader:
            place = f"{file.name}:{reader.line_num}"
            if any("\udc80" <= letter <= "\udcff" for letter in "".join(map(str, row.values()))):
                ws.reject("bad UTF-8", place=place, detail=ascii(row))
            else:
                yield place, row


def _from_parquet(ws: Workspace, file: Path, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    try:
        source = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise WinnowError(f"{file.name}: not a Parquet file ({error})") from None
    _require(source.schema_arrow.names, columns, file.name)
    number = 0
    for batch in source.iter_batches(batch_size=4096, columns=list(columns)):
        for n in range(batch.num_rows):
            place = f"{file.name}:{number + n}"
            try:
                yield place, {name: batch.column(name)[n].as_py() for name in columns}
            except UnicodeDecodeError as error:
                ws.reject("bad UTF-8", place=place, detail=str(error))
        number += batch.num_rows


def _from_datasets(name: str, revision: str | None, part: str, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """A hub name, a folder of data files, or what `save_to_disk` wrote."""
    import datasets

    try:
        if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
            loaded: Any = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, revision=revision)
        rows = loaded[part] if isinstance(loaded, dict) else loaded
    except Exception as error:
        raise WinnowError(f"dataset {name}, split {part!r}: {type(error).__name__}: {error}") from None
    _require(rows.column_names, columns, name)
    for number, row in enumerate(rows):
        yield f"{Path(name).name}:{number}", row

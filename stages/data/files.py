"""Reading what people bring: JSONL, Parquet, CSV, or a `datasets` data set, row by row, never all or nothing."""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import DataPath, InputStep, StageContext
from schemas import WinnowError
from schemas.ids import Message

Row = dict[str, Any]
Prompt = str | list[Message]
LINES, PARQUET, CSV = (".jsonl", ".ndjson"), ".parquet", ".csv"
READERS = (*LINES, PARQUET, CSV, *(f"{kind}.gz" for kind in (*LINES, CSV)))
# What `datasets` finds in a folder by itself, packed or not.
IN_FOLDERS = {*LINES, PARQUET, CSV, ".json", ".arrow", ".tsv", ".txt", ".zip", ".gz", ".bz2", ".xz", ".zst", ".lz4"}
HEAD = 1000  # rows of a JSONL file in which each column must stand once
DAMAGE = (OSError, EOFError, zlib.error, pa.ArrowException, csv.Error)
# First bytes of what often stands under another name.
FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer and not the data; fetch the file itself with `git lfs pull`",
    b"<!doctype": "a web page; download the file itself, which may need a login",
    b"<html": "a web page; download the file itself, which may need a login",
    b"\x1f\x8b": "gzip; end its name in .gz",
    b"PAR1": "Parquet; end its name in .parquet",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save the sheet as CSV",
    b"\x28\xb5\x2f\xfd": "zstd; unpack it first",
    b"ARROW1": "Arrow; write it as Parquet",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
}


class MissingColumnError(WinnowError):
    """A file or data set lacks a column as a whole; `have` are those that it has."""

    have: Sequence[str] = ()


@dataclass(frozen=True)
class Source:
    """Where rows come from, as the options of a stage say it."""

    path: DataPath | None = None
    dataset: str | None = None
    revision: str | None = None
    subset: str | None = None
    part: str = "train"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Source":
        return cls(*(options[name] for name in ("path", "dataset", "revision", "subset", "part")))

    @property
    def file(self) -> Path | None:
        return self.path.path if self.path is not None and self.path.path.is_file() else None

    def rows(self, ctx: StageContext, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """Rows with the place each stood at; what cannot be read goes to the rejects.

        Raises MissingColumnError if all of it lacks one of `columns`, WinnowError if it cannot be read to its end.
        """
        if self.file is None:
            name, rows = str(self.path or self.dataset), self._from_datasets(columns)
        else:
            name, rows = self.file.name, _from_file(ctx, self.file, columns)
        place = "its start"
        try:
            for place, row in rows:
                yield place, row
        except DAMAGE as error:
            cure = "it is damaged or cut short; fetch or write it again"
            raise WinnowError(f"{name}: cannot be read on after {place} ({error}): {cure}") from None

    def _from_datasets(self, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """A hub name, a folder of data files, or what `save_to_disk` wrote."""
        name = str(self.path or self.dataset)
        rows = self._load(name)
        _require(rows.column_names, columns, name)
        for number, row in enumerate(rows):
            yield f"{Path(name).name}:{number}", row

    def _load(self, name: str) -> Any:
        import datasets

        try:
            if _saved(Path(name)):
                loaded: Any = datasets.load_from_disk(name)
            else:
                loaded = datasets.load_dataset(name, revision=self.revision, **self._subset(name))
        except Exception as error:
            raise WinnowError(f"dataset {name}, split {self.part!r}: {_root_of(error)}") from None
        if not isinstance(loaded, dict):
            return loaded
        if self.part not in loaded:
            has = ", ".join(map(repr, loaded))
            raise WinnowError(f"dataset {name}: no split {self.part!r}; it has {has}: set `part` to one of them")
        return loaded[self.part]

    def _subset(self, name: str) -> dict[str, str]:
        """A configuration where the data set has one of that name, else a folder in it."""
        import datasets

        if self.subset is None:
            return {}
        named = self.subset in datasets.get_dataset_config_names(name, revision=self.revision)
        return {"name" if named else "data_dir": self.subset}


def one_source(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    """Plan-time check: a path or a data set's name, not both; a hub name needs a revision to be an identity."""
    path, dataset = options["path"], options["dataset"]
    if (path is None) == (dataset is None):
        return ["give either `path` (a file or folder) or `dataset` (a hub name)"]
    if dataset is not None and options["revision"] is None:
        return [f"dataset {dataset!r} needs `revision`: a name alone says nothing about the content"]
    return _readable(path.path, options["subset"]) if path is not None else []


def _readable(path: Path, subset: str | None) -> list[str]:
    if path.is_file() and subset is not None:
        return [f"subset {subset!r}: path {path} is one file; subsets are of folders and data sets"]
    if path.is_file() and not path.name.endswith(READERS):
        return [f"path {path}: reads {', '.join(READERS)} and folders that datasets.load_dataset takes"]
    if path.is_dir() and not _saved(path) and not any(file.suffix in IN_FOLDERS for file in path.rglob("*")):
        return [f"path {path}: a folder without data files ({', '.join(sorted(IN_FOLDERS))})"]
    return []


def has_columns(options: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """Plan-time check of a file's head; folders and data sets are looked at later. Raises WinnowError."""
    file = Source.of(options).file
    if file is None:
        return []
    have = columns_in(file)
    if not have:
        return [f"{file.name}: no row in it, and a row of JSONL is one JSON object on a line"]
    _require(have, columns, file.name)
    return []


def gives_demonstrations(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    """Plan-time check of a stage that reads demonstrations: the step behind `prompts` names a column of them."""
    step = wired.get("prompts")
    if step is None or not step.options or step.options.get("demonstration"):
        return []
    cure = "wire it to a step of stage prompts that names their column in `demonstration`"
    return [f"demonstrations are read from `prompts`, and {step.stage} gives none; {cure}"]


def columns_in(file: Path) -> list[str]:
    """Names in a file's schema, header, or first rows; raises WinnowError for what is no such file."""
    kind = _kind_of(file)
    try:
        _refuse_foreign(file)
        if kind == PARQUET:
            return list(pq.read_schema(file).names)
        if kind == CSV:
            with closing(_text(file)) as lines:
                return next(csv.reader(lines), [])
        with closing(_bytes(file)) as lines:
            rows = filter(None, map(_object, lines))
            return list(dict.fromkeys(name for row in islice(rows, HEAD) for name in row))
    except DAMAGE as error:
        what = {PARQUET: "a whole Parquet file", CSV: "a whole CSV file"}.get(kind, "a whole JSONL file")
        cure = "it is of another kind, damaged, or cut short; fetch or write it again"
        raise WinnowError(f"{file.name}: not {what} ({error}): {cure}") from None


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


def prompt_of(row: Row, name: str) -> Prompt:
    """A plain string, or chat messages with a role and a content each; raises ValueError."""
    return as_prompt(messages_of(row, name)) if isinstance(row.get(name), list) else text_of(row, name)


def reply_of(row: Row, name: str, prompt: Prompt | None = None) -> str:
    """Text, or the text of one assistant's turn in a list of messages; raises ValueError.

    Where the turns of `prompt` stand before it, as in data sets that repeat them, they are taken off.
    """
    if not isinstance(row.get(name), list):
        return text_of(row, name)
    turns = messages_of(row, name)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    if turns[: len(before)] == before:
        turns = turns[len(before) :]
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise ValueError(f"{name} is not one assistant turn")
    return turns[0]["content"]


def messages_of(row: Row, name: str) -> list[Message]:
    """Chat messages with a role and a content each; raises ValueError."""
    values = row.get(name)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{name} is not text" if values is not None else f"no {name}")
    if not values:
        raise ValueError(f"empty {name}")
    return [{"role": text_of(each, "role"), "content": text_of(each, "content")} for each in values]


def as_prompt(messages: list[Message]) -> Prompt:
    """One user's message is its text: a chat template makes the same tokens of both, so they are one prompt."""
    return messages[0]["content"] if [each["role"] for each in messages] == ["user"] else messages


def _require(have: Sequence[str], columns: Sequence[str], what: str) -> None:
    if missing := [column for column in columns if column not in have]:
        names = ", ".join(map(repr, missing))
        error = MissingColumnError(f"{what}: no column {names}; it has {', '.join(map(repr, have))}")
        error.have = have
        raise error


def _root_of(error: BaseException) -> str:
    """The cause at the bottom, for `datasets` says what went wrong there and not at the top."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = f"{type(error).__name__}: {error}"
    if "scripts are no longer supported" in said:
        said += "; the hub keeps such a data set as Parquet, too: set `revision: refs/convert/parquet`, and `subset`"
    return said


def _saved(folder: Path) -> bool:
    """Did `save_to_disk` write it?"""
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


def _kind_of(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix


def _bytes(file: Path) -> BinaryIO:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def _text(file: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(_bytes(file), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _refuse_foreign(file: Path) -> None:
    with file.open("rb") as start:
        head = start.read(64).lstrip(b" \r\n\t").lower()
    due = {PARQUET: b"PAR1", ".gz": b"\x1f\x8b"}.get(file.suffix)
    lists = {b"[": "one JSON list; write one object a line"} if file.suffix in LINES else {}
    for magic, what in (FOREIGN | lists).items():
        if magic != due and head.startswith(magic.lower()):
            raise WinnowError(f"{file.name}: this is {what}")


def _from_file(ctx: StageContext, file: Path, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    if have := columns_in(file):
        _require(have, columns, file.name)
    read = {PARQUET: _from_parquet, CSV: _from_csv}.get(_kind_of(file))
    return read(ctx, file, columns) if read else _from_jsonl(ctx, file)


def _from_jsonl(ctx: StageContext, file: Path) -> Iterator[tuple[str, Row]]:
    with closing(_bytes(file)) as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file.name}:{number}"
            if not line.strip():
                continue
            row = _decode(ctx, place, line)
            if row is not None:
                yield place, row


def _decode(ctx: StageContext, place: str, line: bytes) -> Row | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        ctx.reject("bad UTF-8", place=place, detail=str(error))
    except (ValueError, RecursionError) as error:
        ctx.reject("not JSON", place=place, detail=str(error))
    else:
        if isinstance(row, dict):
            return row
        ctx.reject("not a JSON object", place=place, detail=repr(row))
    return None


def _object(line: bytes) -> Row | None:
    """The JSON object that a line is, if it is one."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _from_csv(ctx: StageContext, file: Path, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 128 KiB
    with closing(_text(file)) as lines:
        reader = csv.DictReader(lines)
        for row in reader:
            place = f"{file.name}:{reader.line_num}"
            if any("\udc80" <= letter <= "\udcff" for letter in "".join(map(str, row.values()))):
                ctx.reject("bad UTF-8", place=place, detail=ascii(row))
            else:
                yield place, row


def _from_parquet(ctx: StageContext, file: Path, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    number = 0
    # Writers other than Arrow keep checksums of pages: where they do, damage is found that would read as other text.
    source = pq.ParquetFile(file, page_checksum_verification=True)
    for batch in source.iter_batches(batch_size=4096, columns=list(columns)):
        for n in range(batch.num_rows):
            place = f"{file.name}:{number + n}"
            try:
                yield place, {name: batch.column(name)[n].as_py() for name in columns}
            except UnicodeDecodeError as error:
                ctx.reject("bad UTF-8", place=place, detail=str(error))
        number += batch.num_rows

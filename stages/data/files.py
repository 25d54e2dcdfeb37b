"""Files and data sets brought by users: JSONL, Parquet, CSV or a `datasets` data set, read and rejected row by row."""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import Bound, DataPath, InputStep, StageContext
from schemas import WinnowError
from stages.data.formats import NOT_PAIRS, columns_of, couple_neighbours, preference_reader
from stages.data.rows import Row

JSONL, PARQUET, CSV = (".jsonl", ".ndjson"), ".parquet", ".csv"
FILE_SUFFIXES = (*JSONL, PARQUET, CSV, *(f"{suffix}.gz" for suffix in (*JSONL, CSV)))
# Files that `datasets` finds in a folder by itself, compressed or not.
ARCHIVE_SUFFIXES = (".zip", ".gz", ".bz2", ".xz", ".zst", ".lz4")
FOLDER_SUFFIXES = {*JSONL, PARQUET, CSV, ".json", ".arrow", ".tsv", ".txt", *ARCHIVE_SUFFIXES}
OPTIONAL_COLUMNS = ("tools",)  # read where a file has them
HEAD_ROWS = 1000  # of a JSONL file: a column that none of them has does not exist
# Bytes of a CSV file that are not UTF-8 are escaped as surrogates, so that one bad row does not end the file.
CSV_TEXT: dict[str, str] = dict(encoding="utf-8-sig", errors="surrogateescape", newline="")
READ_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException, csv.Error)
# First bytes of files that often carry a wrong name, and what to do about each.
FOREIGN_CONTENT = {
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


@dataclass(frozen=True)
class DataSource:
    """Origin of rows: a file, a folder, or a data set on the hub. The fields are options of the stages that read it."""

    path: DataPath | None = None
    dataset: str | None = None
    revision: str | None = None
    subset: str | None = None
    dataset_split: str = "train"

    def check(self, columns: Sequence[str]) -> list[str]:
        """Return the problems known when a recipe is planned; raise WinnowError for a file that cannot be read.

        Columns are looked up in a file's schema or first rows; folders and data sets are only opened by the stage.
        """
        if (self.path is None) == (self.dataset is None):
            return ["give either `path` (a file or folder) or `dataset` (a name on the hub)"]
        if self.path is None:
            # A name on the hub is no identity: what it holds may change, and the step's key would not.
            missing = self.revision is None
            return [f"dataset {self.dataset!r} needs `revision`, which fixes its content"] if missing else []
        path = self.path.path
        if not path.is_file():
            has_files = _is_saved_dataset(path) or any(file.suffix in FOLDER_SUFFIXES for file in path.rglob("*"))
            suffixes = ", ".join(sorted(FOLDER_SUFFIXES))
            return [] if has_files else [f"path {path}: a folder without data files ({suffixes})"]
        if self.subset is not None:
            return [f"subset {self.subset!r}: path {path} is one file; only folders and data sets have subsets"]
        if not path.name.endswith(FILE_SUFFIXES):
            suffixes = ", ".join(FILE_SUFFIXES)
            return [f"path {path}: this stage reads {suffixes} and folders that datasets.load_dataset takes"]
        names = column_names(path)
        if not names:
            return [f"{path.name}: no rows; in JSONL, each row is one JSON object on its own line"]
        _require_columns(names, columns, path.name)
        return []

    def rows(self, ctx: StageContext, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """Yield (location, row), the location as `name:line` or `name:row`; a row that cannot be read is rejected.

        Raises WinnowError if all rows lack one of `columns`, or the file is damaged.
        """
        if self.path is None or not self.path.path.is_file():
            name, rows = str(self.path or self.dataset), self._dataset_rows(columns)
        else:
            name = self.path.path.name
            if names := column_names(self.path.path):
                _require_columns(names, columns, name)
            rows = _file_rows(self.path.path, columns, ctx.reject)
        location = "its start"
        try:
            for location, row in rows:
                yield location, row
        except READ_ERRORS as error:
            cure = "it is damaged or cut short; fetch or write it again"
            raise WinnowError(f"{name}: cannot be read after {location} ({error}): {cure}") from None

    def reader_rows(self, ctx: StageContext, reader: Bound) -> Iterator[tuple[str, list[Row]]]:
        """Yield (location of the first row, the rows that one call of the preference reader takes)."""
        rows, together = self.rows(ctx, columns_of(reader)), reader.metadata.get("together")
        if together is None:
            return ((location, [row]) for location, row in rows)
        return couple_neighbours(rows, together)

    def _dataset_rows(self, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """Yield the rows of a hub data set, of a folder of data files, or of a folder written by `save_to_disk`."""
        import datasets

        name = str(self.path or self.dataset)
        try:
            if _is_saved_dataset(Path(name)):
                loaded: Any = datasets.load_from_disk(name)
            else:
                subset: dict[str, str] = {}
                if self.subset is not None:  # a configuration where the data set has one of this name, else a folder
                    configurations = datasets.get_dataset_config_names(name, revision=self.revision)
                    subset = {"name" if self.subset in configurations else "data_dir": self.subset}
                loaded = datasets.load_dataset(name, revision=self.revision, **subset)
        except Exception as error:  # `datasets` passes on what its readers raise, which may be anything
            cause: BaseException = error
            while cause.__cause__ is not None:  # the last one says what is wrong, the first that something is
                cause = cause.__cause__
            message = f"dataset {name}, split {self.dataset_split!r}: {type(cause).__name__}: {cause}"
            if "scripts are no longer supported" in message:
                message += "; the hub also has it as Parquet: set `revision: refs/convert/parquet`, and `subset`"
            raise WinnowError(message) from None
        if isinstance(loaded, dict):
            if self.dataset_split not in loaded:
                splits = ", ".join(map(repr, loaded))
                cure = f"it has {splits}; set `dataset_split` to one of them"
                raise WinnowError(f"dataset {name}: no split {self.dataset_split!r}: {cure}")
            loaded = loaded[self.dataset_split]
        _require_columns(loaded.column_names, columns, name)
        for number, row in enumerate(loaded):
            yield f"{Path(name).name}:{number}", row


def check_source(options: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """Check at plan time that a stage has one source of data and, if it is a file, that it has these columns."""
    try:
        return DataSource(**{field.name: options[field.name] for field in fields(DataSource)}).check(columns)
    except WinnowError as error:
        return list(error.problems)


def check_demonstrations(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Check at plan time that the step behind `prompts` has demonstrations; return the problem if it has none."""
    step = inputs.get("prompts")
    if step is None or not step.options or step.options.get("demonstration"):
        return []
    cure = "set `prompts` under `from` to a step of stage prompts that has the option `demonstration`"
    return [f"demonstrations are read from `prompts`, but stage {step.stage} provides none: {cure}"]


def column_names(file: Path) -> list[str]:
    """Return the names in a file's schema, header, or first rows; raise WinnowError if it is of another kind."""
    suffix = Path(file.name.removesuffix(".gz")).suffix
    try:
        with file.open("rb") as stream:
            head = stream.read(64).lstrip(b" \r\n\t").lower()
        foreign = dict(FOREIGN_CONTENT)
        foreign.pop({PARQUET: b"PAR1", ".gz": b"\x1f\x8b"}.get(file.suffix, b""), None)
        if file.suffix in JSONL:
            foreign[b"["] = "one JSON list; write one object per line"
        for magic, description in foreign.items():
            if head.startswith(magic.lower()):
                raise WinnowError(f"{file.name}: this is {description}")
        if suffix == PARQUET:
            return list(pq.read_schema(file).names)
        if suffix == CSV:
            with closing(_open(file, "rt", **CSV_TEXT)) as lines:
                return next(csv.reader(lines), [])
        # In JSONL a column exists where some row has it; lines that cannot be read are the stage's to reject.
        rows = _file_rows(file, [], reject=lambda *args, **kwargs: None)
        return list(dict.fromkeys(name for _, row in islice(rows, HEAD_ROWS) for name in row))
    except READ_ERRORS as error:
        kind = {PARQUET: "Parquet", CSV: "CSV"}.get(suffix, "JSONL")
        cure = "it is of another kind, damaged, or cut short; fetch or write it again"
        raise WinnowError(f"{file.name}: not a complete {kind} file ({error}): {cure}") from None


def _file_rows(file: Path, columns: Sequence[str], reject: Callable[..., None]) -> Iterator[tuple[str, Row]]:
    """Yield (location, row) of a file: all columns of JSONL and CSV, `columns` of Parquet."""
    suffix = Path(file.name.removesuffix(".gz")).suffix
    if suffix == PARQUET:
        number = 0
        # Writers other than Arrow keep checksums of pages: where they do, damage that would read as text is found.
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        optional = [name for name in OPTIONAL_COLUMNS if name in parquet.schema_arrow.names]
        read = list(dict.fromkeys([*columns, *optional]))
        for batch in parquet.iter_batches(batch_size=4096, columns=read):
            for n in range(batch.num_rows):
                location = f"{file.name}:{number + n}"
                try:
                    yield location, {name: batch.column(name)[n].as_py() for name in read}
                except UnicodeDecodeError as error:
                    reject("bad UTF-8", place=location, detail=str(error))
            number += batch.num_rows
    elif suffix == CSV:
        csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 128 KiB
        with closing(_open(file, "rt", **CSV_TEXT)) as lines:
            reader = csv.DictReader(lines)
            for row in reader:
                location = f"{file.name}:{reader.line_num}"
                if any("\udc80" <= character <= "\udcff" for character in "".join(map(str, row.values()))):
                    reject("bad UTF-8", place=location, detail=ascii(row))
                else:
                    yield location, row
    else:
        with closing(_open(file, "rb")) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                location = f"{file.name}:{number}"
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    reject("bad UTF-8", place=location, detail=str(error))
                except (ValueError, RecursionError) as error:
                    reject("not JSON", place=location, detail=str(error))
                else:
                    if isinstance(row, dict):
                        yield location, row
                    else:
                        reject("not a JSON object", place=location, detail=repr(row))


def _require_columns(names: Sequence[str], columns: Sequence[str], file: str) -> None:
    """Raise WinnowError for missing columns, with what the file may be, or the readers that can read it."""
    missing = [column for column in columns if column not in names]
    if not missing:
        return
    lacking, existing = (", ".join(map(repr, group)) for group in (missing, names))
    problem = f"{file}: no column {lacking}; it has {existing}"
    for signature, description in NOT_PAIRS:
        if signature <= set(names):
            raise WinnowError(f"{problem}. This is {description}")
    fitting = []
    for entry in preference_reader.entries.values():
        defaults = {name: field.default for name, field in entry.options.model_fields.items()}
        if set(columns_of(Bound(entry, defaults))) <= set(names):
            fitting.append(entry.name)
    if fitting:
        problem += f"; in stage preferences or prompts, set `reader` to {' or '.join(fitting)} for these"
    raise WinnowError(problem)


def _is_saved_dataset(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` wrote the folder."""
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


def _open(file: Path, mode: str, **text: str) -> IO[Any]:
    opener: Callable[..., IO[Any]] = gzip.open if file.suffix == ".gz" else open
    return opener(file, mode, **text)

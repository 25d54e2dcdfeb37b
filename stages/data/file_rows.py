"""Rows of one file: JSONL, JSON, Parquet, CSV or TSV, compressed or not. What cannot be read is rejected row by row."""

import csv
import gzip
import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas import WinnowError, WinnowWarning
from stages.data.rows import Row

JSONL, JSON, PARQUET = (".jsonl", ".ndjson"), ".json", ".parquet"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TEXT_SUFFIXES = (*JSONL, JSON, *DELIMITERS)
FILE_SUFFIXES = (*TEXT_SUFFIXES, PARQUET, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES))
KINDS = {PARQUET: "Parquet", ".csv": "CSV", ".tsv": "TSV", JSON: "JSON"}
HEAD_ROWS = 1000  # of a JSON file: a column that none of them has does not exist
PIECE = 1 << 16  # characters of a JSON list that are read at once
LONGEST_ROW = 1 << 26  # bytes or characters of one; a file that unpacks to more in a row is no data
BATCH_ROWS, BATCH_BYTES = 4096, 1 << 26  # of Parquet that are decoded at once, by the mean size of a row
ROWS_IN_A_CELL = 3  # delimiters, in lines of a cell that would each be a row, from which they are rows
# Bytes that are not UTF-8 are escaped as surrogates, so that one bad row does not end the file.
ESCAPED: dict[str, str] = dict(encoding="utf-8-sig", errors="surrogateescape", newline="")
ESCAPES = re.compile("[\udc80-\udcff]")
BLANKS = re.compile(r"\s*")
READ_ERRORS = (OSError, EOFError, zlib.error, pa.ArrowException, csv.Error, json.JSONDecodeError)
LFS_POINTER = b"version https://git-lfs"
# First bytes of files that often carry a wrong name, and what to do about each.
FOREIGN_CONTENT = {
    LFS_POINTER: "a Git LFS pointer and not the data; fetch the file itself with `git lfs pull`",
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


def column_names(file: Path) -> list[str]:
    """Return the names in a file's schema, header, or first rows; raise WinnowError if it is of another kind."""
    suffix = _suffix(file)
    try:
        with file.open("rb") as stream:
            head = stream.read(64).lstrip(b" \r\n\t").lower()
        foreign = dict(FOREIGN_CONTENT)
        foreign.pop({PARQUET: b"PAR1", ".gz": b"\x1f\x8b"}.get(file.suffix, b""), None)
        if file.suffix in JSONL:
            foreign[b"["] = "one JSON list; end its name in .json"
        for magic, description in foreign.items():
            if head.startswith(magic.lower()):
                raise WinnowError(f"{file.name}: this is {description}")
        if suffix == PARQUET or suffix in DELIMITERS:
            if suffix == PARQUET:
                schema = pq.read_schema(file)
                names, repeated = list(schema.names), _repeated_fields(schema)
            else:
                with closing(_open(file, "rt", **ESCAPED)) as lines:
                    names = next(csv.reader(_lines_of_rows(lines), delimiter=DELIMITERS[suffix], strict=True), [])
                repeated = _repeated_names(names)
            if repeated:
                raise WinnowError(f"{file.name}: more than one column {', '.join(map(repr, repeated))}; rename one")
            return names
        # In JSON a column exists where some row has it; rows that cannot be read are the stage's to reject.
        rows = file_rows(file, [], reject=lambda *args, **kwargs: None)
        return list(dict.fromkeys(name for _, row in islice(rows, HEAD_ROWS) for name in row))
    except READ_ERRORS as error:
        cure = "it is of another kind, damaged, or cut short; fetch or write it again"
        raise WinnowError(f"{file.name}: not a complete {KINDS.get(suffix, 'JSONL')} file ({error}): {cure}") from None


def file_rows(
    file: Path, columns: Sequence[str], reject: Callable[..., None], name: str = ""
) -> Iterator[tuple[str, Row]]:
    """Yield (location, row) of a file: all columns of a text file, those of `columns` that a Parquet file has.

    The location is `name:line` of JSONL, CSV and TSV, `name:row`, counted from 0, of Parquet and a JSON list; `name`
    is by default that of the file without its folder.
    """
    suffix, name = _suffix(file), name or file.name
    if suffix == PARQUET:
        number = 0
        # Writers other than Arrow keep checksums of pages: where they do, damage that would read as text is found.
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        columns = [column for column in columns if column in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(batch_size=_batch_rows(parquet.metadata), columns=columns):
            for n in range(batch.num_rows):
                location = f"{name}:{number + n}"
                try:
                    yield location, {column: batch.column(column)[n].as_py() for column in columns}
                except UnicodeDecodeError as error:
                    reject("bad UTF-8", place=location, detail=str(error))
            number += batch.num_rows
    elif suffix in DELIMITERS:
        yield from _delimited_rows(file, DELIMITERS[suffix], reject, name)
    elif suffix == JSON and _is_json_list(file):
        keys = RepeatedKeys()
        with closing(_open(file, "rt", **ESCAPED)) as stream:
            for number, (text, item) in enumerate(json_items(stream, keys)):
                location, repeated = f"{name}:{number}", keys.pop()
                if ESCAPES.search(text):
                    reject("bad UTF-8", place=location, detail=ascii(text))
                elif repeated:
                    reject("a key twice", place=location, detail=f"{', '.join(map(repr, repeated))} in {text}")
                elif not isinstance(item, dict):
                    reject("not a JSON object", place=location, detail=repr(item))
                else:
                    yield location, item
    else:
        keys = RepeatedKeys()
        decode = json.JSONDecoder(object_pairs_hook=keys).decode
        with closing(_open(file, "rb")) as lines:
            for number, line in enumerate(_bounded_lines(lines), 1):
                location = f"{name}:{number}"
                if line is None:
                    reject(f"a line of more than {LONGEST_ROW >> 20} MiB", place=location)
                    continue
                if not line.strip():
                    continue
                keys.pop()  # of a line before that could not be read to its end
                try:
                    row = decode(line.decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    reject("bad UTF-8", place=location, detail=str(error))
                except (ValueError, RecursionError) as error:
                    reject("not JSON", place=location, detail=str(error))
                else:
                    if repeated := keys.pop():
                        reject("a key twice", place=location, detail=f"{', '.join(map(repr, repeated))} in {row}")
                    elif isinstance(row, dict):
                        yield location, row
                    else:
                        reject("not a JSON object", place=location, detail=repr(row))


class RepeatedKeys:
    """Hook of a JSON decoder that notes the keys which an object has more than once: only the last would be read."""

    def __init__(self) -> None:
        self.names = set[str]()

    def __call__(self, pairs: list[tuple[str, Any]]) -> Row:
        row = dict(pairs)
        if len(row) < len(pairs):
            self.names.update(_repeated_names([name for name, _ in pairs]))
        return row

    def pop(self) -> list[str]:
        """Return the keys noted so far, and forget them."""
        names, self.names = sorted(self.names), set()
        return names


def json_items(
    stream: IO[str], hook: Callable[[list[tuple[str, Any]]], Row] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield (text, value) of each item of a JSON list, which is read piece by piece and not held in memory.

    `hook` is a decoder's `object_pairs_hook`; it may see a part of an item before it sees all of it.

    Values are those of `json.loads`, as for a line of JSONL. (ijson's fast backend changes half surrogate pairs to `?`
    and ends at NaN and at integers of more than 64 bits; the readers of DuckDB and Arrow give all rows one type.)
    Raises json.JSONDecodeError where the list is damaged or has no end.
    """
    decode, text, position = json.JSONDecoder(object_pairs_hook=hook).raw_decode, "", 0

    def next_character() -> str:
        """Move `position` over blanks; return the character there, or nothing at the end of the file."""
        nonlocal text, position
        while (position := BLANKS.match(text, position).end()) == len(text):  # type: ignore[union-attr]
            text, position = stream.read(PIECE), 0
            if not text:
                return ""
        return text[position]

    def next_item() -> tuple[str, Any]:
        """Decode the item at `position`, and move there behind it, to a comma or the end of the list."""
        nonlocal text, position
        while True:
            error = "an item without a comma or the end of the list behind it"
            try:
                item, end = decode(text, position)
                behind = BLANKS.match(text, end).end()  # type: ignore[union-attr]
                if text[behind : behind + 1] in (",", "]"):
                    item_text, position = text[position:end], behind
                    return item_text, item
            except json.JSONDecodeError as cause:
                error = cause.msg
            except RecursionError:
                raise json.JSONDecodeError("an item is nested too deeply", text, position) from None
            # The item goes on in what has not been read, or is damaged.
            if not (piece := stream.read(max(PIECE, len(text)))):
                raise json.JSONDecodeError(error, text, position)
            if len(text) - position > LONGEST_ROW:
                raise json.JSONDecodeError(f"an item of more than {LONGEST_ROW:,} characters", text[:1], 0)
            text, position = text[position:] + piece, 0

    if next_character() != "[":
        raise json.JSONDecodeError("not a list", text, position)
    position += 1
    if next_character() != "]":
        while True:
            next_character()
            yield next_item()
            if text[position] == "]":
                break
            position += 1  # over the comma
    position += 1
    if next_character():
        raise json.JSONDecodeError("text behind the list", text, position)


def _delimited_rows(file: Path, delimiter: str, reject: Callable[..., None], name: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a CSV or TSV file; one with more cells than the header is rejected, for they have no names."""
    csv.field_size_limit(LONGEST_ROW)  # the default refuses texts of more than 128 KiB
    is_warned = False
    with closing(_open(file, "rt", **ESCAPED)) as lines:
        # Strict: a quote that is not closed would take all rows behind it into its own.
        reader = csv.DictReader(_lines_of_rows(lines), delimiter=delimiter, strict=True)
        for row in reader:
            location = f"{name}:{reader.line_num}"
            swallowed = _rows_in_cells(row, delimiter)
            if swallowed >= ROWS_IN_A_CELL:
                reject("a cell with whole rows in it: a quote is missing", place=location, detail=ascii(row))
                continue
            if swallowed and not is_warned:
                is_warned = True
                message = (
                    f"{location}: a quoted cell goes on over lines that might be rows of their own; if a quote is "
                    "missing there, add it"
                )
                warnings.warn(message, WinnowWarning, stacklevel=2)
            if None in row:
                reject("more cells than columns", place=location, detail=ascii(row))
            elif ESCAPES.search("".join(map(str, row.values()))):
                reject("bad UTF-8", place=location, detail=ascii(row))
            else:
                yield location, row


def _rows_in_cells(row: Row, delimiter: str) -> int:
    """Return how many delimiters lines inside of a cell have, if each line would be a row by itself; else 0.

    A quote that opens a cell and is not closed takes all lines as text up to the next quote. Where that closes a cell
    of the same column, the lines between are whole rows, and the last one is a row up to that column. Of a single line,
    which any text may have, 1 is returned at most.
    """
    cells = list(row.values())
    most = 0
    for column, cell in enumerate(cells):
        if not isinstance(cell, str) or "\n" not in cell or len(cells) < 2:
            continue
        *between, last = (line.count(delimiter) for line in cell.rstrip("\r\n").split("\n")[1:] or [""])
        if last == column and all(count == len(cells) - 1 for count in between):
            most = max(most, sum(between) + last if between else min(last, 1))
    return most


def _bounded_lines(stream: IO[Any]) -> Iterator[Any]:
    """Yield the lines of a stream, and None for one of more than LONGEST_ROW, which is read over piece by piece."""
    while line := stream.readline(LONGEST_ROW):
        end = b"\n" if isinstance(line, bytes) else "\n"
        if len(line) < LONGEST_ROW or line.endswith(end):
            yield line
            continue
        yield None
        while (piece := stream.readline(PIECE)) and not piece.endswith(end):
            pass


def _lines_of_rows(stream: IO[str]) -> Iterator[str]:
    """Yield the lines of a CSV file; raise csv.Error for one that is too long."""
    for number, line in enumerate(_bounded_lines(stream), 1):
        if line is None:
            raise csv.Error(f"line {number} has more than {LONGEST_ROW:,} characters")
        yield line


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Return how many rows of a Parquet file are decoded at once: few of a file with large ones."""
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(largest, 1)))


def _repeated_names(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []


def _repeated_fields(fields: Iterable[pa.Field]) -> list[str]:
    """Return the names that several columns have, or several fields of one struct."""
    fields = list(fields)
    nested = ([field.type.field(n) for n in range(field.type.num_fields)] for field in fields)
    return [
        *_repeated_names([field.name for field in fields]),
        *(name for inner in nested for name in _repeated_fields(inner)),
    ]


def _is_json_list(file: Path) -> bool:
    """Return whether a .json file is one list; else each of its lines is an object, as in .jsonl."""
    with closing(_open(file, "rt", **ESCAPED)) as stream:
        return stream.read(PIECE).lstrip().startswith("[")


def _suffix(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix


def _open(file: Path, mode: str, **text: str) -> IO[Any]:
    opener: Callable[..., IO[Any]] = gzip.open if file.suffix == ".gz" else open
    return opener(file, mode, **text)

"""Files and data sets brought by users: one file, a folder, or a `datasets` data set, read and rejected row by row."""

import glob
import json
import re
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Protocol

from pipeline import Bound, DataPath, InputStep
from pipeline.store.hub import download_command, snapshot
from schemas import WinnowError
from stages.data.advice import require_columns, require_readable, unread_parts, warn_of_unread
from stages.data.file_rows import (
    FILE_SUFFIXES,
    HEAD_ROWS,
    LFS_POINTER,
    PARQUET,
    READ_ERRORS,
    TEXT_SUFFIXES,
    column_names,
    file_rows,
)
from stages.data.formats import PreferencePair, columns_of, optional_columns_of, row_groups
from stages.data.rows import Row
from stages.data.texts import with_message_lists, without_filled_nulls

# Files that `datasets` finds in a folder by itself, compressed or not.
ARCHIVE_SUFFIXES = (".zip", ".gz", ".bz2", ".xz", ".zst", ".lz4")
CARDS = ("README.md", ".huggingface.yaml")  # files in which a folder says what its files are
OPTIONAL_COLUMNS = ("tools",)  # read by every stage where a file has them
CARD_CONFIGURATIONS = re.compile(r"^configs:", re.MULTILINE)
FOLDER_SUFFIXES = {*TEXT_SUFFIXES, PARQUET, ".arrow", ".txt", *ARCHIVE_SUFFIXES}


class Rejecting(Protocol):
    """Part of a stage's context that a reader of files needs."""

    def reject(self, reason: str, *, place: str, detail: str = "") -> None: ...


@dataclass(frozen=True)
class DataSource:
    """Origin of rows: a file, a folder, or a data set on the hub. The fields are options of the stages that read it."""

    path: DataPath | None = None
    dataset: str | None = None
    revision: str | None = None
    subset: str | None = None
    dataset_split: str = "train"

    def check(
        self,
        columns: Sequence[str],
        optional: Sequence[str] = (),
        reader: Bound | None = None,
        options: Mapping[str, str] = MappingProxyType({}),
    ) -> list[str]:
        """Return the problems known when a recipe is planned; raise WinnowError for a file that cannot be read.

        Columns are looked up in the files' schemas or first rows, and a reader must read one of these; data sets, and
        folders of files that only `datasets` reads, are opened by the stage. Warns of columns that look like part of
        the prompt and are in neither list.
        options: column -> the option that names it, for messages.
        """
        if (self.path is None) == (self.dataset is None):
            return ["give either `path` (a file or folder) or `dataset` (a name on the hub)"]
        if self.path is None:
            # A name on the hub is no identity: what it holds may change, and the step's key would not.
            if self.revision is None:
                return [f"dataset {self.dataset!r} needs `revision`, which fixes its content"]
            if Path(str(self.dataset)).exists():  # which `datasets` would read in its place
                return [f"dataset {self.dataset!r} is a folder here; set `path: ./{self.dataset}`, or rename it"]
            return []
        path = self.path.path
        if not path.is_file():
            files = [file for file in sorted(path.rglob("*")) if file.suffix in FOLDER_SUFFIXES and file.is_file()]
            if not files and not _is_saved_dataset(path):
                return [f"path {path}: a folder without data files ({', '.join(sorted(FOLDER_SUFFIXES))})"]
            if _is_saved_dataset(path):
                if any(map(_is_pointer, files)):  # one of another split does no harm
                    self._split_loader()
                return []
        elif self.subset is not None:
            return [f"subset {self.subset!r}: path {path} is one file; only folders and data sets have subsets"]
        elif not path.name.endswith(FILE_SUFFIXES):
            suffixes = ", ".join(FILE_SUFFIXES)
            return [f"path {path}: this stage reads {suffixes} and folders that datasets.load_dataset takes"]
        local_files = self._files()
        if local_files is None:
            return []
        names = _names_in(local_files)
        if not names:
            if location := _first_bad_encoding(local_files):
                return [f"{path.name}: no row of it is UTF-8 ({location}); save it as UTF-8"]
            cure = "in JSONL, each row is one JSON object on its own line, and .json may be a list of them"
            return [f"{path.name}: no rows; {cure}"]
        require_columns(names, columns, path.name, lambda: _head(local_files, names), options)
        read = _existing(columns, (*optional, *OPTIONAL_COLUMNS), names)
        parts = unread_parts(names, read)
        rows = _head(local_files, [*read, *parts]) if parts or reader else []
        if reader is not None:
            require_readable(reader, rows, path.name, lambda: (names, _head(local_files, names)))
        if parts:
            warn_of_unread(parts, rows, path.name, complete=len(rows) < HEAD_ROWS)
        return []

    def rows(self, ctx: Rejecting, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
        """Yield (location, row) with these columns, and the optional ones that exist.

        The location is `name:line` or `name:row`; a row that cannot be read is rejected. Raises WinnowError if all rows
        lack one of `columns`, or a file is damaged.
        """
        files, sources = self._files(), list[tuple[str, Iterator[tuple[str, Row]], bool]]()
        if self.path is None or files is None:
            name = str(self.path or self.dataset)
            sources.append((name, self._dataset_rows(columns, optional), True))
        else:
            names = _names_in(files)
            if names:
                require_columns(names, columns, self.path.path.name, lambda: _head(files, names))
            read = _existing(columns, (*optional, *OPTIONAL_COLUMNS), names)
            for file in files:
                name = file.name if file == self.path.path else file.relative_to(self.path.path).as_posix()
                sources.append((name, file_rows(file, read, ctx.reject, name), file.name.endswith(PARQUET)))
        for name, rows, is_table in sources:  # a table fills in nulls for what a row lacks
            location = "its start"
            try:
                for location, row in rows:
                    yield location, with_message_lists(without_filled_nulls(row) if is_table else row)
            except READ_ERRORS as error:
                raise _damaged(name, location, error) from None

    def head(self, columns: Sequence[str], count: int) -> list[tuple[str, Row | ValueError]]:
        """Return locations and rows at the start of files that are read here: `count` of them, and what is no row.

        Rows have those of these columns that exist, and tools; of what is no row it is the reason to reject it. None of
        a data set that `datasets` reads. Raises WinnowError if a file is damaged there.
        """
        files = self._files()
        if not files:
            return []
        return _located_head(files, _existing((), (*columns, *OPTIONAL_COLUMNS), _names_in(files)), count)

    def reader_results(
        self,
        ctx: Rejecting,
        reader: Bound,
        read: Callable[[Bound, list[Row]], list[PreferencePair | ValueError]],
    ) -> Iterator[tuple[str, Row, PreferencePair | ValueError]]:
        """Yield (location, row, pair or reason) of `read(reader, rows)`: of several rows, those of the first."""
        groups = row_groups(self.rows(ctx, columns_of(reader), optional_columns_of(reader)), reader)
        return ((location, group[0], result) for location, group in groups for result in read(reader, group))

    def _dataset_rows(self, columns: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """Yield the rows of a hub data set, of a folder of data files, or of a folder written by `save_to_disk`."""
        name = str(self.path or self.dataset)
        loaded = _from_datasets(name, self.dataset_split, self._split_loader())
        names, head = loaded.column_names, loaded.select(range(min(HEAD_ROWS, len(loaded))))
        require_columns(names, columns, name, lambda: [with_message_lists(row) for row in head])
        read = _existing(columns, (*optional, *OPTIONAL_COLUMNS), names)
        if parts := unread_parts(names, read):
            warn_of_unread(parts, list(head.select_columns(parts)), name, complete=len(loaded) < HEAD_ROWS)
        for number, row in enumerate(loaded):
            yield f"{Path(name).name}:{number}", row

    def _files(self) -> list[Path] | None:
        """Return the file, or the folder's files of the split, to read here; None if `datasets` must read the source.

        A file is thus read alike whether it is given by itself or in a folder. `datasets` says which files are of which
        split, by their names or by the folder's card, and takes one kind of file alone: raises WinnowError for files
        that it would leave out without a word.
        """
        if self.path is None or _is_saved_dataset(self.path.path):
            return None
        folder = self.path.path
        if folder.is_file():
            return [folder]
        _, _, splits = self._split_files()
        self._require_split(str(folder), list(splits))
        # A folder may say itself which files it has for each configuration and split, and perhaps how to read them.
        cards = (folder / name for name in CARDS)
        if any(card.is_file() and CARD_CONFIGURATIONS.search(card.read_text(errors="replace")) for card in cards):
            return None
        files = list(dict.fromkeys(map(Path, splits[self.dataset_split])))
        _refuse_pointers(files, folder)
        self._refuse_unread({Path(file) for names in splits.values() for file in names})
        return files if all(file.name.endswith(FILE_SUFFIXES) for file in files) else None

    def _refuse_unread(self, read: Container[Path]) -> None:
        """Raise WinnowError for data files of the folder that are of no split."""
        from datasets.data_files import FILES_TO_IGNORE

        assert self.path is not None
        folder = self.path.path / (self.subset or "")
        names = (
            (file, file.relative_to(folder))
            for file in sorted(folder.rglob("*"))
            if file.name.endswith((*FILE_SUFFIXES, *FOLDER_SUFFIXES - {".txt"})) and file.name not in FILES_TO_IGNORE
        )
        unread = [
            str(name)
            for file, name in names
            if file not in read and file.is_file() and not any(part.startswith((".", "__")) for part in name.parts)
        ]
        if unread:
            listed = ", ".join(unread[:5]) + (f" and {len(unread) - 5} more" if len(unread) > 5 else "")
            raise WinnowError(
                f"path {folder}: {listed} would not be read. In a folder, only files of one kind are, the most frequent"
                " one; and if a name (or a folder's) has train, validation or test in it, only files with one of these,"
                " one of which `dataset_split` names. Rename or move what is not read, or give one file as path"
            )

    def _split_files(self) -> tuple[Any, dict[str, str], dict[str, list[str]]]:
        """Return `datasets`' builder, its arguments for the subset, and the files of each split."""
        import datasets

        cached = self._cached()
        name, revision = str(self.path or cached or self.dataset), None if cached else self.revision

        def builder_of_subset() -> Any:
            subset: dict[str, str] = {}
            with _without_pattern(name) as source:
                if self.subset is not None:  # a configuration where the data set has one of this name, else a folder
                    configurations = datasets.get_dataset_config_names(source, revision=revision)
                    subset = {"name" if self.subset in configurations else "data_dir": self.subset}
                builder = datasets.load_dataset_builder(source, revision=revision, **subset)
            # By the names that the user knows.
            files = {
                str(split): [
                    f"{name}{file.removeprefix(source)}" if file.startswith(source) else file for file in located
                ]
                for split, located in (builder.config.data_files or {}).items()
            }
            return builder, subset, files

        try:
            builder, subset, files = _from_datasets(name, self.dataset_split, builder_of_subset)
        except WinnowError as error:
            if "Couldn't reach" not in str(error):
                raise
            command = download_command(name, revision, "dataset")
            raise WinnowError(f"{error}, and its cache does not have it; `{command}` fetches it") from None
        return builder, subset, files

    def _split_loader(self) -> Callable[[], Any]:
        """Return the call of `datasets` that loads the files of the split, and no others.

        Raises WinnowError if there is no such split, or a file of it is a Git LFS pointer; those of other splits may be
        anything.
        """
        import datasets

        cached = self._cached()
        name = str(self.path or cached or self.dataset)
        revision = None if cached else self.revision
        if _is_saved_dataset(Path(name)):
            splits_file = Path(name) / "dataset_dict.json"
            folder = Path(name)
            if splits_file.exists():
                splits = json.loads(splits_file.read_text())["splits"]
                self._require_split(name, splits)
                folder /= self.dataset_split
            _refuse_pointers(folder.resolve().rglob("*.arrow"), Path(name))
            return partial(datasets.load_from_disk, str(folder))

        builder, subset, files = self._split_files()
        # pandas takes answers such as "None" and "NA" for missing ones.
        csv_options = {"keep_default_na": False} if hasattr(builder.config, "keep_default_na") else {}
        load = partial(datasets.load_dataset, name, revision=revision, split=self.dataset_split, **csv_options)
        if not files:  # prepared in the cache of `datasets` before, and read there
            return partial(load, **subset)
        self._require_split(name, list(files))
        chosen = files[self.dataset_split]
        if cached or self.path:
            _refuse_pointers(map(Path, chosen), Path(name))
            chosen = [glob.escape(file) for file in chosen]  # else `[` in a name would be part of a pattern
        # A configuration still says how to read the files; a folder has said which they are.
        configuration = {key: value for key, value in subset.items() if key == "name"}
        return partial(load, **configuration, data_files={self.dataset_split: chosen})

    def _cached(self) -> Path | None:
        """Return the folder of a data set of the hub in the hub's own cache, None if it is not there."""
        try:
            return snapshot(self.dataset, self.revision, kind="dataset") if self.dataset else None
        except ValueError as error:
            raise WinnowError(f"dataset {error}") from None

    def _require_split(self, name: str, splits: Sequence[str]) -> None:
        if self.dataset_split not in splits:
            cure = f"it has {', '.join(map(repr, splits))}; set `dataset_split` to one of them"
            raise WinnowError(f"dataset {name}: no split {self.dataset_split!r}: {cure}")


def check_source(
    options: dict[str, Any], columns: Sequence[str], optional: Sequence[str] = (), reader: Bound | None = None
) -> list[str]:
    """Check at plan time that a stage has one source of data and, if it is a file, that it has these columns."""
    try:
        source = DataSource(**{field.name: options[field.name] for field in fields(DataSource)})
        named = options if reader is None else reader.options
        of_column = {value: name for name, value in named.items() if isinstance(value, str) and value in columns}
        return source.check(columns, optional, reader, of_column)
    except WinnowError as error:
        return list(error.problems)


def check_reader(options: dict[str, Any]) -> list[str]:
    """Check at plan time that a stage has one source of data and, if it is a file, that option `reader` reads it."""
    reader = options["reader"]
    return check_source(options, columns_of(reader), optional_columns_of(reader), reader)


def check_no_columns(options: Mapping[str, Any], **defaults: str | None) -> list[str]:
    """Check at plan time that a stage with a `reader`, which knows its columns, has no other column options."""
    changed = {name: default for name, default in defaults.items() if options[name] != default}
    if not changed:
        return []
    values, unset = (
        ", ".join(f"{name}: {'null' if value is None else value}" for name, value in columns.items())
        for columns in ({name: options[name] for name in changed}, changed)
    )
    # A recipe may have set them, which only a value written in a config outranks.
    return [f"`{values}`: with a `reader`, columns are named by its own options; set `{unset}` beside it"]


def check_demonstrations(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Check at plan time that the step behind `prompts` has demonstrations; return the problem if it has none."""
    step = inputs.get("prompts")
    if step is None or not step.options or step.options.get("demonstration"):
        return []
    cure = "set `prompts` under `from` to a step of stage prompts that has the option `demonstration`"
    return [f"demonstrations are read from `prompts`, but stage {step.stage} provides none: {cure}"]


def _existing(columns: Sequence[str], optional: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return each of the columns once, and of the optional ones those that exist."""
    return list(dict.fromkeys([*columns, *(name for name in optional if name in names)]))


def _names_in(files: Sequence[Path]) -> list[str]:
    """Return the names of columns that some file has."""
    return list(dict.fromkeys(name for file in files for name in column_names(file)))


def _first_bad_encoding(files: Sequence[Path]) -> str:
    """Return the location of the first row that is no UTF-8, of files without a readable row; empty if none."""
    locations = list[str]()

    def note(reason: str, *, place: str, detail: str = "") -> None:
        if reason == "bad UTF-8":
            locations.append(f"{place}: {detail}")

    for file in files:
        next(file_rows(file, [], note), None)
        if locations:
            break
    return next(iter(locations), "")


def _head(files: Sequence[Path], names: Sequence[str], count: int = HEAD_ROWS) -> list[Row]:
    """Return the first rows that can be read; raise WinnowError if a file is damaged there."""
    return [row for _, row in _located_head(files, names, count) if not isinstance(row, ValueError)]


def _located_head(files: Sequence[Path], names: Sequence[str], count: int) -> list[tuple[str, Row | ValueError]]:
    """Return the first rows that can be read, and before and between them the reasons of those that cannot."""
    rows, n_readable = list[tuple[str, Row | ValueError]](), 0

    def reject(reason: str, *, place: str, detail: str = "") -> None:
        rows.append((place, ValueError(reason)))

    for file in files:
        location = "its start"
        try:
            for location, row in islice(file_rows(file, names, reject), count - n_readable):
                rows.append((location, with_message_lists(row)))
                n_readable += 1
        except READ_ERRORS as error:
            raise _damaged(file.name, location, error) from None
    return rows


def _damaged(name: str, location: str, error: BaseException) -> WinnowError:
    cure = "it is damaged or cut short; fetch or write it again"
    return WinnowError(f"{name}: cannot be read after {location} ({error}): {cure}")


def _from_datasets(name: str, split: str, call: Callable[[], Any]) -> Any:
    """Return what `datasets` returns; raise WinnowError with its cause for what it raises, which may be anything."""
    try:
        return call()
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the last one says what is wrong, the first that something is
            cause = cause.__cause__
        message = f"dataset {name}, split {split!r}: {type(cause).__name__}: {cause}"
        if "scripts are no longer supported" in message:
            message += "; the hub also has it as Parquet: set `revision: refs/convert/parquet`, and `subset`"
        raise WinnowError(message) from None


@contextmanager
def _without_pattern(name: str) -> Iterator[str]:
    """Yield the name of a data set, or a folder of empty files with its files' names, and its card.

    That is for a folder whose name `datasets` would take for a pattern, as of `run[n=8]`: which file is of which split
    it decides by names, and it resolves links.
    """
    if not (glob.has_magic(name) and Path(name).is_dir()):
        yield name
        return
    with TemporaryDirectory() as folder:
        for file in Path(name).rglob("*"):
            copy = Path(folder) / file.relative_to(name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if file.name in CARDS:
                shutil.copyfile(file, copy)
            elif file.is_file():
                copy.touch()
        yield str(Path(folder).resolve())


def _is_pointer(file: Path) -> bool:
    """Return whether a file is what Git LFS leaves in place of the data."""
    with file.open("rb") as stream:
        return stream.read(len(LFS_POINTER)) == LFS_POINTER


def _refuse_pointers(files: Iterable[Path], folder: Path) -> None:
    """Raise WinnowError with the names of those files in a folder that Git LFS has not fetched."""
    folder = folder.resolve()
    if names := sorted(str(file).removeprefix(f"{folder}/") for file in files if _is_pointer(file)):
        cure = "fetch the data with `git lfs pull`"
        raise WinnowError(*(f"{folder}: {name} is a Git LFS pointer and not the data; {cure}" for name in names))


def _is_saved_dataset(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` wrote the folder."""
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))

"""Where files lie: a folder of this machine or of a shared disk, or an object store by its URL (s3://, gs://).

Both kinds have pathlib's methods (universal_pathlib); here is what these lack: a file that appears whole or not at
all, a first writer who wins, and a copy here of what only programs on this machine can read. Credentials are the
environment's (AWS_*, GOOGLE_APPLICATION_CREDENTIALS), and none is written anywhere.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any, Union

from schemas import WinnowError

if TYPE_CHECKING:
    from upath import UPath

Location = Union[Path, "UPath"]
HOME = "WINNOW_CACHE"  # names the folder for copies of what lies in an object store


def parse_location(url: str | Location) -> Location:
    """A folder's absolute path, or an object store's; raises WinnowError where that kind of URL cannot be read."""
    if not isinstance(url, str):
        return url.expanduser().resolve() if isinstance(url, Path) else url
    if "://" not in url:
        return Path(url).expanduser().resolve()
    if "@" in url.split("://")[1].split("/")[0]:
        raise WinnowError(f"{url.split('://')[0]}://...: no credentials in a URL; they are read from the environment")
    from upath import UPath

    try:
        found = UPath(url.rstrip("/"), use_listings_cache=False)
        found.fs  # noqa: B018 - opened here, so that a kind without its library is told now
    except (ImportError, ValueError) as error:
        raise WinnowError(f"{url}: {error}; s3:// and folders are read as installed") from None
    return found


def cache() -> Path:
    """Where copies of what lies in an object store are kept on this machine."""
    return Path(os.environ.get(HOME) or Path.home() / ".cache" / "winnow")


@contextmanager
def _told(place: Location) -> Iterator[None]:
    """What an object store's library raises is an OSError that names the place, as it is of a disk."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{place}: {type(error).__name__}: {error}") from None


def read(place: Location) -> bytes:
    with _told(place):
        return place.read_bytes()


def read_all(folder: Location, pattern: str) -> dict[Location, bytes]:
    """The files below a folder that fit a pattern, sorted by path; an object store is asked for all of them at once."""
    with _told(folder):
        found: list[Location] = list(folder.glob(pattern))
        found.sort(key=str)
        if isinstance(folder, Path) or not found:
            made = {}
            for place in found:
                with suppress(FileNotFoundError):  # gone since the listing
                    made[place] = place.read_bytes()
            return made
        there = {place.path: place for place in found if not isinstance(place, Path)}
        # cat() takes the brackets in a run's name for a pattern; only what is gone since the listing may be left out
        contents = folder.fs.cat_ranges(list(there), None, None, on_error="return")
        for content in contents:
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                raise content
        pairs = zip(there.values(), contents, strict=True)
        return {place: content for place, content in pairs if isinstance(content, bytes)}


def sizes(folder: Location) -> dict[str, int]:
    """Bytes of each file that lies in a folder; nothing where there is none."""
    with _told(folder):
        if isinstance(folder, Path):
            return {each.name: each.stat().st_size for each in os.scandir(folder)} if folder.is_dir() else {}
        try:
            found = folder.fs.ls(folder.path, detail=True)
        except FileNotFoundError:
            return {}
        return {each["name"].rsplit("/", 1)[-1]: each["size"] or 0 for each in found}


@dataclass(frozen=True)
class File:
    """Its bytes, and when it was last written, in seconds since 1970."""

    bytes: int
    modified: float


def walk(folder: Location) -> dict[str, File]:
    """All files below a folder, by their paths from it, in order; what goes while we look is not among them."""
    with _told(folder):
        found = _walk_here(folder) if isinstance(folder, Path) else _walk_there(folder)
        return dict(sorted(found.items()))


def _walk_here(folder: Path) -> dict[str, File]:
    found = {}
    for home, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(home, name)
            with suppress(FileNotFoundError):
                about = os.lstat(path)
                found[os.path.relpath(path, folder)] = File(about.st_size, about.st_mtime)
    return found


def _walk_there(folder: "UPath") -> dict[str, File]:
    """Kinds of object stores name the moment differently."""
    found = {}
    for path, about in folder.fs.find(folder.path, detail=True).items():
        moment = next((about[name] for name in ("LastModified", "mtime", "updated", "created") if name in about), 0.0)
        seconds = moment.timestamp() if hasattr(moment, "timestamp") else float(moment)
        found[path[len(folder.path) :].lstrip("/")] = File(about["size"] or 0, seconds)
    return found


def create(place: Location, content: bytes) -> bool:
    """Whole or not at all, and never over what is there; False where somebody else was first."""
    if not isinstance(place, Path):
        with _told(place):
            try:
                return _first(lambda: place.fs.pipe_file(place.path, content, mode="create"))
            except OSError:  # S3 answers two at once with a conflict of its own
                if place.exists():
                    return False
                raise
    with _written(place, content) as scratch:
        return _first(lambda: os.link(scratch, place))


def replace(place: Location, content: bytes) -> None:
    """Whole or not at all, whatever is there."""
    if not isinstance(place, Path):
        with _told(place):
            place.fs.pipe_file(place.path, content)
        return
    with _written(place, content) as scratch:
        scratch.replace(place)


def _first(make: Callable[[], Any]) -> bool:
    try:
        make()
    except FileExistsError:
        return False
    return True


@contextmanager
def _written(place: Path, content: bytes) -> Iterator[Path]:
    """Beside its place, under a name that no other writer has, thread by thread."""
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = place.with_name(f".{place.name}.{os.getpid()}.{get_ident()}")
    try:
        scratch.write_bytes(content)
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


def delete(place: Location) -> None:
    """A file or a whole folder; nothing where there is none."""
    with _told(place):
        if isinstance(place, Path):
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
            return
        with suppress(FileNotFoundError):
            if place.fs.info(place.path)["type"] == "file":
                place.fs.rm_file(place.path)  # rm() takes the brackets in a run's name for a pattern
            else:
                place.fs.rm(place.path, recursive=True)


def send(here: Path, there: Location) -> None:
    """A file, or the files of a folder, to an object store."""
    assert not isinstance(there, Path)
    files = [here] if here.is_file() else sorted(file for file in here.rglob("*") if file.is_file())
    with _told(there):
        for file in files:
            there.fs.put_file(str(file), (there / file.relative_to(here)).path if file != here else there.path)


def copy_here(there: Location, here: Path) -> None:
    """A folder's files from an object store, all or none; what stands here already, another's, is left."""
    assert not isinstance(there, Path)
    scratch = here.with_name(f".{here.name}.{os.getpid()}.{get_ident()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with _told(there):
        for each in there.fs.find(there.path):
            target = scratch / each[len(there.path) :].lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            there.fs.get_file(each, str(target))
    try:
        scratch.rename(here)
    except OSError:  # another was first
        shutil.rmtree(scratch)
        if not here.is_dir():
            raise

"""Files of a store: in a folder on a local or shared disk, or in an object store by URL (s3://, gs://).

Both kinds have pathlib's methods (universal_pathlib). Added here is what these lack: a write that is atomic, a write
that only the first writer wins, and a local copy of what only programs on this machine can read. Credentials come from
the environment (AWS_*, GOOGLE_APPLICATION_CREDENTIALS) and are never written anywhere.

On a disk, a power cut loses what was written and not synced: content, names, or content while the names stay. So a file
is synced before it gets its name, and its folder afterwards. The environment variable WINNOW_SYNC=off omits both, for
a store on a scratch disk.
"""

import errno
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Union

from schemas import WinnowError

if TYPE_CHECKING:
    from upath import UPath

Location = Union[Path, "UPath"]
OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
IN_TEXTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # errors of a disk that libraries pass on as text
FULL_BYTES = 1 << 20  # with less room than this, a disk counts as full
WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # os.link on some disks
NOT_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES, errno.EBADF, errno.EISDIR)  # of folders
SYNC = "WINNOW_SYNC"  # environment variable: on (the default) or off
SCRATCH = re.compile(r"\..+?(?:\.([0-9a-f]{8}))?\.(\d+)\.\d+")  # names of files before they are renamed: scratch_path
WITHOUT_BUCKET = ("file", "local", "memory")  # schemes whose URLs begin with a path
READERS = 16  # files that are read at once: an object store answers many requests in the time of one


def parse_location(url: str | Location) -> Location:
    """Return an absolute path, or the path in an object store.

    Raises WinnowError if the library for that kind of URL is missing, or if the URL contains credentials or no bucket.
    """
    if not isinstance(url, str):
        return url.expanduser().resolve() if isinstance(url, Path) else url
    if "://" not in url:
        return Path(url).expanduser().resolve()
    if "@" in url.split("://")[1].split("/")[0]:  # would be printed and written to manifests with the URL
        raise WinnowError(f"{url.split('://')[0]}://...: remove the credentials; they are read from the environment")
    scheme, path = url.split("://", 1)
    if scheme not in WITHOUT_BUCKET and not path.split("/")[0]:
        raise WinnowError(f"{url}: names no bucket; give {scheme}://bucket/folder")
    from upath import UPath

    try:
        location = UPath(url.rstrip("/"), use_listings_cache=False)  # other processes write to it too
        location.fs  # noqa: B018 - opened now, so that a missing library is reported before any work
    except (ImportError, ValueError) as error:
        raise WinnowError(f"{url}: {error}; use a folder or s3://, or install that library") from None
    return location


def cache() -> Path:
    """Return the folder for local copies of what is in an object store."""
    return Path(os.environ.get("WINNOW_CACHE") or Path.home() / ".cache" / "winnow")


@contextmanager
def _as_os_error(location: Location) -> Iterator[None]:
    """Turn any error of an object store's library into an OSError that names the location, as a disk's errors do."""
    try:
        with named(location):
            yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{location}: {type(error).__name__}: {error}") from None


@contextmanager
def named(location: Location) -> Iterator[None]:
    """Name the location in an error of the operating system that names no file, as that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in OF_A_DISK or error.filename is not None or str(location) in str(error):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(location)) from error
    except WinnowError:
        raise
    except Exception as error:  # that of a library in Rust or C++, or of an engine whose process could not write
        if full := _full_disk(error, location):
            raise full from error
        raise


def _full_disk(error: BaseException, location: Location) -> OSError | None:
    """Return the error of a disk that another error is a consequence of, as its text or the disks say; else None."""
    text = f"{error} {error.__cause__ or error.__context__ or ''}"
    for number in IN_TEXTS:
        if os.strerror(number) in text:
            return OSError(number, os.strerror(number), str(location))
    folders = [tempfile.gettempdir(), str(Path.home()), *([str(location)] if isinstance(location, Path) else [])]
    for folder in folders:
        with suppress(OSError):
            if shutil.disk_usage(folder).free < FULL_BYTES:
                return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)
    return None


def read(path: Location) -> bytes:
    with _as_os_error(path):
        return path.read_bytes() if isinstance(path, Path) else path.fs.cat_file(path.path)


def read_all(folder: Location, pattern: str) -> dict[Location, bytes]:
    """Return the files below a folder that match a glob pattern, by path, sorted; several are read at once."""
    with _as_os_error(folder):
        paths: list[Location] = sorted(folder.glob(pattern), key=str)
    contents: dict[Location, bytes] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for path, content in [(path, pool.submit(read, path)) for path in paths]:
            with suppress(FileNotFoundError):  # deleted since the listing
                contents[path] = content.result()
    return contents


def sizes(folder: Location) -> dict[str, int]:
    """Return the size of each file directly in a folder, in bytes; empty if there is no such folder."""
    with _as_os_error(folder):
        if isinstance(folder, Path):
            return {entry.name: entry.stat().st_size for entry in os.scandir(folder)} if folder.is_dir() else {}
        try:
            entries = folder.fs.ls(folder.path, detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] or 0 for entry in entries}


@dataclass(frozen=True)
class File:
    """Size of a file in bytes, and the time of its last write in seconds since 1970."""

    bytes: int
    modified: float


def walk(folder: Location) -> dict[str, File]:
    """Return all files below a folder, sorted by relative path; files deleted during the walk are skipped.

    A link in it may lead to a folder on another disk, whose files are among them; links below that are not followed.
    """
    files: dict[str, File] = {}
    with _as_os_error(folder):
        if isinstance(folder, Path):
            links = (
                [path for path in folder.iterdir() if path.is_symlink() and path.is_dir()] if folder.is_dir() else []
            )
            for top in (folder, *links):
                for parent, _, names in os.walk(top):
                    for name in names:
                        path = os.path.join(parent, name)
                        with suppress(FileNotFoundError):
                            stat = os.lstat(path)
                            files[os.path.relpath(path, folder)] = File(stat.st_size, stat.st_mtime)
        else:
            for path, info in folder.fs.find(folder.path, detail=True).items():
                # every kind of object store has its own name for the time
                times = [info[name] for name in ("LastModified", "mtime", "updated", "created") if name in info]
                moment = times[0] if times else 0.0
                seconds = moment.timestamp() if hasattr(moment, "timestamp") else float(moment)
                files[path[len(folder.path) :].lstrip("/")] = File(info["size"] or 0, seconds)
    return dict(sorted(files.items()))


def is_synced() -> bool:
    """Return whether what is written is synced; raise WinnowError if WINNOW_SYNC is neither on nor off."""
    value = os.environ.get(SYNC, "on")
    if value not in ("on", "off"):
        raise WinnowError(
            f"{SYNC}={value}: must be on, or off for a store on a scratch disk, which a power cut may empty"
        )
    return value == "on"


def sync(*paths: Path) -> None:
    """Wait until the content of files, and the names in folders, are on the disk; several at once share the wait."""
    if not is_synced():
        return
    if len(paths) == 1:
        _sync_one(paths[0])
        return
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(_sync_one, paths))


def _sync_one(path: Path) -> None:
    with named(path):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        except OSError as error:
            if error.errno not in NOT_SYNCED or not path.is_dir():  # some disks cannot sync folders
                raise
        finally:
            os.close(number)


def sync_tree(folder: Path) -> None:
    """Wait until a folder, with all files and folders below it, is on the disk; its own name is not synced."""
    if is_synced():
        sync(*(path for path in folder.rglob("*") if not path.is_symlink()), folder)


def make_folder(path: Path) -> None:
    """Create a folder and those above it, with synced names."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    if missing:
        sync(*(folder.parent for folder in missing))


def scratch_path(path: Path) -> Path:
    """Return the name under which this thread writes a file before it is renamed; it says which process that is."""
    return path.with_name(f".{path.name}.{machine()}.{os.getpid()}.{get_ident()}")


@lru_cache
def machine() -> str:
    """Return 8 hex digits for the machine, or the container of it, in which process ids mean what they mean here."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def is_left_over(name: str) -> bool:
    """Return whether this is the name of a scratch file of a process of this machine that has ended."""
    match = SCRATCH.fullmatch(name)
    return match is not None and match[1] == machine() and not is_alive(int(match[2]))


def is_alive(process: int) -> bool:
    """Return whether there is a process of this id on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        pass
    return True


def create(path: Location, content: bytes, durable: bool = True) -> bool:
    """Write a new file atomically; return False, and write nothing, if it exists already."""
    if isinstance(path, Path):
        try:
            with complete_file(path, overwrite=False, durable=durable) as scratch:
                scratch.write_bytes(content)
            return True
        except FileExistsError:
            return False
    with _as_os_error(path):
        try:
            path.fs.pipe_file(path.path, content, mode="create")
            return True
        except OSError:  # FileExistsError, or the conflict with which S3 answers two simultaneous writers
            if path.exists():
                return False
            raise


def replace(path: Location, content: bytes, durable: bool = True) -> None:
    """Write a file atomically, whether it exists or not; without `durable`, what a power cut may lose."""
    if isinstance(path, Path):
        with complete_file(path, durable=durable) as scratch:
            scratch.write_bytes(content)
        return
    with _as_os_error(path):
        path.fs.pipe_file(path.path, content)


def replace_all(contents: Mapping[Location, bytes]) -> None:
    """Write files atomically; their names are on the disk once a file is created in their folder, or it is synced."""
    with ExitStack() as scratches:
        written = []
        for path, content in contents.items():
            if isinstance(path, Path):
                scratch = scratches.enter_context(complete_file(path, durable=False))
                with named(path):
                    scratch.write_bytes(content)
                written.append(scratch)
            else:
                replace(path, content)
        if written:
            sync(*written)


@contextmanager
def complete_file(path: Path, overwrite: bool = True, durable: bool = True) -> Iterator[Path]:
    """Yield the path to write a file to: it appears as `path` when the block ends, and not at all if that raises.

    Without `overwrite`, raise FileExistsError if `path` exists by then.
    """
    make_folder(path.parent)
    scratch = scratch_path(path)
    try:
        with named(path):
            yield scratch
        if durable:
            sync(scratch)
        if overwrite:
            scratch.replace(path)
        else:
            rename_new(scratch, path)
        if durable:
            sync(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def rename_new(scratch: Path, path: Path) -> None:
    """Give a file its name; raise FileExistsError if the name is taken. It may keep its other name too."""
    try:
        os.link(scratch, path)  # unlike a rename, fails if the name is taken
    except OSError as error:
        if isinstance(error, FileExistsError) or error.errno not in WITHOUT_LINKS:
            raise
        # Of two writers, one creates the empty file, which counts as no file until its content replaces it.
        path.open("xb").close()
        scratch.replace(path)


def move(source: Location, target: Location) -> None:
    """Rename a file or folder of a store; do nothing if it does not exist."""
    with _as_os_error(source):
        if isinstance(source, Path):
            assert isinstance(target, Path)
            make_folder(target.parent)
            with suppress(FileNotFoundError):
                try:
                    source.rename(target)
                except OSError as error:
                    if error.errno != errno.EXDEV:  # of a stage's folder that is a link to another disk
                        raise
                    shutil.move(source, target)
                sync(target.parent, source.parent)
            return
        assert not isinstance(target, Path)
        for path in source.fs.find(source.path):  # one by one: mv() takes the brackets in a run's name for a pattern
            source.fs.cp_file(path, target.path + path[len(source.path) :])
            source.fs.rm_file(path)


def delete(path: Location) -> None:
    """Delete a file or a folder with all it holds; do nothing if it does not exist."""
    with _as_os_error(path):
        if isinstance(path, Path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            return
        with suppress(FileNotFoundError):
            if path.fs.info(path.path)["type"] == "file":
                path.fs.rm_file(path.path)  # not rm(), which takes the brackets in a run's name for a pattern
            else:
                path.fs.rm(path.path, recursive=True)


def send(source: Path, target: Location) -> None:
    """Upload a local file, or all files of a local folder, to an object store."""
    assert not isinstance(target, Path)
    with _as_os_error(target):
        if source.is_file():
            target.fs.put_file(str(source), target.path)
            return
        for file in sorted(source.rglob("*")):
            if file.is_file():
                target.fs.put_file(str(file), (target / file.relative_to(source)).path)


def download(source: Location, target: Path) -> None:
    """Download a folder from an object store, all of it or nothing; leave `target` as it is if it exists already."""
    assert not isinstance(source, Path)
    scratch = scratch_path(target)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with _as_os_error(source):
        for path in source.fs.find(source.path):
            file = scratch / path[len(source.path) :].lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            source.fs.get_file(path, str(file))
    try:
        scratch.rename(target)
    except OSError:  # another process was first
        shutil.rmtree(scratch)
        if not target.is_dir():
            raise

"""A cache as `hf download` fills it: models--org--name and datasets--org--name with blobs, refs and snapshots."""

import shutil
from hashlib import sha1
from pathlib import Path


def add_snapshot(cache: Path, name: str, folder: Path, *, ref: str = "main", kind: str = "models") -> str:
    """Put the files of a folder into the cache as a commit that `ref` points to; return the commit."""
    repository = cache / f"{kind}--{name.replace('/', '--')}"
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    commit = sha1(b"".join(path.encode() + file.read_bytes() for path, file in files.items())).hexdigest()
    for path, file in files.items():
        blob = repository / "blobs" / sha1(file.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link = repository / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    return commit

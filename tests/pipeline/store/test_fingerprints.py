"""The digest of a large file is cached for exactly as long as the file is unchanged."""

import json
import os
import time
from hashlib import file_digest, sha256
from pathlib import Path

import pytest

from pipeline.store import fingerprints
from pipeline.store.fingerprints import digest_of

WEIGHTS = sha256(b"weights").hexdigest()


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A file that counts as large and has not changed for a while."""
    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "LARGE_FILE", 4)
    monkeypatch.setattr(fingerprints, "SETTLED_AFTER", -1)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    return file


@pytest.fixture
def reads(monkeypatch):
    """The files that were read, in order."""
    paths, plain = [], file_digest

    def read_digest(file, algorithm):
        paths.append(Path(file.name))
        return plain(file, algorithm)

    monkeypatch.setattr("pipeline.store.fingerprints.file_digest", read_digest)
    return paths


def digest_in_new_process(file):
    fingerprints._digest_of_file.cache_clear()
    return digest_of(file)


def test_a_large_file_is_read_once(model, reads):
    assert {digest_in_new_process(model) for _ in range(3)} == {WEIGHTS}
    assert reads == [model]


def test_new_content_is_read_even_if_size_and_times_are_set_back(model, reads):
    """Size, mtime and inode are as before; ctime is not."""
    digest_in_new_process(model)
    before = model.stat()
    time.sleep(0.02)
    model.write_bytes(b"WEIGHTS")
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (model.stat().st_size, model.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert digest_in_new_process(model) == sha256(b"WEIGHTS").hexdigest()
    assert len(reads) == 2


@pytest.mark.parametrize(("constant", "value"), [("SETTLED_AFTER", 10**12), ("LARGE_FILE", 1000)])
def test_files_that_just_changed_or_are_small_are_not_cached(model, reads, monkeypatch, constant, value):
    monkeypatch.setattr(fingerprints, constant, value)
    for _ in range(2):
        digest_in_new_process(model)
    assert len(reads) == 2


def test_a_damaged_cache_entry_is_ignored(model, reads, tmp_path):
    digest_in_new_process(model)
    (entry,) = (tmp_path / "cache" / "digests").iterdir()
    assert json.loads(entry.read_text())["path"] == str(model)
    for content in ("", "[]", "{}", '{"state": 1}'):
        entry.write_text(content)
        assert digest_in_new_process(model) == WEIGHTS
    assert len(reads) == 5


def test_no_cache_is_needed(model, reads, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert digest_in_new_process(model) == digest_in_new_process(model) == WEIGHTS
    assert len(reads) == 2

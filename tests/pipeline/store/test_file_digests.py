"""A digest is remembered for as long as its file is the same, and never longer."""

import json
import os
import time
from hashlib import sha256

import pytest

from pipeline.store import file_digests as digests
from pipeline.store.file_digests import digest_of_file


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A file that counts as large and has not changed for a while, and a count of how often it is read."""
    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "LARGE", 4)
    monkeypatch.setattr(digests, "SETTLED", -1)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    return file


@pytest.fixture
def reads(monkeypatch):
    seen, plain = [], digests._read

    def read(path):
        seen.append(path)
        return plain(path)

    monkeypatch.setattr(digests, "_read", read)
    return seen


def fresh(file):
    """As another process asks."""
    digests._digest.cache_clear()
    return digest_of_file(file)


def test_a_large_file_is_read_once(model, reads):
    assert {fresh(model) for _ in range(3)} == {sha256(b"weights").hexdigest()}
    assert reads == [model]


def test_another_content_is_read_even_if_size_and_times_are_set_back(model, reads):
    """Size, mtime and inode are as before; ctime is not."""
    fresh(model)
    before = model.stat()
    time.sleep(0.02)
    model.write_bytes(b"WEIGHTS")
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (model.stat().st_size, model.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert fresh(model) == sha256(b"WEIGHTS").hexdigest()
    assert len(reads) == 2


def test_what_changed_a_moment_ago_and_what_is_small_is_not_remembered(model, reads, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", 10**12)
    for _ in range(2):
        fresh(model)
    monkeypatch.setattr(digests, "SETTLED", -1)
    monkeypatch.setattr(digests, "LARGE", 1000)
    for _ in range(2):
        fresh(model)
    assert len(reads) == 4


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"state": 1}'])
def test_a_damaged_note_is_not_believed(model, reads, tmp_path, content):
    fresh(model)
    (note,) = (tmp_path / "cache" / "digests").iterdir()
    assert json.loads(note.read_text())["path"] == str(model)
    note.write_text(content)
    assert fresh(model) == sha256(b"weights").hexdigest()
    assert len(reads) == 2


def test_a_cache_that_cannot_be_written_is_done_without(model, reads, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert fresh(model) == fresh(model) == sha256(b"weights").hexdigest()
    assert len(reads) == 2

"""A process of ours ends with the one that started it, however that ends; what stays is ended at the next start."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.guard import family_of
from pipeline.processes import Guard, end_orphans, start_of
from pipeline.store.storage import machine
from schemas import WinnowWarning
from tests.runs import ROOT

# A process that has started another, as an engine is started, and says which.
PARENT = """
import os, subprocess, sys, time
{prelude}
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE)
child.stdout.readline()
{before}
print(child.pid, flush=True)
time.sleep(60)
"""
SLEEPING = "import time; print(flush=True); time.sleep(60)"
WATCHING = f"import os; from pipeline.processes import end_with; end_with(os.getppid()); {SLEEPING}"


@pytest.fixture(autouse=True)
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the records, which no other process uses."""
    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path))
    return tmp_path / "processes"


def kill_parent_of(child: str, prelude: str = "", before: str = "") -> tuple[int, str]:
    """Start a process that starts another, kill the first; return id and start of the other."""
    program = PARENT.format(child=child, prelude=prelude, before=before)
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        process = int(parent.stdout.readline())
        start = start_of(process)
        parent.send_signal(signal.SIGKILL)
    assert start
    return process, start


def has_ended(process: int, start: str) -> bool:
    """Return whether a process ends within half a minute; kill it if it does not."""
    deadline = time.monotonic() + 30
    while start_of(process) == start:
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True


def test_a_process_ends_with_a_parent_that_is_killed():
    assert has_ended(*kill_parent_of(WATCHING))


def test_a_guard_ends_processes_that_know_nothing_of_it_when_its_own_is_killed():
    """Also those that were starting at that moment, which nobody could have told it of."""
    guard = "from pipeline.processes import Guard; guard = Guard(); marking = guard.marking(); marking.__enter__()"
    assert has_ended(*kill_parent_of(SLEEPING, guard))


def test_a_guard_ends_processes_at_its_end_and_not_those_of_another():
    guard, other = Guard(), Guard()
    with other.marking():
        second = subprocess.Popen(["sh", "-c", "sleep 60 & wait"])
    with guard.marking():
        first = subprocess.Popen(["sleep", "60"])
    with subprocess.Popen(["sleep", "60"]) as third:
        other.end()
        assert second.wait() == -signal.SIGKILL
        assert first.poll() is None
        guard.end()
        assert first.wait() == -signal.SIGKILL
        assert third.poll() is None
        third.kill()


def record(folder: Path, process: int, parent: int, **other: str) -> Path:
    """Write the record of a process, as itself it would."""
    content = {"process": process, "start": start_of(process), "parent": parent, "parent_start": start_of(parent)}
    file = folder / f"{machine()}.{process}.json"
    folder.mkdir(exist_ok=True)
    file.write_text(json.dumps(content | other))
    return file


def test_an_orphan_that_hangs_is_killed_at_the_next_start_and_said(records: Path):
    """Also one that is stopped; a process whose parent lives goes on."""
    with subprocess.Popen(["sleep", "60"]) as orphan, subprocess.Popen(["sleep", "60"]) as child:
        os.kill(orphan.pid, signal.SIGSTOP)
        file = record(records, orphan.pid, os.getpid(), parent_start="of a process that has ended")
        record(records, child.pid, os.getpid())
        with pytest.warns(WinnowWarning, match=rf"\b{orphan.pid}\b"):
            assert end_orphans() == [orphan.pid]
        assert orphan.wait() == -signal.SIGKILL
        assert child.poll() is None
        assert not file.exists()
        child.kill()


def test_another_process_with_the_id_of_one_that_ended_is_not_touched(records: Path):
    with subprocess.Popen(["sleep", "60"]) as other:
        file = record(records, other.pid, os.getpid(), start="another boot 1", parent_start="ended")
        cut = records / f"{machine()}.1.json"
        cut.write_text('{"process": 1, "sta')
        assert end_orphans() == []
        assert other.poll() is None
        assert not file.exists()
        other.kill()


def test_a_guard_without_proc_finds_nothing(monkeypatch: pytest.MonkeyPatch):
    """On a system that has none it would write a traceback to the terminal."""

    def refuse(path: str) -> list[str]:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert family_of("mark", {1: "1"}) == {}

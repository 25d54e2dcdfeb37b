"""Kill each kind of process that a run has, at a random moment, and run again: the same bytes, and nothing stays.

The command runs as users call it, on a Ray of its own. This process adopts what its descendants leave (Linux), so that
every process that stays is found, whatever its name is.
"""

import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import yaml

from pipeline.store.store import Store
from tests.bench.store.model import make_policy, write_prompts
from tests.runs import ROOT

PR_SET_CHILD_SUBREAPER = 36
PROMPTS, SHARDS, DRAWS = 400, 8, 64
SECONDS_TO_END = 30.0  # in which a run must have noticed, and processes must have gone
GIVE_UP_SECONDS = 600.0
STOPPED_SECONDS = 30.0
# Words by which a process of a run is recognised, in its name or in its command line.
KINDS: dict[str, tuple[str, ...]] = {
    "driver": (),  # the process that was started here
    "worker": ("ray::StageWorker",),
    "starting worker": ("default_worker.py", "ray::IDLE"),
    "raylet": ("/raylet/raylet",),
    "GCS": ("gcs_server",),
    "dashboard agent": ("dashboard/agent.py", "ray::DashboardAgent"),
    "engine core": ("VLLM::EngineCore",),
}
METHOD = f"""Each run is `winnow run --executor ray --workers 2` on {PROMPTS} prompts in {SHARDS} parts with the fake
engine, killed (-9) at a random moment of an undisturbed run's time, or as soon as it has a process of the kind. The
engine core is vLLM's, in a process of its own, of a run without Ray. Afterwards the same command, in process, ends the
run, and its tables are compared by their bytes with those of an undisturbed run. Processes left are those that live
{SECONDS_TO_END:g} s after the end."""
Digests = dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class Death:
    """Result of one kill.

    at: seconds after the start; seconds: from the kill to the end of the run; code: its exit code, 128 + signal if it
    was killed itself; left: processes that were there SECONDS_TO_END after the kill, or after the run's end.
    message: what it printed last. same: the run that went on ended like an undisturbed one.
    """

    kind: str
    at: float
    seconds: float
    code: int
    left: int
    same: bool
    message: str


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Let processes whose parent ends become children of this one, which ends those that stay."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        end_all()
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def running() -> list[psutil.Process]:
    """Return all processes that this one has started or adopted."""
    processes = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                reap(process.pid)
            else:
                processes.append(process)
    return processes


def reap(process: int) -> None:
    with suppress(OSError):
        os.waitpid(process, os.WNOHANG)


def end_all() -> None:
    for process in running():
        with suppress(psutil.Error):
            process.kill()
    time.sleep(0.2)
    running()


def of_kind(kind: str) -> list[psutil.Process]:
    processes = []
    for process in running():
        with suppress(psutil.Error):
            command = " ".join(process.cmdline()[:4])  # a raylet's goes on with those of its agents and workers
            if any(word in command for word in KINDS[kind]):
                processes.append(process)
    return processes


def write_inputs(folder: Path, engine: str, draws: int) -> None:
    """Write model, prompts and recipe: four steps, of which two have parts."""
    folder.mkdir(parents=True, exist_ok=True)
    make_policy(folder, 64, 1)
    write_prompts(folder, PROMPTS)
    inputs = {"prompts": "prompts", "candidates": "sample"}
    sampling: dict[str, Any] = {"engine": engine, "n": draws, "max_tokens": 16}
    steps = {
        "policy": {"use": "model", "with": {"path": "./policy"}},
        "prompts": {"from": {"tokenizer": "policy"}, "with": {"path": "./prompts.jsonl", "heldout": 0.0}},
        "sample": {"from": {"prompts": "prompts", "policy": "policy"}, "with": sampling},
        "reward": {"from": inputs, "with": {"by": {"name": "brevity", "words": 12}}},
    }
    recipe = {"shards": SHARDS, "target": "reward"} | steps
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def start(folder: Path, store: Path, on_ray: bool, log: Any = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "jobs", "run", str(folder / "recipe.yaml"), "--store", str(store)]
    words += ["--executor", "ray", "--workers", "2"] if on_ray else []
    env = os.environ | {"PYTHONPATH": str(ROOT), "WINNOW_CACHE": str(folder / "cache"), "COLUMNS": "1000"}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # an engine in a process of its own, as it is on a GPU
    return subprocess.Popen(words, stdout=log, stderr=log, env=env, cwd=ROOT)


def digests(store: Path) -> Digests:
    """Return the tables of all finished steps: names by the manifest, digests by the bytes on disk."""
    tables: Digests = {}
    for manifest in Store(store).sealed():
        folder, names = Path(manifest["folder"]), [file["file"] for file in manifest["files"]]
        tables[manifest["stage"]] = [(name, sha256((folder / name).read_bytes()).hexdigest()) for name in names]
    return tables


def wait_until(is_so: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def undisturbed(folder: Path, on_ray: bool) -> tuple[float, Digests]:
    """Return seconds and tables of a run to which nothing happens."""
    before = time.monotonic()
    process = start(folder, folder / "undisturbed", on_ray)
    if process.wait(GIVE_UP_SECONDS):
        raise RuntimeError(f"the undisturbed run ended with {process.returncode}")
    return time.monotonic() - before, digests(folder / "undisturbed")


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)


def stop_for_a_while(process: psutil.Process) -> None:
    process.send_signal(signal.SIGSTOP)
    time.sleep(STOPPED_SECONDS)
    process.send_signal(signal.SIGCONT)


def measure_death(
    folder: Path,
    kind: str,
    share: float,
    seconds: float,
    expected: Digests,
    disturb: Callable[[psutil.Process], None] = kill,
) -> Death:
    """Disturb a process of this kind after a share of an undisturbed run's seconds, or as soon as there is one then."""
    store = folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    with (folder / "log").open("wb") as log:
        begin = time.monotonic()
        process = start(folder, store, kind != "engine core", log)
        wait_until(lambda: process.poll() is not None, share * seconds)
        victims: list[psutil.Process] = []

        def is_there() -> bool:
            victims[:] = [psutil.Process(process.pid)] if kind == "driver" else of_kind(kind)
            return bool(victims) or process.poll() is not None

        wait_until(is_there, GIVE_UP_SECONDS)
        if process.poll() is not None:  # it was over before: again, earlier
            return measure_death(folder, kind, share * 0.7, seconds, expected, disturb)
        killed = time.monotonic()
        with suppress(psutil.Error):
            disturb(random.Random(share).choice(victims))
        wait_until(lambda: process.poll() is not None, GIVE_UP_SECONDS)
        took = time.monotonic() - killed
        code = process.poll()
    wait_until(lambda: not running(), SECONDS_TO_END)
    left = len(running())
    end_all()
    lines = (folder / "log").read_text(errors="replace").strip().splitlines()
    again = start(folder, store, False)
    same = again.wait(GIVE_UP_SECONDS) == 0 and digests(store) == expected
    return Death(
        kind, killed - begin, took, -1 if code is None else code % 256 if code >= 0 else 128 - code, left, same,
        lines[-1] if code and lines else "",
    )  # fmt: skip


def death_table(deaths: list[Death]) -> pa.Table:
    """Return a row per kind: how many ended with the same bytes, processes left, seconds to the end, exit codes."""
    rows = []
    for kind in dict.fromkeys(death.kind for death in deaths):
        of_this = [death for death in deaths if death.kind == kind]
        codes = sorted({death.code for death in of_this})
        rows.append(
            {
                "killed": kind,
                "times": len(of_this),
                "same bytes": sum(death.same for death in of_this),
                "processes left": sum(death.left for death in of_this),
                "seconds to the run's end": f"{min(death.seconds for death in of_this):.1f} to "
                f"{max(death.seconds for death in of_this):.1f}",
                "exit codes": ", ".join(f"{code}: {sum(death.code == code for death in of_this)}" for code in codes),
            }
        )
    return pa.Table.from_pylist(rows)


def measure(
    folder: Path, kinds: list[str], times: int, report: Callable[[str], None], finished: Callable[[list[Death]], None]
) -> list[Death]:
    """Return the results of `times` kills of each kind; `report` gets a line and `finished` all after each."""
    deaths: list[Death] = []
    rng = random.Random(0)
    with adopting_orphans():
        for engine in ("fake", "vllm"):
            chosen = [kind for kind in kinds if (kind == "engine core") == (engine == "vllm")]
            if not chosen:
                continue
            write_inputs(folder / engine, engine, DRAWS if engine == "fake" else 4)
            seconds, expected = undisturbed(folder / engine, engine == "fake")
            report(f"undisturbed, engine {engine}: {seconds:.1f} s")
            for n in range(times):
                for kind in chosen:
                    death = measure_death(folder / engine, kind, rng.random(), seconds, expected)
                    deaths.append(death)
                    report(f"{n + 1} of {times}: {death}")
                    finished(deaths)
    return deaths

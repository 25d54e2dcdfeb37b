"""After a power cut at any moment, what a run said to be finished is finished, and a rerun ends in the same bytes."""

import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.config.plan import Plan, Step
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.store.gc import delete_garbage, garbage
from pipeline.store.storage import SYNC
from pipeline.store.store import Json, Store
from pipeline.store.verify import Damage, find_damage, set_aside
from schemas import WinnowError
from tests.pipeline.store.sizes import both_sizes
from tests.pipeline.store.test_store import SHARDS, contents, folder, make, plan, plan_of_one
from tests.power_cut import Operation, Recorder, recorded, restarts
from tests.runs import Silent

pytestmark = pytest.mark.usefixtures("trouble")


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SYNC, "on")


class Claims(Silent):
    """Reporter whose words about finished parts and steps are recorded with what was asked of the disk."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder, self.parts = recorder, 0

    def step_started(self, step: Step, done: int, total: int) -> None:
        self.parts = done

    def part_finished(self, step: Step) -> None:
        self.parts += 1
        self.recorder.claim("parts", step, self.parts)

    def step_finished(self, step: Step, manifest: Json) -> None:
        super().step_finished(step, manifest)
        self.recorder.claim("step", step, manifest)


PLANS = (lambda: plan(), lambda: plan_of_one("toy_model", size=30))


def record(root: Path) -> list[Operation]:
    """Return what a run of three parts and one of a model ask of the disk, and what they say."""
    root.mkdir()
    with recorded(root) as recorder:
        for one in PLANS:
            planned: Plan = one()
            run(planned, Store(root / "store"), LocalExecutor(), Claims(recorder))
            recorder.claim("run", planned.name)
    return recorder.operations


def losses(operations: list[Operation], target: Path) -> list[str]:
    """Return what was said before some cut and does not hold after it."""
    lost = []
    for disk, claims in restarts(operations, target):
        store = Store(disk / "store")
        for kind, *facts in claims:
            holds = False
            if kind == "run":
                with suppress(WinnowError):
                    holds = facts[0] in store.runs()
            elif kind == "step":
                step, manifest = facts
                holds = store.folder(step).manifest == manifest
            else:
                step, parts = facts
                folder_of_step = store.folder(step)
                whole = step.signature.unsharded
                holds = folder_of_step.manifest is not None or len(folder_of_step.missing()) <= (
                    0 if whole else SHARDS - parts
                )
            lost += [] if holds else [f"{disk.name}: {kind} {getattr(facts[0], 'name', facts[0])}"]
        finished = {manifest["key"] for manifest in store.sealed()} if store.root.exists() else set()
        lost += [f"{disk.name}: {damage}" for damage in find_damage(store, finished)]
        shutil.rmtree(disk)
    return lost


@both_sizes
def test_no_cut_loses_what_was_said_to_be_finished(tmp_path: Path):
    operations = record(tmp_path / "disk")
    assert len([operation for operation in operations if operation[0] == "sync"]) > 30
    assert losses(operations, tmp_path) == []


@pytest.mark.filterwarnings("ignore:counts as not finished")
def test_without_syncs_a_cut_loses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else the test above would say nothing."""
    monkeypatch.setenv(SYNC, "off")
    operations = record(tmp_path / "disk")
    assert not [operation for operation in operations if operation[0] == "sync"]
    assert {line.split()[1] for line in losses(operations, tmp_path)} >= {"step", "parts", "run"}


@both_sizes
def test_after_any_cut_a_rerun_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    operations = record(tmp_path / "disk")
    monkeypatch.setenv(SYNC, "off")  # of the reruns
    expected = contents(Store(tmp_path / "disk" / "store"))
    for disk, _ in restarts(operations, tmp_path, every=9):
        store = Store(disk / "store")
        for one in PLANS:
            make(store, one())
        assert contents(store) == expected, disk.name
        assert (store.folder(PLANS[1]().target).path / "model" / "model.safetensors").read_bytes() == b"x" * 30
        shutil.rmtree(disk)


def test_a_cut_while_a_step_is_deleted_or_set_aside_leaves_no_half_of_it(tmp_path: Path):
    """Its manifest is gone for good before its tables go."""
    (tmp_path / "disk").mkdir()
    store = Store(tmp_path / "disk" / "store")
    with recorded(tmp_path / "disk") as recorder:
        make(store)
        make(store, plan_of_one("toy_model", size=30))
        before = len(recorder.operations)
        set_aside(store, [Damage("toy_grade", folder(store).path.name, "manifest.json", "")])
        list(delete_garbage(store, garbage(store, ("toy", "m")), ("toy", "m")))
    for disk, _ in restarts(recorder.operations, tmp_path, first=before):
        store = Store(disk / "store")
        finished = {manifest["key"] for manifest in store.sealed()}
        assert list(find_damage(store, finished)) == [], disk.name
        shutil.rmtree(disk)

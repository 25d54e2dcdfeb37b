"""Parts of a step that computes rows from rows are divided among processes; nothing that is in a table changes."""

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.execution import executor
from pipeline.execution.executor import LocalExecutor, _is_of_rows
from pipeline.execution.retries import may_pass
from pipeline.execution.run import run
from pipeline.execution.tasks import step_spec
from pipeline.store.store import Store
from schemas import MachineError
from schemas.tables import PROMPTS
from tests.bench.store.model import make_step
from tests.runs import Silent
from tests.toys import notes, plan_of_toys


def test_the_number_of_processes_is_that_of_the_cores_which_a_container_may_use(monkeypatch: pytest.MonkeyPatch):
    """And not of the machine's: loky reads the quota of the container and the affinity of the process."""
    monkeypatch.setattr("joblib.externals.loky.cpu_count", lambda: 3)
    assert (LocalExecutor().processes, LocalExecutor(processes=2).processes) == (3, 2)


def test_long_parts_are_computed_in_processes_and_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All but the first, which shows that they are long. Two new processes take a second or two to start."""
    monkeypatch.setattr(executor, "LONG_PART", 0.0)
    plan = plan_of_toys(4, slow=dict(folder=str(tmp_path), name="slow", seconds=0.0))
    tables = []
    for processes in (1, 2):
        store = Store(tmp_path / str(processes))
        run(plan, store, LocalExecutor(processes=processes), Silent())
        tables.append([store.folder(plan.target).divided().read(PROMPTS, part) for part in range(4)])
    assert tables[0] == tables[1]
    computed_by = [int(process) for _, event, _, process in notes(tmp_path) if event == "begins"]
    assert computed_by[:5] == [os.getpid()] * 5
    assert os.getpid() not in computed_by[5:]


def test_a_process_that_dies_ends_the_run_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """End so that the same command may succeed later: memory may have been short. It takes a second or two."""
    monkeypatch.setattr(executor, "LARGE_PART", 0)
    plan = plan_of_toys(2, dying=dict(folder=str(tmp_path), deaths=[1]))
    store, chosen = Store(tmp_path / "store"), LocalExecutor(processes=2)
    with pytest.raises(MachineError, match=r"dying: a process .* died.*`piece_memory`") as error:
        run(plan, store, chosen, Silent())
    assert may_pass(error.value)
    run(plan, store, LocalExecutor(processes=1), Silent())
    assert store.folder(plan.target).manifest


@pytest.mark.parametrize(
    ("by", "is_divided"),
    [
        ({"name": "brevity", "words": 1}, True),
        ({"name": "hosted_judge", "url": "http://localhost:1/v1", "model": "judge"}, False),
    ],
    ids=["program", "server"],
)
def test_what_asks_a_server_is_not_divided(tmp_path: Path, by: dict[str, Any], is_divided: bool):
    """Else as many times the requests would be under way as its option `concurrency` says."""
    assert _is_of_rows(step_spec(make_step("reward", 2, by=by), Store(tmp_path))) is is_divided

"""A result is stored under the key of what was read: files that change during a run end it."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import DataPath, stage
from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import Recipe
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.store.store import Store
from schemas import MachineError, Prompts
from schemas.tables import PROMPTS
from tests.runs import Silent

before_reading: list[Path] = []  # files that a stage edits before it reads them, as someone else might
after_reading: list[Path] = []  # files that it puts back


@stage(version=1, unsharded=True)
def texts_of_files(*, path: DataPath) -> Prompts:
    """Read one prompt per file."""
    for file in before_reading:
        file.write_text("edited")
    files = [path.path] if path.path.is_file() else sorted(path.path.iterdir())
    row = {"token_ids": [1], "split": "train", "demonstration": None, "demonstration_ids": None}
    rows = [row | {"prompt_id": f"{n:020x}", "text": file.read_text()} for n, file in enumerate(files)]
    for file in after_reading:
        file.write_text(file.name)
    return pa.Table.from_pylist(rows, schema=PROMPTS)


def plan_of_path(path: Path) -> Plan:
    steps = {"texts_of_files": {"with": {"path": str(path)}}}
    plan = make_plan(Recipe(name="toys", shards=1, target="texts_of_files", steps=steps))
    assert plan.target.key
    return plan


def texts_in(store: Store, plan: Plan) -> list[str]:
    run(plan, store, LocalExecutor(), Silent())
    return store.folder(plan.target).read(PROMPTS).column("text").to_pylist()


@pytest.mark.parametrize("folder", [False, True])
def test_a_file_that_changes_after_the_plan_was_made_is_named_and_nothing_is_stored(tmp_path, monkeypatch, folder):
    """Put back, it is read again, and not served as it was in between; the same bytes written again are no change."""
    path = tmp_path / "data"
    path.mkdir()
    for name in ("a.txt", "b.txt"):
        (path / name).write_text(name)
    read, store = path if folder else path / "b.txt", Store(tmp_path / "store")
    monkeypatch.setattr(f"{__name__}.before_reading", [path / "b.txt"])
    with pytest.raises(
        MachineError, match=r"texts_of_files: \S*/data/b.txt changed after the plan was made.*run again"
    ):
        texts_in(store, plan_of_path(read))
    monkeypatch.setattr(f"{__name__}.before_reading", [])
    (path / "b.txt").write_text("b.txt")
    plan = plan_of_path(read)
    (path / "b.txt").write_text("b.txt")
    assert texts_in(store, plan) == (["a.txt", "b.txt"] if folder else ["b.txt"])


def test_a_file_that_comes_into_a_folder_after_the_plan_was_made_is_named(tmp_path):
    path = tmp_path / "data"
    path.mkdir()
    (path / "a.txt").write_text("a")
    plan = plan_of_path(path)
    (path / "new.txt").write_text("new")
    with pytest.raises(MachineError, match=r"data/new\.txt changed"):
        texts_in(Store(tmp_path / "store"), plan)


def test_a_file_that_was_edited_while_it_was_read_and_put_back_is_named(tmp_path, monkeypatch):
    """Its digest is that of the plan again: what was read was another content."""
    path = tmp_path / "data"
    path.mkdir()
    (path / "a.txt").write_text("a.txt")
    plan, store = plan_of_path(path), Store(tmp_path / "store")
    monkeypatch.setattr(f"{__name__}.before_reading", [path / "a.txt"])
    monkeypatch.setattr(f"{__name__}.after_reading", [path / "a.txt"])
    with pytest.raises(MachineError, match=r"data/a\.txt changed.*nothing of this step is stored"):
        texts_in(store, plan)
    monkeypatch.setattr(f"{__name__}.before_reading", [])
    assert store.folder(plan.target).manifest is None
    monkeypatch.setattr(f"{__name__}.after_reading", [])
    assert texts_in(store, plan) == ["a.txt"]


def test_a_file_that_was_edited_before_it_was_read_is_not_read_at_all(tmp_path, monkeypatch):
    """Though it is put back by the end of the step."""
    path = tmp_path / "data"
    path.mkdir()
    (path / "a.txt").write_text("a.txt")
    plan = plan_of_path(path)
    (path / "a.txt").write_text("edited")
    monkeypatch.setattr(f"{__name__}.after_reading", [path / "a.txt"])
    with pytest.raises(MachineError, match=r"data/a\.txt changed"):
        texts_in(Store(tmp_path / "store"), plan)
    assert (path / "a.txt").read_text() == "edited"

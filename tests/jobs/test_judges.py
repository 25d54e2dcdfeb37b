"""Judges of a config: steps and win rates of their own, opponents, what changes what, and what a plan refuses."""

import shutil
from pathlib import Path

import pytest

from jobs.recipes import plan_named
from jobs.runs import with_free_names
from pipeline.config.plan import Plan
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from schemas import WinnowError
from tests.runs import Silent

JUDGES = """
judges:
  proxy:   {against: [sft, target]}
  gold:    {ranker: {use: brevity, with: {words: 9}}, against: [sft, target]}
  polite:  {ranker: {use: pattern, with: {regex: "Gladly"}}}
evaluate: {with: {gold: null}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "judges.yaml"
    file.write_text(JUDGES)
    return file


def planned(data_dir: Path, *configs: Path, sets: tuple[str, ...] = (), recipe: str = "rso", name: str = "run") -> Plan:
    return plan_named(recipe, [data_dir / "demo.yaml", *configs], list(sets), name)


def made(plan: Plan, store: Store) -> list[str]:
    """Run the plan, and return the steps that ran."""
    with_free_names([plan], store)
    reporter = Silent()
    run(plan, store, LocalExecutor(), reporter)
    return reporter.ran


def test_smoke(data_dir, finished, tmp_path, config):
    store = Store(shutil.copytree(finished, tmp_path / "store"))
    ran = made(planned(data_dir, config, name="judged"), store)
    print(ran)
    for row in query(open_catalog(store), "SELECT run, step, metric, value, low, high, n FROM runs JOIN evaluations USING (stage, key) WHERE run='judged'").to_pylist():
        print(row)

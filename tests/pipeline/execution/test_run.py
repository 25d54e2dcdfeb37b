"""The same bytes whatever happens: any number of parts, a kill in the middle; on Ray, see test_object_store."""

import json
import shutil
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from pipeline.config.partial import Part, rerun
from pipeline.config.plan import Plan
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.store.store import WHOLE, Store
from schemas import table_name
from schemas.tables import CANDIDATES, REJECTS, SELECTIONS
from tests.runs import Silent, local, plan_of


def digests(plan: Plan, store: Store, steps=None) -> dict[str, list[tuple[str, str]]]:
    """Return name and content of every table file by step, as the manifests have them."""
    return {
        step.name: [
            (file["file"], file["sha256"])
            for file in store.folder(step).manifest["files"]
            if not file["file"].startswith("speeds-")  # the one table that differs from run to run
        ]
        for step in plan.steps
        if steps is None or step.name in steps
    }


def without(finished: Path, plan: Plan, first: str, root: Path) -> Store:
    """Copy the finished store, without step `first` and all that follow from it."""
    shutil.copytree(finished, root, symlinks=True)
    store, removed = Store(root), {first}
    for step in plan.steps:
        if step.name in removed or removed & {source.name for source in step.inputs.values()}:
            removed.add(step.name)
            shutil.rmtree(local(store.folder(step).path))
    return store


def test_a_second_run_runs_nothing_and_a_manifest_records_how_its_step_was_made(data_dir, finished):
    plan, reporter = plan_of(data_dir), Silent()
    run(plan, Store(finished), LocalExecutor(), reporter)
    assert reporter.ran == []
    manifest = Store(finished).folder(plan.target).manifest
    assert manifest["identity"]["stage"] == "evaluate"
    assert manifest["libraries"]["torch"]
    assert manifest["code"] == plan.target.code
    assert manifest["rows"]["evaluations"] >= 5
    assert str(finished) not in json.dumps(manifest)


def test_another_beta_runs_select_and_what_follows_but_neither_sample_nor_reward(data_dir, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "store")
    reporter = Silent()
    run(plan_of(data_dir, "select.rule.beta=0.05"), Store(tmp_path / "store"), LocalExecutor(), reporter)
    assert reporter.ran[0] == "select"
    assert {"compare", "pair", "reference", "examples", "optimize", "evaluate"} <= set(reporter.ran)
    assert not {"sample", "reward", "sft", "ranker", "eval_baseline"} & set(reporter.ran)


def test_ranker_calls_are_those_of_table_7(data_dir, finished):
    """n - 1 for the reward of n candidates, k / 2 for first-round ranking of k (Table 7 of arXiv:2309.06657), each in
    both orders."""
    steps = {step.name: Store(finished).folder(step) for step in plan_of(data_dir).steps}
    sampled = steps["sample"].read(CANDIDATES).column("prompt_id").value_counts().to_pylist()
    selected = steps["select"].read(SELECTIONS).column("prompt_id").value_counts().to_pylist()
    calls = {name: steps[name].manifest["counters"]["ranker_calls"] for name in ("reward", "compare")}
    assert calls["reward"] == 2 * sum(group["counts"] - 1 for group in sampled)
    assert calls["compare"] == 2 * sum(group["counts"] // 2 for group in selected)


def test_draws_that_a_finished_step_has_are_taken_from_there(data_dir, finished, tmp_path):
    """Fewer, more, and those of a longer file of prompts: only what is missing is drawn, and the rows are those of a
    store that had none. With another option, or by force, all are drawn."""
    longer = Path(shutil.copytree(data_dir, tmp_path / "longer"))
    with (longer / "prompts.jsonl").open("a") as file:
        for city in ("Ulm", "Bonn", "Kiel", "Jena"):
            file.write(json.dumps({"prompt": f"Please book a tram in {city}.", "demonstration": "Done."}) + "\n")

    def sampled(folder: Path, *sets: str, force: str | None = None) -> tuple[int, int]:
        """Return how many draws there are with their rejects, and how many of them were taken."""
        plan, name = plan_of(folder, "target=sample", *sets), f"{len(list(tmp_path.iterdir()))}"
        stores = [
            Store(shutil.copytree(finished, tmp_path / name)),
            without(finished, plan_of(data_dir), "sample", tmp_path / f"fresh{name}"),
        ]
        for store in stores:
            selection = rerun([plan], store, Part(force=force))
            selection.delete()
            run(plan, store, LocalExecutor(), Silent())
        rows = [store.folder(plan.target).read(CANDIDATES).to_pylist() for store in stores]
        for row in (row for table in rows for row in table):
            row["logp"] = pytest.approx(row["logp"], abs=1e-4)  # another batch rounds differently
        assert rows[0] == rows[1]
        manifest = stores[0].folder(plan.target).manifest
        return sum(manifest["rows"].values()), manifest["counters"].get("draws_of_earlier_steps", 0)

    n = next(step for step in plan_of(data_dir).steps if step.name == "sample").options["n"]
    fewer, taken = sampled(data_dir, f"sample.n={n - 1}")
    assert fewer == taken > 0
    prompts = fewer // (n - 1)
    assert sampled(data_dir, f"sample.n={n + 1}") == (prompts * (n + 1), prompts * n)
    more, taken = sampled(longer)
    assert taken == prompts * n < more
    assert sampled(data_dir, "sample.temperature=0.6") == (prompts * n, 0)
    assert sampled(data_dir, f"sample.n={n - 1}", force="sample") == (fewer, 0)


def test_in_any_number_of_parts_tables_have_the_same_rows(data_dir, finished, tmp_path):
    """From `reward` on in other parts than the candidates that are finished: ids and choices to the bit, and numbers of
    networks, which pass other batches, to rounding."""
    plan = plan_of(data_dir, "target=examples", "shards=5")
    store = without(finished, plan, "reward", tmp_path / "store")
    run(plan, store, LocalExecutor(), Silent())

    def rounded(value):
        if isinstance(value, dict):
            return {name: rounded(item) for name, item in value.items()}
        if isinstance(value, list):
            return [rounded(item) for item in value]
        return pytest.approx(value, rel=0, abs=1e-4) if isinstance(value, float) else value

    def sorted_rows(folder, schema):
        ids = ("prompt_id", "candidate_id", "chosen_id", "left_id", "reason", "step", "metric")
        return sorted(folder.read(schema).to_pylist(), key=lambda row: [str(row.get(name)) for name in ids])

    for step in plan.steps:
        before, after = (root.folder(step) for root in (Store(finished), store))
        assert before.manifest["model"] == after.manifest["model"]
        for schema in [*step.signature.outputs, REJECTS]:
            if table_name(schema) != "speeds":
                assert sorted_rows(after, schema) == rounded(sorted_rows(before, schema))
    assert store.folder(plan.target).manifest["parts"] == 5


def test_kill_9_loses_only_parts_in_flight(data_dir, finished, tmp_path):
    """Killed after the first part of `reward`, then run to its end: finished parts are not computed again, and all
    bytes are those of a run that was not killed.

    `sample` is killed in tests/bench/test_bench_cluster.py, with a node and a head; a Ray worker in test_schedule.py; a
    training, while it writes a checkpoint, in test_trainer.py.
    """
    plan = plan_of(data_dir)
    store = without(finished, plan, "reward", tmp_path / "store")
    folder = local(store.folder(next(step for step in plan.steps if step.name == "reward")).path)
    kill_when_begun(folder, plan, store)
    assert not (folder / "manifest.json").exists()
    finished_parts = [json.loads(part.read_text()) for part in folder.glob("part-*-of-*.json")]
    assert finished_parts
    run(plan, store, LocalExecutor(), Silent())
    for part in finished_parts:  # what it took says that it was not computed again; its file is part of another
        (again,) = (
            item for item in json.loads((folder / WHOLE).read_text())["parts"] if item["shard"] == part["shard"]
        )
        assert (again["cpu_seconds"], again["counters"]) == (part["cpu_seconds"], part["counters"])
    assert digests(plan, store) == digests(plan, Store(finished))


def kill_when_begun(folder: Path, plan: Plan, store: Store) -> None:
    """Run a plan in a process of its own, and kill it as soon as the step in this folder has something to lose."""
    process = get_context("fork").Process(target=run, args=(plan, store, LocalExecutor(), Silent()))
    process.start()
    deadline = time.monotonic() + 120
    while not any(folder.glob("part-*.json")):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()

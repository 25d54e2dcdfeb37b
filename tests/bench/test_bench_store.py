"""`python -m tests.bench store` measures what it states; speeds are for a quiet machine, and no claim here."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from functools import partial
from multiprocessing import active_children
from threading import Timer

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from jobs import queries
from pipeline.context import WarmCache
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.execution.tasks import Task, execute, step_spec
from pipeline.store.store import Store
from schemas import WinnowError, conform
from schemas.tables import CANDIDATES, REWARDS, SELECTIONS
from stages.sampling.engines import Request, Sampling, open_engine
from stages.sampling.engines.fake import FakeEngine
from tests.bench import __main__ as cli
from tests.bench.store import PARTS, Sizes, beta, kills, measure, rerun, sample, select, sql, workers
from tests.bench.store.measure import StoreBenchmark
from tests.bench.store.model import Part, make_policy, pipeline_plan, write_prompts
from tests.bench.store.parts import Results, Verdict, exit_on_sigterm, run_in_process
from tests.bench.store.sample import SIDES, WarmExecutor
from tests.bench.store.select import algorithm_1
from tests.bench.store.workers import WORKERS, WorkersRun
from tests.runs import Silent

SMALL = Sizes(prompts=400, steps=40, parts=4, sampled=8, hidden=64, kills=3, repeats=1)


def run_here(function, *args, preload=()):
    return function(*args)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Inputs of the killed runs."""
    folder = tmp_path_factory.mktemp("small")
    make_policy(folder, 64, 1)
    write_prompts(folder, 40)
    return folder


@pytest.fixture(scope="module")
def bench():
    """`select`, `beta` and `sql`, in this process: their memory says nothing."""
    benchmark = StoreBenchmark(SMALL, ["select", "beta", "sql"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", tempfile.gettempdir())  # which a query sets in its own process
        patch.setattr(sql, "MAX_RUNS", 2)
        for part in (select, beta, sql):
            patch.setattr(part, "run_in_process", run_here)
        benchmark.run(lambda line: None)
    return benchmark


def test_each_part_has_its_verdicts_and_its_tables(bench):
    verdicts, *tables = bench.tables().values()
    assert {row["met"] for row in verdicts.to_pylist()} == {"at another size"}
    assert [table.num_rows for table in tables] == [3, 3, 4, len(queries.names())]
    assert not bench.failures
    page = bench.page()
    assert all(f"## {title}" in page for title in bench.tables())
    assert all(word in page for word in ("commit", "cores", "GiB", "duckdb 2", "prompts 400", "load average"))


def test_select_is_measured_in_parts_of_one_size(bench):
    rows = next(table for title, table in bench.tables().items() if title.startswith("select")).to_pylist()
    assert [(row["prompts"], row["parts"], row["rows kept"]) for row in rows] == [
        ("4", 1, "32"),
        ("40", 1, "320"),
        ("400", 4, "3,200"),
    ]


def test_both_sides_answer_every_query_alike(bench):
    times = {name: bench.results["sql", name] for name in queries.names()}
    assert not [name for name, query in times.items() if query.error]
    assert {len(query.seconds[side]) for query in times.values() for side in sql.SIDES} == {2}
    empty = {name for name, query in times.items() if not query.rows}
    assert empty <= {"heldout", "rejects", "rounds", "two_losses", "unpaired"}  # one sound run has no rows for them


def test_killed_runs_end_like_an_undisturbed_run():
    """Three of the hundred, in processes of their own, as the benchmark runs them all."""
    benchmark = StoreBenchmark(SMALL, ["kills"])
    benchmark.run(lambda line: None)
    results = [benchmark.results["kills", str(n)] for n in range(3)]
    assert [(kill.same, kill.rewritten) for kill in results] == [(True, 0)] * 3
    assert all(kill.step for kill in results)


def test_a_rerun_among_many_steps_runs_nothing(tmp_path):
    """The command prints `cached` for every step; one that ran would fail the measurement."""
    rerun.write_inputs(tmp_path, SMALL.parts)
    size = rerun.write_store(tmp_path, SMALL)
    assert size.steps >= SMALL.steps
    assert size.runs > 1
    assert rerun.time_command(tmp_path, "winnow run") > 0


def test_the_stage_is_measured_with_its_whole_run(small):
    """From sealed prompts to sealed candidates; the engine stays open for the next run."""
    folder = small / "sampling"
    folder.mkdir()
    for name in ("policy", "prompts.jsonl"):
        (folder / name).symlink_to(small / name)
    run(sample.plan_to(folder, "prompts", sample.PARTS, "fake"), Store(folder / "store"), LocalExecutor(), Silent())
    executor, plan = WarmExecutor(), sample.plan_to(folder, "sample", sample.PARTS, "fake")
    engine = sample.open_stage_engine(plan, folder, executor)
    tokens, _ = sample.run_stage(plan, folder, executor)
    assert sample.run_stage(plan, folder, executor)[0] == tokens > 40 * 64
    assert [item for item in executor.warm._held.values() if isinstance(item, FakeEngine)] == [engine]
    shutil.rmtree(folder)


def test_no_side_has_a_better_position_on_its_engine():
    """The mean position is the same, so an even drift from run to run cancels; sides take turns to be the outer one."""
    for repeat in range(3):
        order = sample.order(repeat)
        positions = {side: [n for n, other in enumerate(order) if other == side] for side in SIDES}
        assert {np.mean(values) for values in positions.values()} == {2.5}
        assert order[1] == SIDES[repeat % 2]


def test_the_rate_of_a_side_is_of_all_its_passes():
    """All tokens over all seconds: a pass counts by how long it took, whatever ran between."""
    resets, passes = [], {"a": iter([(100, 1.0), (300, 7.0)]), "b": iter([(6, 2.0), (6, 4.0)])}
    calls = {side: partial(next, passes[side]) for side in passes}
    assert sample.pass_rates(["a", "b", "b", "a"], calls, lambda: resets.append(0)) == {"a": 50, "b": 2}
    assert len(resets) == 4


def verdict_values(summary):
    return [verdict.measured for verdict in summary.verdicts]


def test_the_rate_of_workers_is_the_slope_of_their_parts():
    """However long the start took: tokens after the first part over their time, if the rate is steady."""
    steady = WorkersRun([(100.0 + 2 * n, 1000) for n in range(8)][::-1], 60.0)
    assert steady.rate == pytest.approx(500)
    results: Results = {("workers", setup, "0"): steady for setup in WORKERS}
    assert verdict_values(workers.summarize(SMALL, results)) == ["0.5"]


def test_workers_compute_what_the_stage_computes_in_this_process(tmp_path):
    """All tokens are counted, and the result is deleted before the next run."""
    sample.prepare(tmp_path, SMALL, workers.PARTS)
    measured = run_in_process(workers.measure_workers, tmp_path, 2, "fake")
    plan, store = sample.plan_to(tmp_path, "sample", workers.PARTS, "fake"), Store(tmp_path / "store")
    assert store.folder(plan.target).manifest is None
    tokens, _ = sample.run_stage(plan, tmp_path, LocalExecutor())
    assert sum(tokens for _, tokens in measured.parts) == tokens > 0
    assert len(measured.parts) == workers.PARTS


def test_shares_are_of_one_repeat_or_turn():
    """A machine's speed varies, so sides are compared within a repeat, and then the median is taken.

    sample: of 0.96, 0.9 and 1.1 it is 0.96. workers: of 1.0, 0.8 and 0.5 it is 0.8, and not 300 / (2 * 200).
    """
    rates = [(1000.0, 960.0, 1.0), (2000.0, 1800.0, 1.0), (500.0, 550.0, 1.0)]
    results: Results = {("sample", "sides", str(n)): dict(zip(SIDES, row, strict=True)) for n, row in enumerate(rates)}
    assert verdict_values(sample.summarize(Sizes(repeats=3), results)) == ["0.96"]
    assert sample.stage_rate(Sizes(repeats=3), results) == 960
    assert verdict_values(sample.summarize(Sizes(repeats=3), {})) == []
    rates_by_setup = dict(zip(WORKERS, [(100, 200, 300), (200, 320, 300)], strict=True))
    results = {
        ("workers", setup, str(turn)): WorkersRun([(n / rate, 1) for n in range(4)], 60.0)
        for setup, rates_by_turn in rates_by_setup.items()
        for turn, rate in enumerate(rates_by_turn)
    }
    assert verdict_values(workers.summarize(Sizes(repeats=3), results)) == ["0.8"]


def test_another_beta_is_a_share_of_sampling(bench):
    """Seconds of all parts over tokens / rate."""
    results = bench.results | {("sample", "sides", "0"): dict.fromkeys(SIDES, 1e9)}
    *_, verdict = beta.summarize(SMALL, results).verdicts
    seconds = sum(bench.results["beta", step, "0"].seconds for step in beta.STEPS)
    assert float(verdict.measured.replace(",", "")) == pytest.approx(seconds * 1e9 / (400 * 64 * 32), rel=0.01)


def test_a_step_of_another_beta_stands_beside_bare_duckdb(bench):
    """Both sides read the same rows and write as many; the last row is the sum."""
    rows = next(table for title, table in bench.tables().items() if title.startswith("another beta")).to_pylist()
    expected = [("select", "25,600", "3,200"), ("pair", "25,600", "1,600"), ("examples", "25,600", "400")]
    assert [(row["step"], row["rows read"], row["rows written"]) for row in rows[:-1]] == expected
    for step in beta.STEPS:
        both = bench.results["beta", step, "0"], bench.results["beta", step, "0", "bare"]
        assert all(run.seconds > 0 and run.cpu_seconds > 0 and run.gibibytes > 0 for run in both)


def test_the_stage_is_judged_with_its_files(bench):
    """Seconds of Algorithm 1 for as many prompts, over the seconds of the run from Parquet to Parquet."""
    verdict = bench.summaries["select"].verdicts[-1]
    python, seconds = bench.results["select", "law", "0"].python, bench.results["select", "400", "0"].seconds
    assert float(verdict.measured.replace(",", "")) == pytest.approx(400 * python / seconds, rel=0.01)
    assert "Parquet to Parquet" in verdict.what


# What the comparisons detect


@pytest.fixture(scope="module")
def finished_store(small, tmp_path_factory):
    """Store of the recipe that is killed, run in this process."""
    root = tmp_path_factory.mktemp("finished") / "store"
    kills.run_plan(small, root)
    return root


def test_a_finished_part_that_is_computed_again_is_detected(small, finished_store):
    """Even with the same bytes under the same name."""
    step = next(step for step in kills.plan(small).steps if step.name == "reward")
    before = kills.finished_parts(finished_store)
    assert kills.count_rewritten(before, kills.finished_parts(finished_store)) == 0
    execute(step_spec(step, Store(finished_store)), Task(0), WarmCache(), lambda *report: None)
    assert kills.count_rewritten(before, kills.finished_parts(finished_store)) == 1


def test_a_flipped_byte_is_another_result(small, finished_store):
    """Damage is found whatever the manifest states, and with the length of the file unchanged."""
    undisturbed = kills.digests(small, finished_store)
    file = next(finished_store.glob("examples/*/examples-*.parquet"))
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert kills.digests(small, finished_store) != undisturbed
    file.write_bytes(content)
    assert kills.digests(small, finished_store) == undisturbed


def test_a_run_that_cannot_go_on_is_reported_and_the_other_kills_go_on(tmp_path, monkeypatch):
    """It counts as another result; here a process that cannot go on is made up."""

    def kill(folder, root, seconds):
        (root / "store").mkdir(parents=True)
        return "sample"

    def fail(*args, preload=()):
        raise OSError("a disk | that\nis gone")

    monkeypatch.setattr(kills, "kill_run", kill)
    monkeypatch.setattr(kills, "run_in_process", fail)
    results: Results = {("kills", "0"): kills.measure_kill(tmp_path, 0, 0.5, 1.0, {})}
    summary = kills.summarize(Sizes(kills=1), results)
    assert verdict_values(summary) == ["0 of 1"]
    assert summary.failures == [{"at": "kill 0", "what failed": "OSError: a disk | that is gone"}]


def test_answers_are_compared_by_value():
    for ours, bare, difference in (
        ([1.0, None], [1.0 + 1e-12, None], ""),
        ([1.0, None], [1.0 + 1e-8, None], "other values in x"),
        ([0.0, None], [None, 0.0], "other values in x"),
        ([float("nan")], [float("nan")], ""),
        (["a", None], ["a", None], ""),
        (["a", "b"], ["b", "a"], "other values in x"),
        ([1, 2], [1, 3], "other values in x"),
        ([1], [1.0], "other values in x"),
        ([1], [1, 2], "(1, 1) rows and columns against (2, 1)"),
    ):
        assert sql.difference(pa.table({"x": ours}), pa.table({"y": bare})) == difference


def test_short_queries_are_repeated_and_long_ones_are_not():
    for seconds, repeats, runs in ((0.01, 3, 15), (0.5, 3, 6), (2.0, 3, 3), (30.0, 2, 2)):
        assert not sql.is_enough(dict.fromkeys(sql.SIDES, [seconds] * (runs - 1)), repeats)
        assert sql.is_enough(dict.fromkeys(sql.SIDES, [seconds] * runs), repeats)


def test_a_query_that_fails_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    def fail_one(function, folder, name, repeats):
        if name == "best_of":
            raise MemoryError("no room")
        return sql.QueryTimes({side: [1.0, 2.0] for side in sql.SIDES}, 3)

    monkeypatch.setattr(sql, "run_in_process", fail_one)
    results: Results = {("sql", name): sql.measure_query(tmp_path, name, 1) for name in queries.names()}
    summary = sql.summarize(SMALL, results | {("sql", "made"): 0})
    assert summary.failures == [{"at": "best_of", "what failed": "MemoryError: no room"}]
    assert summary.verdicts[0].what.startswith(f"{len(results) - 1} of {len(results)} queries")
    assert len({tuple(row) for rows in summary.tables.values() for row in rows}) == 1


# The data to measure on


def test_random_tables_fit_their_schemas():
    """Rows are in order and ids are unique; the same part is the same twice."""
    for draws in (4, 64):
        part = Part(30, draws, 3)
        candidates, rewards = conform(part.candidates(), CANDIDATES), conform(part.rewards(), REWARDS)
        assert candidates["candidate_id"].equals(rewards["candidate_id"])
        keys = [(row["prompt_id"], row["candidate_id"]) for row in rewards.to_pylist()]
        assert keys == sorted(set(keys))
        assert len(set(map(len, keys[0]))) == 1
        assert part.candidates().equals(candidates)
    selected = conform(part.selections(), SELECTIONS)["candidate_id"].to_pylist()
    assert set(selected) < {candidate for _, candidate in keys}


def test_algorithm_1_has_the_limits_of_the_compiled_one():
    """Cold, it takes the best, in passes of one; hot, any k; never more than there are."""
    np.random.seed(0)
    rewards = {f"c{n}": float(n) for n in range(20)}
    assert algorithm_1(rewards, 3, 1e-3) == ["c19", "c18", "c17"]
    assert len(set(algorithm_1(rewards, 8, 1e3))) == 8
    assert len(algorithm_1(rewards, 50, 1.0)) == 20


def test_the_fake_engine_is_the_same_for_the_same_request(small):
    """Its response depends on prompt and seed alone, and not on the order or number of requests."""
    engine = open_engine("fake", small / "policy", "float32")
    sampling = Sampling(1.0, 0, 12, (1,))
    requests = [Request([0, 5, 6], seed) for seed in range(200)]
    responses = engine.generate(requests, sampling)
    assert engine.generate(requests[::-1], sampling) == responses[::-1]
    assert engine.generate([Request([0, 5, 7], 0)], sampling) != responses[:1]
    assert {response.finish_reason for response in responses} == {"stop", "length"}
    assert all(1 <= len(response.token_ids) <= 12 for response in responses)
    assert all((response.token_ids[-1] == 1) == (response.finish_reason == "stop") for response in responses)
    assert not any(1 in response.token_ids[:-1] for response in responses)


def test_the_killed_recipe_runs_all_its_steps(small, tmp_path):
    plan = pipeline_plan(small, "examples", 3, engine="fake", n=8, max_tokens=16)
    reporter = Silent()
    run(plan, Store(tmp_path), LocalExecutor(), reporter)
    assert reporter.ran == [step.name for step in plan.steps]
    assert (Store(tmp_path).folder(plan.target).manifest or {})["rows"]["examples"] > 30


# The command


def test_an_unknown_part_is_rejected():
    with pytest.raises(WinnowError, match="--only: no part sleep; there are sample, workers, select"):
        StoreBenchmark(SMALL, ["sleep"])


def test_the_command_writes_its_page(tmp_path):
    """With tasks in new processes, which import nothing but what the task names."""
    words = ["store", "--only", "beta", "--prompts", "200", "--parts", "2", "--out", str(tmp_path / "page.md")]
    result = CliRunner().invoke(cli.bench, words)
    assert result.exit_code == 0, result.output
    assert "left: beta, examples, 0, bare" in result.output
    assert (tmp_path / "page.md").read_text().startswith("# Benchmark of the store")


def test_a_part_that_fails_is_on_the_page_and_the_others_go_on(tmp_path, monkeypatch):
    """After each part there is a page of those before; the command ends with 1."""
    page, pages = tmp_path / "page.md", []

    def fail(*args, preload=()):
        pages.append(page.read_text())
        raise MemoryError("no room [/here] | at all")

    monkeypatch.setattr(beta, "run_in_process", run_here)
    monkeypatch.setattr(rerun, "run_in_process", fail)
    monkeypatch.setattr(select, "run_in_process", fail)
    words = ["store", "--only", "select,beta,rerun", "--prompts", "200", "--parts", "2", "--out", str(page)]
    result = CliRunner().invoke(cli.bench, words)
    assert result.exit_code == 1, result.output
    assert pages[0] == ""
    assert "another beta" in pages[1]
    assert "not done yet: rerun" in pages[1]
    for name, at in (("select", "select, 2 prompts, made"), ("rerun", "rerun, data_dir")):
        row = f"| {at} | MemoryError: no room [/here] \\| at all |"
        assert f"## {name}: what failed\n\n| at | what failed |\n| --- | --- |\n{row}" in page.read_text()
        assert f"failed: {at}" in result.output


def test_a_page_that_cannot_be_written_is_rejected_before_anything_is_measured(tmp_path):
    with pytest.raises(WinnowError, match=r"none/page\.md: No such file or directory; name a file"):
        CliRunner().invoke(cli.bench, ["store", "--out", str(tmp_path / "none/page.md")], catch_exceptions=False)


def test_sigterm_ends_child_processes_and_removes_temporary_folders(tmp_path):
    def sleep():
        with exit_on_sigterm(), tempfile.TemporaryDirectory(dir=tmp_path):
            Timer(1.0, os.kill, [os.getpid(), signal.SIGTERM]).start()
            run_in_process(time.sleep, 60)

    start = time.monotonic()
    with pytest.raises(SystemExit):
        sleep()
    assert time.monotonic() - start < 20
    assert not active_children()
    assert not list(tmp_path.iterdir())


def test_only_the_worker_is_pinned():
    """The raylet, the driver and all others keep their cores; every thread of the worker has one."""
    cores = os.sched_getaffinity(0)
    with (
        subprocess.Popen(["bash", "-c", "exec -a ray::StageWorker.unit sleep 30"], stdout=subprocess.DEVNULL) as worker,
        subprocess.Popen(["sleep", "30"]) as other,
    ):
        with workers.pinned(max(cores)) as pinned_ids:
            while worker.pid not in pinned_ids:
                time.sleep(0.1)
        assert os.sched_getaffinity(worker.pid) == {max(cores)}
        assert os.sched_getaffinity(other.pid) == os.sched_getaffinity(0) == cores
        worker.kill()
        other.kill()


def test_a_target_is_judged_at_its_own_size():
    for verdict, met in (
        (Verdict.at_most("x", 2.0, 2.0, True), "yes"),
        (Verdict.at_most("x", 2.1, 2.0, True), "no"),
        (Verdict.at_least("x", 2.0, 2.0, True), "yes"),
        (Verdict.at_least("x", 1.9, 2.0, True), "no"),
        (Verdict.at_least("x", 1.9, 2.0, False), "at another size"),
    ):
        assert verdict.row["met"] == met


def test_the_default_of_the_command_is_all_parts():
    assert list(StoreBenchmark(SMALL, PARTS.split(",")).parts) == list(measure.BENCHMARK_PARTS)
    assert kills.FULL_SIZE == Sizes().kills == 100

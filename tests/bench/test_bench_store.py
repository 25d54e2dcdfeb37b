"""`make bench` (store) measures what it says; how fast anything is, is for a quiet machine, and no claim here."""

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

import jobs.__main__  # noqa: F401 - has every command
from jobs import queries
from jobs.commands.app import app
from pipeline.context import WarmCache
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.execution.tasks import Task, execute, step_spec
from pipeline.store.store import Store
from schemas import WinnowError, conform
from schemas.tables import CANDIDATES, REWARDS, SELECTIONS
from stages.sampling.engines import Request, Sampling, open_engine
from stages.sampling.engines.fake import FakeEngine
from tests.bench.store import PARTS, Sizes, measure, workers
from tests.bench.store import beta as changing
from tests.bench.store import kills as killing
from tests.bench.store import rerun as rerunning
from tests.bench.store import sample as sampling
from tests.bench.store import select as selecting
from tests.bench.store import sql as asking
from tests.bench.store.measure import Bench
from tests.bench.store.model import Part, corridor, make_policy, write_prompts
from tests.bench.store.parts import Found, Verdict, apart, ended_by_sigterm
from tests.bench.store.sample import SIDES, Selection
from tests.bench.store.select import algorithm_1
from tests.bench.store.workers import CREWS, ActorPool
from tests.runs import Silent

SMALL = Sizes(prompts=400, steps=40, parts=4, sampled=8, hidden=64, kills=3, repeats=1)


def here(function, *args, ready=()):
    return function(*args)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The data_dir of the kills, made once."""
    folder = tmp_path_factory.mktemp("small")
    make_policy(folder, 64, 1)
    write_prompts(folder, 40)
    return folder


@pytest.fixture(scope="module")
def bench():
    """`select`, `beta` and `sql`, in this process, which their memory does not count in."""
    made = Bench(SMALL, ["select", "beta", "sql"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", tempfile.gettempdir())  # which a query sets in its own process
        patch.setattr(asking, "MOST", 2)
        for part in (selecting, changing, asking):
            patch.setattr(part, "apart", here)
        made.run(lambda said: None)
    return made


def test_each_part_tells_its_promises_and_its_figures(bench):
    promised, *tables = bench.tables().values()
    assert {row["met"] for row in promised.to_pylist()} == {"at another size"}
    assert [table.num_rows for table in tables] == [3, 3, 4, len(queries.names())]
    assert not bench.failed
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
    found = {name: bench.found["sql", name] for name in queries.names()}
    assert not [name for name, both in found.items() if both.wrong]
    assert {len(both.seconds[side]) for both in found.values() for side in asking.SIDES} == {2}
    empty = {name for name, both in found.items() if not both.rows}
    assert empty <= {"heldout", "rejects", "rounds", "two_losses", "unpaired"}  # one sound run has nothing to tell them


def test_kills_end_like_an_undisturbed_run(tmp_path):
    """Three of the hundred, in processes of their own, as the benchmark does all."""
    made = Bench(SMALL, ["kills"])
    made.run(lambda said: None)
    kills = [made.found["kills", str(n)] for n in range(3)]
    assert [(kill.same, kill.touched) for kill in kills] == [(True, 0)] * 3
    assert all(kill.step for kill in kills)


def test_a_rerun_among_many_steps_runs_nothing(tmp_path):
    """The command says `cached` of every step; one that ran would fail the measurement."""
    rerunning._world(tmp_path, SMALL.parts)
    made = rerunning._store(tmp_path, SMALL)
    assert made.steps >= SMALL.steps
    assert made.runs > 1
    assert rerunning._timed(tmp_path, "winnow run") > 0


def test_the_stage_that_is_measured_is_the_whole_run_of_it(small):
    """From sealed prompts to sealed candidates, and the engine stays open for the next run."""
    folder = small / "sampling"
    folder.mkdir()
    for name in ("policy", "prompts.jsonl"):
        (folder / name).symlink_to(small / name)
    run(sampling.planned(folder, "prompts", sampling.PARTS, "fake"), Store(folder / "store"), LocalExecutor(), Silent())
    executor, plan = Selection(), sampling.planned(folder, "sample", sampling.PARTS, "fake")
    engine = sampling._opened(plan, folder, executor)
    first = sampling._stage(plan, folder, executor)
    assert sampling._stage(plan, folder, executor)[0] == first[0] > 40 * 64
    held = [each for each in executor.warm._held.values() if isinstance(each, FakeEngine)]
    assert held == [engine]
    shutil.rmtree(folder)


@pytest.mark.parametrize("repeat", range(3))
def test_no_side_has_a_better_place_on_its_engine(repeat):
    """The mean place is the same, so what grows or falls evenly from run to run cancels; the outer one takes turns."""
    order = sampling.order(repeat)
    places = {side: [place for place, each in enumerate(order) if each == side] for side in SIDES}
    assert {np.mean(each) for each in places.values()} == {2.5}
    assert order[1] == SIDES[repeat % 2]


def test_the_rate_of_a_side_is_of_all_its_passes():
    """All tokens over all seconds: a pass counts by how long it took, whatever was run between."""
    turns, passes = [], {"a": iter([(100, 1.0), (300, 7.0)]), "b": iter([(6, 2.0), (6, 4.0)])}
    calls = {side: partial(next, passes[side]) for side in passes}
    assert sampling._rates(["a", "b", "b", "a"], calls, lambda: turns.append(0)) == {"a": 50, "b": 2}
    assert len(turns) == 4


def test_the_pace_of_a_crew_is_the_slope_of_its_parts():
    """Whatever the start took: tokens of the parts after the first over the time that they took, if it is steady."""
    crew = ActorPool([(100.0 + 2 * n, 1000) for n in range(8)][::-1], 60.0)
    assert crew.rate == pytest.approx(500)
    found: Found = {("workers", name, "0"): crew for name in CREWS}
    assert [verdict.found for verdict in workers.told(SMALL, found).verdicts] == ["0.5"]


def test_a_crew_makes_what_the_stage_makes_in_this_process(tmp_path):
    """All tokens are counted, and nothing is left for the next crew to find."""
    sampling.prepare(tmp_path, SMALL, workers.PARTS)
    crew = apart(workers._crew, tmp_path, 2, "fake")
    plan, store = sampling.planned(tmp_path, "sample", workers.PARTS, "fake"), Store(tmp_path / "store")
    assert store.folder(plan.target).manifest is None
    tokens, _ = sampling._stage(plan, tmp_path, LocalExecutor())
    assert sum(tokens for _, tokens in crew.parts) == tokens > 0
    assert len(crew.parts) == workers.PARTS


def test_the_share_of_the_stage_is_of_one_repeat():
    """Of 0.96, 0.9 and 1.1 it is 0.96; its rate is the median of its own."""
    rates = [(1000.0, 960.0, 1.0), (2000.0, 1800.0, 1.0), (500.0, 550.0, 1.0)]
    found: Found = {("sample", "sides", str(n)): dict(zip(SIDES, each, strict=True)) for n, each in enumerate(rates)}
    assert [verdict.found for verdict in sampling.told(Sizes(repeats=3), found).verdicts] == ["0.96"]
    assert sampling.rate(Sizes(repeats=3), found) == 960
    assert sampling.told(Sizes(repeats=3), {}).verdicts == []  # of what there is


def test_two_workers_are_beside_the_one_of_their_own_turn():
    """A machine slows and speeds up from turn to turn: of 1.0, 0.8 and 0.5 it is 0.8, and not 300 / (2 * 200)."""
    paces = dict(zip(CREWS, [(100, 200, 300), (200, 320, 300)], strict=True))
    found: Found = {
        ("workers", name, str(turn)): ActorPool([(n / pace, 1) for n in range(4)], 60.0)
        for name, each in paces.items()
        for turn, pace in enumerate(each)
    }
    assert [verdict.found for verdict in workers.told(Sizes(repeats=3), found).verdicts] == ["0.8"]


def test_another_beta_is_a_share_of_sampling(bench):
    """Seconds of all parts over tokens / rate."""
    found = bench.found | {("sample", "sides", "0"): dict.fromkeys(SIDES, 1e9)}
    (verdict,) = changing.told(SMALL, found).verdicts
    seconds = sum(bench.found["beta", "run"].seconds.values()) * SMALL.parts / changing.MEASURED
    assert float(verdict.found.replace(",", "")) == pytest.approx(seconds * 1e9 / (400 * 64 * 32), rel=0.01)
    assert "select, pair, examples, scaled from 2 of 4 parts" in verdict.what


def test_the_stage_is_judged_with_its_files(bench):
    """Seconds of Algorithm 1 for as many prompts, over the seconds of the run from Parquet to Parquet."""
    verdict = bench.told["select"].verdicts[-1]
    python, seconds = bench.found["select", "law", "0"].python, bench.found["select", "400", "0"].seconds
    assert float(verdict.found.replace(",", "")) == pytest.approx(400 * python / seconds, rel=0.01)
    assert "Parquet to Parquet" in verdict.what


# What the comparisons see


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """The run of the kills, in this process."""
    root = tmp_path_factory.mktemp("finished") / "store"
    killing._run(small, root)
    return root


def test_a_finished_part_that_is_made_again_is_seen(small, finished):
    """The same bytes under the same name, in place of the file that stood there."""
    step = next(step for step in killing._plan(small).steps if step.name == "reward")
    before = killing._parts(finished)
    assert killing._touched(before, killing._parts(finished)) == 0
    execute(step_spec(step, Store(finished)), Task(0), WarmCache(), lambda *told: None)
    assert killing._touched(before, killing._parts(finished)) == 1


def test_a_flipped_byte_is_another_result(small, finished):
    """Whatever the manifest says, and be the file as long as before."""
    whole = killing._digests(small, finished)
    file = next(finished.glob("examples/*/examples-*.parquet"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert killing._digests(small, finished) != whole
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert killing._digests(small, finished) == whole


def test_a_run_that_cannot_go_on_is_told_and_the_other_kills_go_on(small, tmp_path, monkeypatch):
    """It counts as another result; that a process cannot go on is made up here."""

    def killed(folder, root, seconds):
        (root / "made").mkdir(parents=True)
        return "sample"

    def fails(*args, ready=()):
        raise OSError("a disk | that\nis gone")

    monkeypatch.setattr(killing, "_killed", killed)
    monkeypatch.setattr(killing, "apart", fails)
    found: Found = {("kills", "0"): killing._one(tmp_path, 0, 0.5, 1.0, {})}
    told = killing.told(Sizes(kills=1), found)
    assert told.verdicts[0].found == "0 of 1"
    assert told.failed == [{"at": "kill 0", "what failed": "OSError: a disk | that is gone"}]


@pytest.mark.parametrize(
    ("own", "other", "told"),
    [
        ([1.0, None], [1.0 + 1e-12, None], ""),
        ([1.0, None], [1.0 + 1e-8, None], "other values in x"),
        ([0.0, None], [None, 0.0], "other values in x"),
        ([float("nan")], [float("nan")], ""),
        (["a", None], ["a", None], ""),
        (["a", "b"], ["b", "a"], "other values in x"),
        ([1, 2], [1, 3], "other values in x"),
        ([1], [1.0], "other values in x"),
        ([1], [1, 2], "(1, 1) rows and columns against (2, 1)"),
    ],
)
def test_answers_are_compared_by_value(own, other, told):
    assert asking.difference(pa.table({"x": own}), pa.table({"y": other})) == told


def test_short_queries_are_repeated_and_long_ones_are_not():
    def enough(seconds, runs, least):
        return asking._enough(dict.fromkeys(asking.SIDES, [seconds] * runs), least)

    for seconds, least, runs in ((0.01, 3, 15), (0.5, 3, 6), (2.0, 3, 3), (30.0, 2, 2)):
        assert not enough(seconds, runs - 1, least)
        assert enough(seconds, runs, least)


def test_a_query_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    def fails(function, folder, name, repeats):
        if name == "best_of":
            raise MemoryError("no room")
        return asking.Both({side: [1.0, 2.0] for side in asking.SIDES}, 3)

    monkeypatch.setattr(asking, "apart", fails)
    found: Found = {("sql", name): asking._asked(tmp_path, name, 1) for name in queries.names()}
    told = asking.told(SMALL, found | {("sql", "made"): 0})
    assert told.failed == [{"at": "best_of", "what failed": "MemoryError: no room"}]
    assert told.verdicts[0].what.startswith(f"{len(found) - 1} of {len(found)} queries")
    assert len({tuple(row) for rows in told.tables.values() for row in rows}) == 1


# What is measured on


@pytest.mark.parametrize("n", [4, 64])
def test_random_tables_are_tables_of_ours(n):
    """They fit their schemas, rows are in order and ids are unique; the same part is the same twice."""
    part = Part(30, n, 3)
    candidates, rewards = conform(part.candidates(), CANDIDATES), conform(part.rewards(), REWARDS)
    assert candidates["candidate_id"].equals(rewards["candidate_id"])
    keys = [(row["prompt_id"], row["candidate_id"]) for row in rewards.to_pylist()]
    assert keys == sorted(set(keys))
    assert len(set(map(len, keys[0]))) == 1
    assert part.candidates().equals(candidates)
    if n == 64:
        assert set(conform(part.selections(), SELECTIONS)["candidate_id"].to_pylist()) < {key[1] for key in keys}


def test_algorithm_1_has_the_limits_of_the_compiled_law():
    """A cold one takes the best, in passes of one; a hot one as many as are asked for; never more than there are."""
    np.random.seed(0)
    rewards = {f"c{n}": float(n) for n in range(20)}
    assert algorithm_1(rewards, 3, 1e-3) == ["c19", "c18", "c17"]
    assert len(set(algorithm_1(rewards, 8, 1e3))) == 8
    assert len(algorithm_1(rewards, 50, 1.0)) == 20


def test_the_fake_engine_is_the_same_for_the_same_request(small):
    """Of prompt and seed alone: neither the order nor the company of a request changes what it gets."""
    engine = open_engine("fake", small / "policy", "float32")
    sampling = Sampling(1.0, 0, 12, (1,))
    asked = [Request([0, 5, 6], seed) for seed in range(200)]
    made = engine.generate(asked, sampling)
    assert engine.generate(asked[::-1], sampling) == made[::-1]
    assert engine.generate([Request([0, 5, 7], 0)], sampling) != made[:1]
    assert {each.finish_reason for each in made} == {"stop", "length"}
    assert all(1 <= len(each.token_ids) <= 12 for each in made)
    assert all((each.token_ids[-1] == 1) == (each.finish_reason == "stop") for each in made)
    assert not any(1 in each.token_ids[:-1] for each in made)


def test_the_corridor_needs_no_torch_of_ours(small, tmp_path):
    plan = corridor(small, "examples", 3, engine="fake", n=8, max_tokens=16)
    watcher = Silent()
    run(plan, Store(tmp_path), LocalExecutor(), watcher)
    assert watcher.ran == [step.name for step in plan.steps]
    assert (Store(tmp_path).folder(plan.target).manifest or {})["rows"]["examples"] > 30


# The command


def test_a_part_that_is_none_is_refused():
    with pytest.raises(WinnowError, match="--only: no part sleep; there are sample, workers, select"):
        Bench(SMALL, ["sleep"])


def test_the_command_writes_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(changing, "apart", here)
    words = ["bench", "store", "--only", "beta", "--prompts", "200", "--parts", "2", "--out", str(tmp_path / "page.md")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "left: beta, run" in done.output
    assert (tmp_path / "page.md").read_text().startswith("# Benchmark of the store")


def test_a_part_that_fails_is_on_the_page_and_the_others_go_on(tmp_path, monkeypatch):
    """After each part there is a page of those before; the command ends with 1."""
    page, pages = tmp_path / "page.md", []

    def fails(*args, ready=()):
        pages.append(page.read_text())
        raise MemoryError("no room [/here] | at all")

    monkeypatch.setattr(changing, "apart", here)
    monkeypatch.setattr(rerunning, "apart", fails)
    monkeypatch.setattr(selecting, "apart", fails)
    words = ["bench", "store", "--only", "select,beta,rerun", "--prompts", "200", "--parts", "2", "--out", str(page)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1, done.output
    assert pages[0] == ""
    assert "another beta" in pages[1]
    assert "not done yet: rerun" in pages[1]
    for name, at in (("select", "select, 2 prompts, made"), ("rerun", "rerun, data_dir")):
        row = f"| {at} | MemoryError: no room [/here] \\| at all |"
        assert f"## {name}: what failed\n\n| at | what failed |\n| --- | --- |\n{row}" in page.read_text()
        assert f"failed: {at}" in done.output


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(WinnowError, match=r"none/page\.md: No such file or directory; give a file"):
        CliRunner().invoke(app, ["bench", "store", "--out", str(tmp_path / "none/page.md")], catch_exceptions=False)


def test_sigterm_ends_what_runs_apart_and_cleans_up(tmp_path):
    def sleeps():
        with ended_by_sigterm(), tempfile.TemporaryDirectory(dir=tmp_path):
            Timer(1.0, os.kill, [os.getpid(), signal.SIGTERM]).start()
            apart(time.sleep, 60)

    begin = time.monotonic()
    with pytest.raises(SystemExit):
        sleeps()
    assert time.monotonic() - begin < 20
    assert not active_children()
    assert not list(tmp_path.iterdir())


def test_only_the_worker_is_pinned(tmp_path):
    """The raylet, the driver and all the rest keep their cores; every thread of the worker has one."""
    core = max(os.sched_getaffinity(0))
    free = os.sched_getaffinity(0)
    with (
        subprocess.Popen(["bash", "-c", "exec -a ray::StageWorker.unit sleep 30"], stdout=subprocess.DEVNULL) as worker,
        subprocess.Popen(["sleep", "30"]) as other,
    ):
        with workers.pinned(core):
            while os.sched_getaffinity(worker.pid) != {core}:
                time.sleep(0.1)
        assert os.sched_getaffinity(other.pid) == os.sched_getaffinity(0) == free
        worker.kill()
        other.kill()


@pytest.mark.parametrize(
    ("verdict", "met"),
    [
        (Verdict.most("x", 2.0, 2.0, True), "yes"),
        (Verdict.most("x", 2.1, 2.0, True), "no"),
        (Verdict.least("x", 2.0, 2.0, True), "yes"),
        (Verdict.least("x", 1.9, 2.0, True), "no"),
        (Verdict.least("x", 1.9, 2.0, False), "at another size"),
    ],
)
def test_a_promise_is_judged_at_its_own_size(verdict, met):
    assert verdict.row["met"] == met


def test_every_part_that_is_named_is_there():
    assert list(Bench(SMALL, PARTS.split(",")).parts) == list(measure.KNOWN)
    assert killing.ASKED == Sizes().kills == 100

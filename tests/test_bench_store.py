"""`winnow bench store` measures what it says; how fast anything is, is for a quiet machine, and no claim here."""

import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

import jobs.__main__  # noqa: F401 - has every command
from jobs import queries
from jobs.bench.store import Sizes, asking, changing, killing, measure, rerunning, sampling, selecting
from jobs.bench.store.measure import Bench
from jobs.bench.store.parts import Found, Verdict
from jobs.bench.store.sampling import SIDES, Crew, Kept
from jobs.bench.store.selecting import algorithm_1
from jobs.bench.store.world import Part, corridor, make_policy, write_prompts
from jobs.commands.app import app
from pipeline.executors import InProcess
from pipeline.run import run
from pipeline.store import Store
from schemas import WinnowError, conform
from schemas.tables import CANDIDATES, REWARDS, SELECTIONS
from stages.engines import Request, Sampling, open_engine
from stages.engines.fake import FakeEngine
from tests.runs import Silent

SMALL = Sizes(prompts=400, steps=40, parts=4, sampled=8, hidden=64, kills=3, repeats=1)


def here(function, *args, ready=()):
    return function(*args)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The world of the kills, made once."""
    folder = tmp_path_factory.mktemp("small")
    make_policy(folder, 64, 1)
    write_prompts(folder, 40)
    return folder


@pytest.fixture(scope="module")
def bench():
    """Every part but `sample` and `kills`, in this process, which their memory does not count in."""
    made = Bench(SMALL, ["select", "beta", "sql"])
    with pytest.MonkeyPatch.context() as patch:
        for part in (selecting, changing, asking):
            patch.setattr(part, "apart", here)
        made.run(lambda said: None)
    return made


def test_each_part_tells_its_promises_and_its_figures(bench):
    promised, *tables = bench.tables().values()
    assert {row["met"] for row in promised.to_pylist()} == {"at another size"}
    assert [table.num_rows for table in tables] == [3, 3, 4, len(queries.names())]
    page = bench.page()
    assert all(f"## {title}" in page for title in bench.tables())
    assert all(word in page for word in ("commit", "cores", "duckdb 2", "prompts 400"))


def test_select_is_measured_in_parts_of_one_size(bench):
    rows = next(table for title, table in bench.tables().items() if title.startswith("select")).to_pylist()
    assert [(row["prompts"], row["parts"], row["rows kept"]) for row in rows] == [
        ("4", 1, "32"),
        ("40", 1, "320"),
        ("400", 4, "3,200"),
    ]


def test_both_sides_answer_every_query_alike(bench):
    found = {name: bench.found["sql", name] for name in queries.names()}
    assert all(both.same for both in found.values())
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
    for parts in (sampling.LARGE, sampling.SMALL):
        run(sampling._plan(folder, "prompts", parts, "fake"), Store(folder / "store"), InProcess(), Silent())
    executor, plan = Kept(), sampling._plan(folder, "sample", sampling.LARGE, "fake")
    engine = sampling._opened(plan, folder, executor)
    first = sampling._stage(plan, folder, executor)
    assert sampling._stage(plan, folder, executor) == first > 40 * 64
    held = [each for each in executor.warm._held.values() if isinstance(each, FakeEngine)]
    assert held == [engine]
    shutil.rmtree(folder)


def test_the_pace_of_a_crew_is_the_slope_of_its_parts():
    """Whatever the start took: tokens of the parts after the first over the time that they took, if it is steady."""
    crew = Crew([(100.0 + 2 * n, 1000) for n in range(8)][::-1], 60.0)
    assert crew.rate == pytest.approx(500)
    found: Found = {("sample", "sides", "0"): dict(zip(SIDES, (1000.0, 960.0), strict=True))}
    found |= {("sample", name, "0"): crew for name in sampling.CREWS}
    verdicts = sampling.told(SMALL, found).verdicts
    assert [verdict.found for verdict in verdicts] == ["0.96", "0.5"]
    assert sampling.rate(SMALL, found) == 960


def test_another_beta_is_a_share_of_sampling(bench):
    """Seconds of all parts over tokens / rate."""
    found = bench.found | {("sample", "sides", "0"): dict(zip(SIDES, (1e9, 1e9), strict=True))}
    (verdict,) = changing.told(SMALL, found).verdicts
    seconds = sum(bench.found["beta", "run"].seconds.values()) * SMALL.parts / changing.MEASURED
    assert float(verdict.found.replace(",", "")) == pytest.approx(seconds * 1e9 / (400 * 64 * 32), rel=0.01)


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
    run(plan, Store(tmp_path), InProcess(), watcher)
    assert watcher.ran == [step.name for step in plan.steps]
    assert (Store(tmp_path).folder(plan.target).manifest or {})["rows"]["examples"] > 30


# The command


def test_a_part_that_is_none_is_refused():
    with pytest.raises(WinnowError, match="--only: no part sleep; there are sample, select"):
        Bench(SMALL, ["sleep"])


def test_the_command_writes_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(changing, "apart", here)
    words = ["bench", "store", "--only", "beta", "--prompts", "200", "--parts", "2", "--out", str(tmp_path / "page.md")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "left: beta, run" in done.output
    assert (tmp_path / "page.md").read_text().startswith("# winnow bench store")


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
    assert set(Bench(SMALL, list(measure.KNOWN)).parts) == set(measure.KNOWN)
    assert killing.ASKED == Sizes().kills == 100

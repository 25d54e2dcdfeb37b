"""Methods of several seeds: the law of their intervals, which runs are one method, and what the statement says."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jobs import queries
from jobs.methods import Method, comparisons, difference_interval, interval, make_leaderboard, methods_of, shared_seeds
from jobs.report import write_report
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from schemas.tables import EVALUATIONS, OUTCOMES, WINS
from tests.catalogs import link, put, table

PROMPTS = 50


def drawn(rng: np.random.Generator, seeds: int, of_seeds: float, mean: float = 0.0, prompts=None) -> np.ndarray:
    """Figures [seeds, prompts]: an effect of each seed, of each prompt (0.3), and of both together (0.35).

    `of_seeds` is the standard deviation of the first in those of the mean over prompts.
    """
    prompts = rng.normal(0, 0.3, PROMPTS) if prompts is None else prompts
    effects = rng.normal(0, of_seeds * 0.3 / np.sqrt(PROMPTS), (seeds, 1))
    return mean + effects + prompts + rng.normal(0, 0.35, (seeds, PROMPTS))


# The law.


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("of_seeds", [0.0, 1.0, 5.0])
def test_an_interval_covers_the_truth_95_times_in_100(seeds: int, of_seeds: float):
    """Whether seeds do nothing or matter more than prompts. 0.935 is 95 % less two standard errors of 1,000 draws."""
    rng = np.random.default_rng(seeds)
    intervals = [interval(drawn(rng, seeds, of_seeds)) for _ in range(1000)]
    assert np.mean([low <= 0 <= high for _, low, high in intervals]) >= 0.935


@pytest.mark.parametrize(("seeds_a", "seeds_b"), [(2, 2), (3, 3), (3, 5)])
@pytest.mark.parametrize("of_seeds", [0.0, 1.0, 5.0])
def test_so_does_the_interval_of_a_difference(seeds_a: int, seeds_b: int, of_seeds: float):
    """One method's seeds matter three times as much as the other's, and the prompts are the same."""
    rng = np.random.default_rng(10 * seeds_a + seeds_b)
    covered = []
    for _ in range(1000):
        prompts = rng.normal(0, 0.3, PROMPTS)
        a, b = drawn(rng, seeds_a, of_seeds, 0.1, prompts), drawn(rng, seeds_b, 3 * of_seeds, 0.0, prompts)
        _, low, high = difference_interval(a, b)
        covered.append(low <= 0.1 <= high)
    assert np.mean(covered) >= 0.935


@pytest.mark.parametrize("of_seeds", [0.0, 5.0])
def test_the_truly_best_method_is_rarely_called_lower(of_seeds: float):
    """Of four methods with three seeds that are equal, the hardest case, a given one: in at most 5 stores of 100."""
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(400):
        prompts = rng.normal(0, 0.3, PROMPTS)
        methods = [method(f"m{n}", drawn(rng, 3, of_seeds, prompts=prompts)) for n in range(4)]
        (result,) = comparisons(methods)
        wrong += any(item.high < 0 for item in result.differences if item.method.name == "m0")
    assert wrong <= 0.05 * 400


def method(name: str, wins: np.ndarray, **yardsticks: str) -> Method:
    steps = [{f"{name}-{n}"} for n in range(len(wins))]
    return Method(name, [], {"gold_win": "one", "proxy_win": "one"} | yardsticks, steps, {"gold_win": wins})


def test_without_one_of_its_sources_the_interval_is_that_of_students_t():
    """Seeds that agree leave that of the means over prompts; prompts that agree, that of the means over seeds."""
    values = np.random.default_rng(0).normal(0, 1, 7)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    for figures in (np.tile(values, (3, 1)), np.tile(values[:, None], (1, 5))):
        assert interval(figures) == pytest.approx((values.mean(), *expected))
    other = np.random.default_rng(1).normal(3, 2, 4)
    welch = stats.ttest_ind(values, other, equal_var=False).confidence_interval(0.95)
    got = difference_interval(np.tile(values[:, None], (1, 5)), np.tile(other[:, None], (1, 5)))
    assert got == pytest.approx((values.mean() - other.mean(), *welch))


def test_paired_seeds_cancel_what_they_share():
    """Two methods on candidates of the same seeds: their difference is exact where the seeds' own spread is large."""
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 10, (3, 1)) + rng.normal(0, 0.3, PROMPTS)
    a, b = shared + 1.0, shared[[2, 0, 1]]
    assert difference_interval(a, b, [(0, 1), (1, 2), (2, 0)]) == pytest.approx((1.0, 1.0, 1.0))
    _, low, high = difference_interval(a, b)
    assert high - low > 10


def test_seeds_are_paired_by_the_steps_that_they_share_alone():
    """A step of all seeds, such as the SFT policy, pairs nothing; nor does a step that pairs only some of them."""
    a = [{"sft", "draw0", "a0"}, {"sft", "draw1", "a1"}]
    assert shared_seeds(a, [{"sft", "draw1", "b1"}, {"sft", "draw0", "b0"}]) == [(0, 1), (1, 0)]
    assert shared_seeds(a, [{"sft", "b1"}, {"sft", "b0"}]) is None
    assert shared_seeds(a, [{"sft", "draw0", "b0"}, {"sft", "draw2", "b2"}]) is None
    assert shared_seeds(a, [{"draw0"}, {"draw1"}, {"draw2"}]) is None


def test_prompts_that_one_seed_lacks_count_where_they_are():
    """NaN is no figure: the mean over seeds is that of each seed's prompts, and two prompts are the least."""
    values = np.array([[1.0, 0.0, np.nan], [1.0, 0.0, 0.5]])
    mean, low, high = interval(values)
    assert mean == 0.5
    assert low < 0.5 < high
    assert np.isnan(difference_interval(values, np.array([[np.nan, np.nan, 1.0]] * 2))).all()


# From a store.


def evaluated(
    store: Store,
    run: str,
    key: str,
    wins,
    seed: int = 0,
    draws: int = 1,
    baseline: str = "b",
    judge: str = "",
    **options,
):
    """Write a run whose policy was trained with `options` and evaluated on as many prompts as it has gold wins."""
    policy = f"0{key[:8]}"
    training = {"version": 1, "options": options | {"seed": seed}, "inputs": {}}
    put(store, "optimize", policy, [], identity=training)
    drawing = {"version": 1, "options": {"seed": draws}, "inputs": {"policy": policy}}
    put(store, "sample", f"1{key}", [], identity=drawing)
    rows = [dict(prompt_id=f"p{n:03}", candidate_id="c", gold_win=win, proxy_win=0.5) for n, win in enumerate(wins)]
    figures = [dict(metric="proxy_win", value=0.5, low=0.1, high=0.9, n=len(wins))]
    if wins[0] is not None:
        figures.append(dict(metric="gold_win", value=float(np.mean(wins)), low=0.1, high=0.9, n=len(wins)))
    inputs = {"candidates": f"1{key}", "baseline": baseline} | ({"judgements": judge} if judge else {})
    judging = {"version": 1, "options": {}, "inputs": inputs}
    put(store, "evaluate", f"2{key}", [table(OUTCOMES, *rows), table(EVALUATIONS, *figures)], identity=judging)
    link(store, run, optimize=("optimize", policy), sample=("sample", f"1{key}"), evaluate=("evaluate", f"2{key}"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """`low` and `high` with three seeds each, and a run of one seed above both."""
    store = Store(tmp_path / "store")
    wins = np.linspace(0.3, 0.5, 40)
    for seed in range(3):
        evaluated(store, f"low x=1 seed={seed}", f"a{seed}", wins + 0.01 * seed, seed, x=1)
        evaluated(store, f"high x=2 seed={seed}", f"b{seed}", wins + 0.2 + 0.01 * seed, seed, x=2)
    evaluated(store, "alone", "c", wins + 0.5, x=3)
    return store


def test_a_method_with_several_seeds_is_one_row(store: Store):
    """With its mean, interval and number of seeds; the row of a run of one seed is that of the query."""
    board, _ = make_leaderboard(open_catalog(store))
    rows = board.to_pylist()
    assert [(row["run"], row["seeds"]) for row in rows] == [("alone", 1), ("high x=2", 3), ("low x=1", 3)]
    assert [row["gold_win"] for row in rows] == pytest.approx([0.9, 0.61, 0.41])
    assert rows[1]["gold_win_low"] < 0.61 < rows[1]["gold_win_high"]
    assert (rows[1]["prompts"], rows[1]["proxy_win"], rows[1]["seconds"]) == (40, 0.5, 4.5)
    alone = next(row for row in query(open_catalog(store), queries.text("leaderboard")).to_pylist()
                 if row["run"] == "alone")  # fmt: skip
    assert rows[0] == alone | {"seeds": 1}


def test_the_statement_tells_apart_what_can_be_and_nothing_of_one_seed(store: Store):
    """`low` is 20 points below. A method between them is not told apart from the best; `alone` has the highest mean."""
    text = "\n".join(make_leaderboard(open_catalog(store))[1])
    assert "highest mean is that of high x=2" in text
    assert "lower: low x=1 (-20.0 [" in text
    assert "one seed each, so not compared: alone" in text
    assert "Bonferroni" not in text
    for seed in range(3):
        evaluated(store, f"wild seed={seed}", f"d{seed}", np.linspace(0.3, 0.5, 40) + 0.3 * (seed - 0.5), seed, x=4)
    text = "\n".join(make_leaderboard(open_catalog(store))[1])
    assert "cannot be told apart from it: wild (-6.0 [" in text
    assert "2 comparisons (Bonferroni)" in text


def test_only_what_is_measured_alike_is_compared(store: Store):
    """Against another baseline, a win rate is of another kind."""
    for seed in range(2):
        evaluated(store, f"other seed={seed}", f"e{seed}", np.linspace(0.6, 0.9, 40), seed, baseline="b2", x=5)
    lines = make_leaderboard(open_catalog(store))[1]
    assert not any("other" in line for line in lines if "told apart" in line or "lower" in line or "highest" in line)
    assert any("no other method has" in line and line.endswith("of other") for line in lines)


def test_seeds_of_the_evaluation_are_no_further_seeds(tmp_path: Path):
    """One policy, evaluated twice, is one replicate: two rows as ever, or, among others, the mean of both."""
    store = Store(tmp_path / "store")
    evaluated(store, "a", "00000000a", [0.0, 1.0], seed=0, draws=1)
    evaluated(store, "a-2", "00000000b", [1.0, 1.0], seed=0, draws=2)
    board, _ = make_leaderboard(open_catalog(store))
    assert board.equals(query(open_catalog(store), queries.text("leaderboard")))
    evaluated(store, "a-3", "00000001a", [0.0, 0.0], seed=1, draws=1)
    (method,) = methods_of(open_catalog(store))
    assert sorted(method.values["gold_win"].tolist()) == [[0.0, 0.0], [0.5, 1.0]]
    assert make_leaderboard(open_catalog(store))[0]["seeds"].to_pylist() == [2]


def test_wins_by_a_judge_called_gold_are_those_of_a_method_too(tmp_path: Path):
    """Where `evaluate` has no gold reward; methods with another gold judge are not compared with it."""
    store = Store(tmp_path / "store")
    for method, judge, shift in (("a", "one", 0.0), ("b", "one", 0.2), ("c", "two", 0.4)):
        for seed in range(2):
            key, wins = f"{method}{seed}", [0.1 + shift, 0.3 + shift + 0.01 * seed]
            evaluated(store, f"{method} seed={seed}", key, [None, None], seed, x=method)
            identity = {"version": 1, "options": {"by": judge}, "inputs": {"candidates": f"1{key}"}}
            put(store, "judge", f"3{key}", [], identity=identity)
            identity = {"version": 1, "options": {"judge": "gold", "against": "sft"}}
            identity["inputs"] = {"candidates": f"1{key}", "judgements": f"3{key}"}
            rows = [dict(prompt_id=f"p{n:03}", judge="gold", against="sft", win=win) for n, win in enumerate(wins)]
            figure = dict(metric="gold_win", value=float(np.mean(wins)), n=2)
            put(store, "win_rate", f"4{key}", [table(WINS, *rows), table(EVALUATIONS, figure)], identity=identity)
            links = store.run(f"{method} seed={seed}") | {"evaluate_by_gold": {"stage": "win_rate", "key": f"4{key}"}}
            link(store, f"{method} seed={seed}", **{name: tuple(step.values()) for name, step in links.items()})
    board, lines = make_leaderboard(open_catalog(store))
    assert board["gold_win"].to_pylist() == pytest.approx([0.6025, 0.4025, 0.2025])
    assert any("highest mean is that of b" in line for line in lines)
    assert any("no other method has the gold reward" in line and "of c" in line for line in lines)


def test_a_method_has_figures_of_other_temperatures_where_all_its_seeds_have_them(store: Store):
    """The mean over seeds and its interval, of `low`; `high`, of which one seed lacks them, has none."""
    runs = [f"low x=1 seed={seed}" for seed in range(3)] + [f"high x=2 seed={seed}" for seed in range(2)]
    for n, run in enumerate(runs):
        rows = [dict(prompt_id=f"p{i:03}", candidate_id="c", gold_win=0.25 + 0.01 * n) for i in range(40)]
        identity = {"version": 1, "options": {}, "inputs": {"candidates": f"6{n}"}}
        put(store, "evaluate", f"5{n}", [table(OUTCOMES, *rows)], identity=identity)
        links = {name: tuple(step.values()) for name, step in store.run(run).items()}
        link(store, run, **links, evaluate_greedy=("evaluate", f"5{n}"))
    by_run = {row["run"]: row for row in make_leaderboard(open_catalog(store))[0].to_pylist()}
    low, high = by_run["low x=1"], by_run["high x=2"]
    assert low["gold_win_greedy"] == pytest.approx(0.26)
    assert low["gold_win_greedy_low"] < 0.26 < low["gold_win_greedy_high"]
    assert (low["gold_win_as_sampled"], high["gold_win_greedy"]) == (None, None)


def test_where_every_run_is_alone_the_leaderboard_is_as_it_was(finished: Path, tmp_path: Path):
    """To the last digit, without a column of seeds; of several runs, their order is said to be no evidence."""
    catalog = open_catalog(Store(finished))
    assert make_leaderboard(catalog) == (query(catalog, queries.text("leaderboard")), [])
    store = Store(tmp_path / "store")
    for n in range(2):
        evaluated(store, f"r{n}", f"{n}", [0.2 * n, 0.4], x=n)
    board, (line,) = make_leaderboard(open_catalog(store))
    assert board.equals(query(open_catalog(store), queries.text("leaderboard")))
    assert "no evidence" in line


def test_runs_on_different_held_out_prompts_are_named(tmp_path: Path):
    """Not those that lack a prompt of which every response was rejected; the table stays as it is."""
    store = Store(tmp_path / "store")
    for run, key, prompts in (("a", "1", 40), ("b", "2", 39), ("c", "3", 10)):
        evaluated(store, run, key, [0.5] * prompts, x=key)
    lines = make_leaderboard(open_catalog(store))[1]
    (line,) = (line for line in lines if "different held-out prompts" in line)
    assert line.endswith(": a, b on 40 prompts; c on 10 prompts")
    lines = make_leaderboard(open_catalog(store, ["a", "b"]))[1]
    assert not any("different held-out prompts" in line for line in lines)


def test_runs_whose_proxy_is_another_ranker_are_named(tmp_path: Path):
    """With what tells the rankers apart. One model in two dtypes, or trained with two seeds, is one ranker."""
    store = Store(tmp_path / "store")
    put(store, "model", "90", [], identity={"version": 1, "options": {}, "inputs": {}}, sources={"path": "/models/rm"})
    for seed in range(2):
        put(
            store,
            "optimize",
            f"9{seed + 1}",
            [],
            identity={"version": 1, "options": {"seed": seed}, "inputs": {"i": "x"}},
        )
    rankers: list[tuple[dict, str | None]] = [
        ({"name": "pointwise", "version": 6, "dtype": "float32"}, "90"),
        ({"name": "pointwise", "version": 6, "dtype": "bfloat16"}, "90"),
        ({"name": "pairwise", "version": 6}, "91"),
        ({"name": "pairwise", "version": 6}, "92"),
        ({"name": "pattern", "version": 2, "regex": "[0-9]"}, None),
        ({"name": "pattern", "version": 2, "regex": "yes"}, None),
        ({"name": "correct", "version": 1}, None),
        ({"name": "correct", "version": 1}, None),
    ]
    for n, (by, model) in enumerate(rankers):
        inputs = {"candidates": f"1{n}"} | ({"ranker": model} if model else {})
        plugins = {"plugins": {"ranker correct": f"{n}" * 64}} if by["name"] == "correct" else {}
        put(store, "judge", f"8{n}", [], identity={"version": 1, "options": {"by": by}, "inputs": inputs} | plugins)
        evaluated(store, f"r{n}", f"{n}", [0.5, 0.5], judge=f"8{n}", x=n)
        links = {name: tuple(step.values()) for name, step in store.run(f"r{n}").items()}
        link(store, f"r{n}", **links, **({"my_ranker": ("optimize", model)} if model else {}))
    evaluated(store, "unknown", "9", [0.5, 0.5], x=9)
    (line,) = (line for line in make_leaderboard(open_catalog(store))[1] if "ranker" in line)
    assert line.partition(": ")[2] == (
        "r0, r1 by pointwise of /models/rm; r2, r3 by pairwise of my_ranker; r4 by pattern (regex: [0-9]); "
        "r5 by pattern (regex: yes); r6 by correct (file: 666666666666); r7 by correct (file: 777777777777)"
    )
    assert not any("ranker" in line for line in make_leaderboard(open_catalog(store, ["r0", "r1", "unknown"]))[1])


def test_runs_whose_wins_are_against_another_policy_are_named(tmp_path: Path):
    """Draws of one policy, or of two that differ in a seed, are one opponent; what a plan does not know is none."""
    store = Store(tmp_path / "store")
    put(store, "model", "90", [], identity={"version": 1, "options": {}, "inputs": {}}, sources={"path": "/models/sft"})
    for seed in range(2):
        trained = {"version": 1, "options": {"seed": seed}, "inputs": {"i": "x"}}
        put(store, "optimize", f"9{seed + 1}", [], identity=trained)
    for n, policy in enumerate(("90", "90", "91", "92")):
        drawing = {"version": 1, "options": {"n": n}, "inputs": {"policy": policy}}
        put(store, "sample", f"7{n}", [], identity=drawing)
        evaluated(store, f"r{n}", f"{n}", [0.5, 0.5], baseline=f"7{n}", x=n)
        links = {name: tuple(step.values()) for name, step in store.run(f"r{n}").items()}
        link(store, f"r{n}", **links, sft=("model" if policy == "90" else "optimize", policy))
    evaluated(store, "unknown", "9", [0.5, 0.5], x=9)
    (line,) = (line for line in make_leaderboard(open_catalog(store))[1] if "against" in line)
    assert line.endswith("no order follows: r0, r1 against /models/sft; r2, r3 against sft")
    assert not any("against" in line for line in make_leaderboard(open_catalog(store, ["r0", "r1", "unknown"]))[1])


def test_a_method_is_named_as_its_runs_are_without_their_seeds(tmp_path: Path):
    """In brackets of --set too, after the round; where two methods have one name, its first run is added."""
    store = Store(tmp_path / "store")
    names = {
        "rso beta=0.1 optimize.seed={} sample.seed=3": "rso beta=0.1",
        "rso[n=16,seed={}]": "rso[n=16]",
        "rso[seed={}] beta=2": "rso beta=2",
        "dpo seed={}": "dpo",
        "mine-{}": "mine-0",
    }
    for n, pattern in enumerate(names):
        for seed in range(2):
            evaluated(store, pattern.format(seed), f"{n}{seed}", [0.5, 0.6], seed, x=n)
    assert {method.name for method in methods_of(open_catalog(store))} == set(names.values())
    evaluated(store, "dpo", "99", [0.5, 0.6], x=99)
    assert "dpo (dpo seed=0 and 1 more)" in {method.name for method in methods_of(open_catalog(store))}


def test_the_report_has_methods_and_the_statement(store: Store, tmp_path: Path):
    write_report(store, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Methods with several seeds" in page
    assert "lower: low x=1" in page

"""`winnow diagnose` on candidates of another system with known answers, and on those of a small run with a ranker."""

import json
import shutil
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
import pytest

from jobs.diagnosis.cached import read_cached
from jobs.diagnosis.page import write_page
from jobs.diagnosis.sections import make_diagnosis
from jobs.recipes import plan_with_gold
from pipeline.config.plan import make_plan
from pipeline.config.recipe import load_recipe
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.store.store import Store
from schemas.tables import REWARDS
from tests.conftest import write_jsonl
from tests.jobs.test_report import CHROMIUM, assert_fits
from tests.runs import RECIPES, Silent, plan_of

PROMPTS, N, K = 60, 16, 4
COLUMNS = ("reward", "hacked", "label")
PROGRAM = """
def graded(prompt, response):
    return float(response.split()[1])
"""


def rows():
    """Return 16 responses to each of 60 prompts: gold N(0, 1), a reward with noise; longer ones have more reward.

    hacked: the same reward, but the worst of each prompt has the highest. label: whether gold is above 1.
    """
    rng = np.random.default_rng(0)
    result = []
    for g in range(PROMPTS):
        golds = rng.normal(size=N).round(4)
        longer = rng.integers(0, 6, N)
        rewards = golds + 0.5 * rng.normal(size=N) + 0.3 * longer
        for i, (gold, words, reward) in enumerate(zip(golds.tolist(), longer, rewards, strict=True)):
            text = f"gold {gold} number {i}" + " more" * int(words)
            hacked = 9.0 if gold == golds.min() else reward
            numbers = dict(reward=reward, hacked=hacked, label=float(gold > 1), gold=gold, words=int(words))
            result.append(dict(prompt=f"prompt {g}", response=text) | numbers)
    return result


ROWS = rows()


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A folder with a store in which the candidates were read once per column of rewards, and a config for each."""
    folder = tmp_path_factory.mktemp("world")
    write_jsonl(folder / "candidates.jsonl", ROWS)
    (folder / "gold.py").write_text(PROGRAM)
    for column in COLUMNS:
        lines = [
            "shards: 2",
            f"sft: {{with: {{path: {tiny.folder}}}}}",
            f"own_candidates: {{with: {{path: ./candidates.jsonl, reward: {column}, max_tokens: 100}}}}",
            f"select: {{with: {{rule: {{name: rejection_sample, k: {K}, beta: 1.0}}}}}}",
        ]
        (folder / f"{column}-blind.yaml").write_text("\n".join(lines))
        lines.append("evaluate: {with: {gold: {name: python, file: ./gold.py, function: graded}}}")
        (folder / f"{column}.yaml").write_text("\n".join(lines))
        recipe = load_recipe(
            RECIPES / "own_candidates.yaml",
            (folder / f"{column}.yaml",),
            ("target=own_candidates",),
            column,
            (RECIPES,),
        )
        run(make_plan(recipe), Store(folder / "store"), LocalExecutor(), Silent())
    return folder


def diagnosis(world, column="reward", *sets, gold=True, limit=None, extra=()):
    """Return the diagnosis of the candidates by one column of rewards."""
    config = world / (f"{column}.yaml" if gold else f"{column}-blind.yaml")
    plan, program = plan_with_gold("own_candidates", [config], list(sets))
    return make_diagnosis(read_cached(plan, Store(world / "store"), program, None, limit), plan.name, list(extra))


@pytest.fixture
def words(world):
    """Arguments of `diagnose` for these candidates, their rewards and gold."""
    options = ("--config", world / "reward.yaml", "--plugin", world / "gold.py", "--store", world / "store")
    return ("own_candidates", *options)


@pytest.fixture(scope="module")
def known(world):
    return diagnosis(world)


def table(found, section, key):
    return {row[key]: row for row in found.sections[section].rows}


# What rules keep


def test_the_order_of_rules_is_that_of_the_gold_of_what_select_keeps(known, world, winnow):
    """Measured, and predicted from the ranks and other prompts' gold, of rules that a run then applies."""
    store, config = world / "store", world / "reward.yaml"
    rules = {
        f"best_of k={K}": f"{{name: best_of, k: {K}}}",
        "best_of k=1": "{name: best_of, k: 1}",
        f"rejection_sample k={K}, beta=1.0": f"{{name: rejection_sample, k: {K}, beta: 1.0}}",
        f"plain k={K}": f"{{name: plain, k: {K}}}",
        "advantage_weights beta=1.0": "{name: advantage_weights, beta: 1.0}",
    }
    kept = {}
    for label, rule in rules.items():
        words = ("own_candidates", "--config", config, "--store", store, "--set", f"select.rule={rule}")
        name = label.split()[0] + label[-1]
        code, text = winnow("run", *words, "--plugin", world / "gold.py", "--set", "target=select", "--name", name)
        assert code == 0, text
        sql = (
            "SELECT avg(gold) AS gold FROM ("
            "SELECT sum(weight * split_part(text, ' ', 2)::DOUBLE) / sum(weight) AS gold "
            "FROM selections JOIN candidates USING (candidate_id) GROUP BY selections.prompt_id)"
        )
        code, text = winnow("sql", sql, "--store", store, "--run", name, "--format", "json")
        kept[label] = json.loads(text)["gold"]
    found = table(known, "rules", "rule")
    order = sorted(kept, key=lambda label: -kept[label])
    assert sorted(kept, key=lambda label: -found[label]["gold"]) == order
    assert sorted(kept, key=lambda label: -found[label]["predicted"]) == order
    for label, gold in kept.items():
        assert found[label]["gold low"] - 0.1 <= gold <= found[label]["gold high"] + 0.1


def test_the_rows_say_what_a_rule_keeps(known):
    found = table(known, "rules", "rule")
    best, top, plain = (found[label] for label in ("best_of k=1", f"best_of k={K}", f"plain k={K}"))
    golds = np.array([row["gold"] for row in ROWS]).reshape(PROMPTS, N)
    rewards = np.array([row["reward"] for row in ROWS]).reshape(PROMPTS, N)
    order = np.argsort(-rewards, axis=1)
    assert best["gold"] == pytest.approx(np.take_along_axis(golds, order[:, :1], 1).mean())
    assert top["reward"] == pytest.approx(np.take_along_axis(rewards, order[:, :K], 1).mean())
    assert (best["nats"], top["nats"]) == (pytest.approx(np.log(N)), pytest.approx(np.log(N / K)))
    assert (best["ess"], top["ess"]) == (pytest.approx(1), pytest.approx(K))
    assert plain["gold"] == pytest.approx(golds.mean(), abs=0.05)
    assert plain["nats"] < 0.03
    assert best["right %"] is None  # one candidate is no pair
    assert plain["right %"] > top["right %"]


def test_further_rules_are_compared_on_request(words, winnow):
    code, text = winnow("diagnose", *words, "--rule", "{name: best_of, k: 3}", "--format", "csv")
    assert code == 0, text
    assert "rules,best_of k=3,gold," in text
    code, text = winnow("diagnose", *words, "--rule", "{name: best_off}")
    assert code == 2
    assert "--rule {name: best_off}" in text
    assert "best_of" in text
    code, text = winnow("diagnose", *words, "--rule", "{name: rejection_sample}")
    assert code == 2
    assert "rule.beta" in text


# Tilt


def test_a_beta_beyond_the_candidates_is_said_to_be_top_k(world):
    """With the nats that are asked, those that k of n can realise, and the beta from which it is one."""
    found = diagnosis(world, "reward", "select.rule.beta=0.02")
    row = table(found, "tilt", "beta")[0.02]
    assert row["top k %"] > 95
    assert row["asked"] > found.limit == pytest.approx(np.log(N / K))
    (text,) = (text for text in found.findings if "acts as top-k" in text)
    assert f"beta 0.02 asks for {row['asked']:.2g} nats" in text
    assert f"log({N} / {K}) = 1.4" in text
    edge = table(found, "tilt", "beta")[found.edge]
    assert edge["of n"] == pytest.approx(found.limit, rel=0.15)


def test_a_beta_without_effect_is_said_to_be_plain(world):
    found = diagnosis(world, "reward", "select.rule.beta=50.0")
    assert any("is what plain would keep" in text for text in found.findings)


def test_k_of_all_candidates_is_said_to_choose_nothing(world):
    found = diagnosis(world, "reward", f"select.rule.k={N}")
    assert any("keeps all of them, whatever their rewards" in text for text in found.findings)


def test_the_achieved_tilt_follows_the_asked_one_where_it_can(known):
    """Rising from a high beta to a low one, and never beyond log(n / k)."""
    rows = known.sections["tilt"].rows
    kept = [row["kept"] for row in rows]
    assert kept == sorted(kept, reverse=True)
    assert max(kept) == pytest.approx(np.log(N / K))
    assert rows[0]["asked"] is None  # at beta 0 no number of candidates shows it
    warm = rows[-1]
    assert warm["kept"] == pytest.approx(warm["asked"], rel=0.3)


# Best of n


def test_best_of_n_is_that_of_the_shipped_query(known, world, winnow):
    code, text = winnow("sql", "best_of", "--store", world / "store", "--run", "reward", "--format", "json")
    assert code == 0, text
    by_query = {row["n"]: row["best"] for row in map(json.loads, text.splitlines())}
    found = table(known, "best-of", "n")
    assert {n: row["reward"] for n, row in found.items()} == pytest.approx(by_query)
    assert found[1]["gold"] == pytest.approx(np.mean([row["gold"] for row in ROWS]))


def test_a_ranker_that_is_exploited_is_said_to_be(world, known):
    """The gold of the best of n falls where the worst response has the highest reward."""
    found = diagnosis(world, "hacked")
    golds = [row["gold"] for row in found.sections["best-of"].rows]
    assert golds.index(max(golds)) < len(golds) - 1
    assert any("the ranker is exploited" in text for text in found.findings)
    assert not any("the ranker is exploited" in text for text in known.findings)
    rules = table(found, "rules", "rule")
    assert rules["best_of k=1"]["gold"] == min(row["gold"] for row in rules.values())


# Agreement and length


def test_agreement_and_length_are_those_of_the_data(known, world, winnow):
    golds, rewards = (np.array([row[name] for row in ROWS]).reshape(PROMPTS, N) for name in ("gold", "reward"))
    i, j = np.triu_indices(N, 1)
    gold, reward = golds[:, i] - golds[:, j], rewards[:, i] - rewards[:, j]
    alike = (gold * reward > 0).sum() / (gold != 0).sum()  # no two rewards are equal
    row = table(known, "agreement", "against")["gold"]
    assert row["alike %"] == pytest.approx(100 * alike)
    assert row["pairs"] == (gold != 0).sum()
    assert row[f"in best_of k={K}: %"] < row["alike %"]
    sql = winnow("sql", "reward_by_length", "--store", world / "store", "--run", "reward", "--format", "json")[1]
    length = table(known, "length", "length and")
    assert length["reward"]["correlation"] == pytest.approx(json.loads(sql)["within_prompts"])
    assert length["reward"]["correlation low"] > length["gold"]["correlation high"]
    assert any("prefers length more than gold does" in text for text in known.findings)


def test_labels_are_said_to_be_labels(world):
    found = diagnosis(world, "label")
    assert any("The rewards are labels" in text for text in found.findings)
    wrong = np.mean([not any(row["label"] for row in ROWS[g * N : (g + 1) * N]) for g in range(PROMPTS)])
    assert any(f"In {100 * wrong:.3g} % of the prompts all rewards are equal" in text for text in found.findings)
    assert table(found, "rules", "rule")["best_of k=1"]["prompts"] == round(PROMPTS * (1 - wrong))


def test_without_gold_it_is_said_what_cannot_be_said(world):
    found = diagnosis(world, gold=False)
    (text,) = (text for text in found.findings if text.startswith("No gold reward was read"))
    assert "evaluate" in text
    assert not any("gold" in name for section in found.sections.values() for row in section.rows for name in row)
    assert "agreement" not in found.sections  # with no gold, no orders and no other baseline there is none
    rewards = [row["reward"] for row in found.sections["rules"].rows]
    assert rewards == sorted(rewards, reverse=True)


def test_fewer_prompts_are_read_on_request(world):
    found = diagnosis(world, limit=7)
    assert f"{7 * N} of 7 prompts" in found.facts["candidates"]


# With a ranker that compares


@pytest.fixture(scope="module")
def compared(data_dir, finished, tmp_path_factory):
    """The diagnosis of a small run of RSO, before and after its rewards were computed against other baselines."""
    root = tmp_path_factory.mktemp("compared") / "store"
    shutil.copytree(finished, root)
    plan = plan_of(data_dir)
    found = []
    for seed in (0, 1):
        if seed:
            again = plan_of(data_dir, "reward.seed=1", "target=reward")
            again.name = "again"
            run(again, Store(root), LocalExecutor(), Silent())
        program = next(step.options["gold"] for step in plan.steps if step.stage == "evaluate")
        cached = read_cached(plan, Store(root), (program, False), None, None)
        found.append((cached, make_diagnosis(cached, "rso", [])))
    return found


def test_both_orders_of_reading_are_compared(compared):
    """Of all pairs, by one order against the other; of kept ones, of what the first order alone selects."""
    cached, found = compared[0]
    row = table(found, "agreement", "against")["the other order"]
    first, second = cached.orders
    alike = total = 0.0
    starts = cached.groups.starts
    for start, end in pairwise(starts):
        for i in range(start, end):
            for j in range(start, i):
                a, b = first[i] - first[j], second[i] - second[j]
                total += b != 0
                alike += (b != 0) * (0.5 if a == 0 else float(a * b > 0))
    assert row["alike %"] == pytest.approx(100 * alike / total)
    assert any(text.startswith("Both orders of reading agree on") for text in found.findings)
    assert any("% of its verdicts change with the order of reading" in text for text in found.findings)


def test_direct_comparisons_are_compared_as_by_the_shipped_query(compared, data_dir, finished, winnow):
    _, found = compared[0]
    text = winnow("sql", "ranker_agreement", "--store", finished, "--format", "json")[1]
    rows = [json.loads(line) for line in text.splitlines()]
    row = table(found, "agreement", "against")["direct comparisons"]
    agree = sum(row["comparisons"] * row["agree"] for row in rows)
    assert row["alike %"] / 100 * row["pairs"] == pytest.approx(agree)


def test_other_baselines_are_compared_where_the_store_has_them(compared):
    (_, before), (cached, after) = compared
    advice = "--set reward.seed=1 --until reward"
    assert any(advice in text for text in before.findings)
    assert not any(advice in text for text in after.findings)
    name = "another baseline (reward.seed=1)"
    assert name not in table(before, "agreement", "against")
    assert 0 < table(after, "agreement", "against")[name]["alike %"] <= 100
    assert np.isfinite(cached.repeats[name]).all()


# The command


def test_the_command_prints_tables_of_80_columns_and_findings(words, winnow):
    code, text = winnow("diagnose", *words, "--to", "page.html")
    assert code == 0, text
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    for title in (
        "What rules keep",
        "Asked and achieved tilt",
        "Best of n",
        "Agreement of the ranker's order",
        "Length",
    ):
        assert title in lines
    assert any(line.startswith("- Order of the rules by gold") for line in lines)
    assert any(line.startswith("wrote page.html") for line in lines)


def test_all_numbers_are_written_as_rows(words, known, winnow, tmp_path):
    code, text = winnow("diagnose", *words, "--out", "numbers.jsonl")
    assert code == 0, text
    written = [json.loads(line) for line in (tmp_path / "numbers.jsonl").read_text().splitlines()]
    values = {(row["section"], row["item"], row["measure"]): row for row in written}
    row = table(known, "rules", "rule")["best_of k=1"]
    cells = values["rules", "best_of k=1", "gold"]
    assert (cells["value"], cells["low"], cells["high"]) == pytest.approx(
        (row["gold"], row["gold low"], row["gold high"])
    )
    assert [row["item"] for row in written if row["section"] == "findings"] == known.findings


def test_what_has_not_run_is_named_with_the_command_that_runs_it(words, winnow):
    code, text = winnow("diagnose", *words, "--set", "own_candidates.max_tokens=90")
    assert code == 2
    assert "step own_candidates" in text
    assert "--until own_candidates" in text


def test_recipes_that_select_nothing_are_refused(data_dir, finished, winnow):
    code, text = winnow("diagnose", "dpo", "--config", data_dir / "demo.yaml", "--store", finished)
    assert code == 2
    assert "dpo" in text
    assert "rso" in text


def test_rounds_are_those_of_the_recipe(data_dir, finished, winnow):
    words = ("diagnose", "rso", "--config", data_dir / "demo.yaml", "--store", finished)
    code, text = winnow(*words, "--round", "2")
    assert code == 2
    assert "no rounds" in text


def test_gold_that_reads_columns_needs_prompts_that_keep_them(world, winnow):
    program = world / "fields.py"
    program.write_text("def graded(prompt, response, fields):\n    return float(fields['gold'])\n")
    gold = f"evaluate.gold={{name: python, file: {program}, function: graded}}"
    words = ("own_candidates", "--config", world / "reward-blind.yaml", "--set", gold, "--plugin", program)
    code, text = winnow("diagnose", *words, "--store", world / "store")
    assert code == 2
    assert "which the prompts do not keep" in text


def test_the_same_candidates_give_the_same_page(known, world, tmp_path):
    date = datetime(2026, 1, 2, tzinfo=UTC)
    for name, found in (("a", known), ("b", diagnosis(world))):
        write_page(found, tmp_path / name, date)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    page = (tmp_path / "a").read_text()
    assert page.count("<svg") == page.count("<table>") == 5


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_fits_phones_and_screens_in_light_and_dark(known, tmp_path):
    write_page(known, tmp_path / "page.html")
    assert_fits(tmp_path / "page.html")


def test_rewards_of_the_table_keep_their_order(world):
    """Rows are by prompt and candidate id, as `select` sorts them."""
    plan, program = plan_with_gold("own_candidates", [world / "reward.yaml"], [])
    cached = read_cached(plan, Store(world / "store"), program, None, None)
    names = list(zip(*(cached.rewards[name].to_pylist() for name in ("prompt_id", "candidate_id")), strict=True))
    assert names == sorted(names)
    assert cached.rewards.column_names == REWARDS.names

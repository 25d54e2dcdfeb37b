"""Judges of a config: steps and win rates of their own, opponents, what changes what, blind sheets, what is refused."""

import csv
import io
import re
import shutil
from pathlib import Path

import pytest
import yaml

from jobs import queries
from jobs.blind import export_blind
from jobs.opponents import find_opponents
from jobs.recipes import FOLDER, plan_named
from jobs.report import write_report
from jobs.runs import with_free_names
from pipeline.config.estimates import step_costs
from pipeline.config.plan import Plan, Step, make_plan
from pipeline.config.recipe import load_recipe, merged
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.resources import Profile
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from schemas import WinnowError
from tests.readmes import ROOT
from tests.runs import Silent
from tests.stages.ranking.test_reward_models import headed

JUDGES = """
judges:
  proxy:   {against: [sft, target]}
  gold:    {ranker: {use: brevity, with: {words: 9}}, against: [sft, target]}
  polite:  {ranker: {use: pattern, with: {regex: "Gladly"}}}
evaluate: {with: {gold: null}}
"""
GOLD_STEPS = ["judge_by_gold", "judge_by_gold_vs_target", "evaluate_by_gold", "evaluate_by_gold_vs_target"]


def planned(data_dir: Path, text: str, folder: Path, *sets: str, name: str = "judged") -> Plan:
    """Return the plan of RSO on the tiny data set with this config above its own."""
    config = folder / "judges.yaml"
    config.write_text(text)
    return plan_named("rso", [data_dir / "demo.yaml", config], list(sets), name)


def made(plan: Plan, store: Store) -> list[str]:
    """Run the plan, and return the steps that ran."""
    with_free_names([plan], store)
    reporter = Silent()
    run(plan, store, LocalExecutor(), reporter)
    return reporter.ran


@pytest.fixture(scope="module")
def judged(data_dir: Path, finished: Path, tmp_path_factory) -> tuple[Store, list[str]]:
    """A store with RSO finished before, and then judged; and the steps that this ran."""
    folder = tmp_path_factory.mktemp("judged")
    store = Store(shutil.copytree(finished, folder / "store"))
    return store, made(planned(data_dir, JUDGES, folder), store)


def answers(store: Store, name: str, **values: str) -> list[dict]:
    rows = query(open_catalog(store), queries.text(name)).to_pylist()
    return [row for row in rows if values.items() <= row.items()]


def test_draws_of_another_run_that_no_step_compares_are_refused(data_dir: Path, finished: Path, tmp_path: Path):
    steps = "other: {use: other_run, with: {run: run}}\njudge: {from: {candidates: other}}\n"
    with pytest.raises(WinnowError, match=r"judged: other: no step reads it as its baseline.*against: run"):
        find_opponents([planned(data_dir, steps, tmp_path)], Store(finished))


def test_a_blind_sheet_of_prompts_that_are_gone_is_refused(judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    manifests = [manifest for manifest in judged[0].sealed() if manifest["stage"] != "prompts"]
    monkeypatch.setattr(Store, "sealed", lambda store: manifests)
    with pytest.raises(WinnowError, match=r"run judged: the prompts of its responses .* run it again"):
        export_blind(judged[0], "judged", tmp_path / "sheet.csv", "sft", 4, None)


# Win rates by name


def test_judges_stand_beside_each_other_with_their_names(judged):
    """Each against its opponents, with an interval, on all nine held-out prompts; the proxy is that of `evaluate`."""
    store, _ = judged
    rows = {(row["judge"], row["against"]): row for row in answers(store, "judges", run="judged")}
    assert set(rows) == {(judge, side) for judge in ("proxy", "gold") for side in ("sft", "target")} | {
        ("polite", "sft")
    }
    for row in rows.values():
        assert row["win_low"] <= row["win"] <= row["win_high"]
        assert (row["prompts"], row["undecided"], row["unread"]) == (9, 0, 0)
    assert {side: rows["gold", side]["comparisons"] for side in ("sft", "target")} == {"sft": 36, "target": 18}
    assert rows["polite", "sft"]["ties"] == 34, "texts that both say Gladly, or both do not"


def test_a_win_rate_is_the_share_of_wins_averaged_over_prompts(judged):
    """By the lengths of the texts themselves: nearer to nine words wins, equally near is one half."""
    store, _ = judged
    sql = """
    SELECT avg(win) AS win FROM (SELECT prompt_id, avg((ours < theirs)::INT + 0.5 * (ours = theirs)::INT) AS win
        FROM (SELECT a.prompt_id, abs(len(string_split_regex(trim(a.text), '\\s+')) - 9) AS ours,
                abs(len(string_split_regex(trim(b.text), '\\s+')) - 9) AS theirs
            FROM candidates AS a JOIN candidates AS b USING (prompt_id)
            WHERE a.key = (SELECT any_value(key) FROM runs WHERE step = 'eval_sample' AND run = 'judged')
                AND b.key = (SELECT any_value(key) FROM runs WHERE step = '{baseline}' AND run = 'judged'))
        GROUP BY prompt_id)"""
    for side, baseline in (("sft", "eval_baseline"), ("target", "targets")):
        expected = query(open_catalog(store), sql.format(baseline=baseline))["win"].to_pylist()[0]
        (row,) = answers(store, "judges", run="judged", judge="gold", against=side)
        assert row["win"] == pytest.approx(float(expected)), side


def test_nothing_that_was_there_is_computed_again(judged):
    """Neither draws, nor what the proxy said of them; `evaluate` alone, whose gold reward is another."""
    _, ran = judged
    assert sorted(ran) == sorted([
        "evaluate", "targets", "judge_by_polite", "evaluate_by_polite", "judge_by_proxy_vs_target",
        "evaluate_by_proxy_vs_target", *GOLD_STEPS,
    ])  # fmt: skip


def test_a_change_of_one_judge_computes_its_steps_alone(judged, data_dir: Path, tmp_path: Path):
    store = Store(shutil.copytree(judged[0].root, tmp_path / "store"))
    changed = planned(data_dir, JUDGES.replace("words: 9", "words: 4"), tmp_path, name="changed")
    assert sorted(made(changed, store)) == sorted(GOLD_STEPS)


def test_a_config_without_judges_has_the_keys_that_it_had(data_dir: Path, finished: Path, tmp_path: Path):
    """Judges add steps and change none: every key of the finished run is in the plan with and without them."""
    before = {step: link["key"] for step, link in Store(finished).run("run").items()}
    judges = "judges: {words: {ranker: {use: brevity, with: {words: 9}}}, proxy: {against: [sft, target]}}"
    plain, judging = (
        {step.name: step.key for step in planned(data_dir, text, tmp_path).steps} for text in ("{}", judges)
    )
    assert plain == before
    assert before.items() <= judging.items()


def test_the_leaderboard_has_a_gold_win_by_the_judge_of_that_name(judged):
    """Where `evaluate` has no gold reward; every other column is that of `evaluate`."""
    store, _ = judged
    (row,) = answers(store, "leaderboard", run="judged")
    (judge,) = answers(store, "judges", run="judged", judge="gold", against="sft")
    assert (row["gold_win"], row["gold_win_low"]) == (judge["win"], judge["win_low"])
    assert row["proxy_win"] == answers(store, "leaderboard", run="run")[0]["proxy_win"]


def test_commands_and_the_report_show_judges_where_there_are_any(judged, finished: Path, winnow, tmp_path: Path):
    text = winnow("leaderboard", "--store", judged[0].root)[1]
    assert all(word in text for word in ("polite", "target", "undecided"))
    assert "undecided" not in winnow("leaderboard", "--store", finished)[1]
    write_report(judged[0], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h3>Judges</h3>" in page
    assert "polite win" in page, "of the plot"


@pytest.mark.filterwarnings("ignore:judge. more than 10 %")
def test_a_reward_model_of_a_config_judges_by_its_score(judged, tiny, data_dir: Path, tmp_path: Path):
    """A sequence classifier needs no more than its folder; the metric has the judge's name."""
    folder = headed(tiny, tmp_path / "head").folder
    config = f"judges: {{scorer: {{ranker: {{use: model, with: {{path: {folder}}}}}}}}}"
    plan = planned(data_dir, config, tmp_path, name="scored")
    assert next(step.options["by"].name for step in plan.steps if step.name == "judge_by_scorer") == "pointwise"
    store = Store(shutil.copytree(judged[0].root, tmp_path / "store"))
    assert sorted(made(plan, store)) == ["evaluate_by_scorer", "judge_by_scorer", "ranker_of_scorer"]
    (row,) = answers(store, "judges", judge="scorer")
    assert (row["prompts"], row["undecided"]) == (9, 0)


def test_a_language_model_of_a_config_votes_and_sql_sees_its_answers(judged, data_dir: Path, tmp_path: Path):
    """An untrained one: every answer is in the table, most cannot be read, and those comparisons are undecided."""
    config = """
    judges:
      sxs:
        use: autosxs
        ranker: sft
        with: {template: "{prompt:.0}{a:.20} or {b:.20}?", votes: 2, matches: same_k, max_without_verdict: 1.0,
               by: {name: local_voter, engine: transformers, max_tokens: 4}}
    """
    store = Store(shutil.copytree(judged[0].root, tmp_path / "store"))
    assert made(planned(data_dir, config, tmp_path, name="voted"), store) == ["judge_by_sxs", "evaluate_by_sxs"]
    (row,) = answers(store, "judges", judge="sxs")
    assert (row["comparisons"], row["unread"]) == (18, 0)
    asked = 18 - row["ties"]
    votes = answers(store, "votes", judged_by="judge_by_sxs")
    assert {(vote["shown_first"], vote["votes"] >= asked) for vote in votes} == {
        ("candidate", True),
        ("baseline", True),
    }
    (found,) = query(
        open_catalog(store), "SELECT count(*) AS n, count(DISTINCT voter) AS voters FROM votes"
    ).to_pylist()
    assert found == {"n": sum(vote["votes"] for vote in votes), "voters": 2}


def test_judges_are_of_every_round(data_dir: Path, tmp_path: Path):
    (tmp_path / "judges.yaml").write_text(JUDGES)
    plan = plan_named("raft", [data_dir / "demo.yaml", tmp_path / "judges.yaml"], [])
    names = {step.name for step in plan.steps}
    assert {f"evaluate_by_{judge}@{n}" for judge in ("gold", "polite") for n in (1, 2)} <= names


# Held-out prompts in a file of their own


def block_of_the_page() -> str:
    """Return the lines of the recipes' page for held-out prompts in a file of their own."""
    page = (ROOT / "jobs/recipes/README.md").read_text()
    (block,) = (block for block in re.findall(r"```yaml\n(.*?)```", page, re.S) if "./test.jsonl" in block)
    return block


@pytest.fixture
def own_heldout(data_dir: Path, tmp_path: Path) -> str:
    """The block of the page, with nine prompts in its file that are not in the file to train on."""
    shutil.copy(data_dir / "prompts.jsonl", tmp_path)
    lines = (data_dir / "prompts.jsonl").read_text().splitlines()[:9]
    (tmp_path / "test.jsonl").write_text("".join(line.replace("Thank you.", "Please.") + "\n" for line in lines))
    return block_of_the_page()


def prompts_read(step: Step) -> set[str]:
    """Return the steps of stage `prompts` behind the tables that a step reads."""
    tables = [step.inputs[item.name] for item in step.signature.inputs if item.schema and item.name in step.inputs]
    return {name for table in tables for name in ([table.name] if table.stage == "prompts" else prompts_read(table))}


def test_judges_of_each_kind_read_the_prompts_that_step_judge_reads(own_heldout: str, data_dir: Path, tmp_path: Path):
    """With the block of the page, against each opponent; the draws as well, where a config sets others."""
    (tmp_path / "sheet.csv").write_text("id,rating\nx,1\n")
    (tmp_path / "sheet.key.csv").write_text("id,prompt_id,candidate_id,baseline_id,candidate_is\nx,p,c,b,1\n")
    judges = """
judges:
  proxy:  {against: [sft, target]}
  words:  {ranker: {use: brevity, with: {words: 9}}, against: [sft, target, other]}
  sxs:    {use: autosxs, ranker: sft, against: [sft, target]}
  people: {use: ratings, with: {sheets: [./sheet.csv], key: ./sheet.key.csv}}
"""
    plan = planned(data_dir, own_heldout + judges, tmp_path)
    steps = [step for step in plan.steps if re.match("(judge|evaluate)_by_", step.name)]
    assert len(steps) == 14
    heldout = plan.target.inputs["prompts"]
    for step in steps:
        if step.stage != "ratings":
            assert prompts_read(step) == {heldout.name}, step.name
    drawn = "twice: {like: eval_sample, with: {seed: 9}}\njudge: {from: {candidates: twice}}\n"
    plan = planned(data_dir, judges + drawn, tmp_path)
    draws = {step.inputs["candidates"].name for step in plan.steps if re.match("(judge|evaluate)_by_", step.name)}
    assert draws == {"twice"}


def test_a_judge_runs_on_held_out_prompts_in_a_file_of_their_own(
    own_heldout: str, judged, data_dir: Path, tmp_path: Path
):
    config = own_heldout + "judges: {words: {ranker: {use: brevity, with: {words: 9}}, against: [sft, target]}}"
    store = Store(shutil.copytree(judged[0].root, tmp_path / "store"))
    made(planned(data_dir, config, tmp_path, name="apart"), store)
    assert [row["prompts"] for row in answers(store, "judges", run="apart", judge="words")] == [9, 9]


def test_held_out_prompts_of_a_file_leave_validation_on_the_prompts_to_train_on(
    own_heldout: str, data_dir: Path, tmp_path: Path
):
    """What the policy is compared with during training is of a split of those, though it is like an evaluation's."""
    config = own_heldout.replace("heldout: 0.0", "heldout: 0.0, validation: 0.2") + (
        "optimize: {from: {prompts: prompts, baseline: validation_baseline, ranker: ranker}, with: {evaluate_every: 2}}"
    )
    plan = planned(data_dir, config, tmp_path)
    assert next(step.inputs["prompts"].name for step in plan.steps if step.name == "validation_baseline") == "prompts"


def test_a_recipe_of_one_file_plans_what_its_configs_planned(own_heldout: str, data_dir: Path, tmp_path: Path):
    """As a submission sends it: what a step's name and `judges` add lies below that file, and is in it."""
    (tmp_path / "own.yaml").write_text(
        own_heldout + "judges: {proxy: {ranker: {use: pattern, with: {regex: x}}, against: [sft, target]}}\n"
    )
    configs = (data_dir / "demo.yaml", tmp_path / "own.yaml")
    plan = make_plan(load_recipe(FOLDER / "rso.yaml", configs, (), "one", (FOLDER,)))
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(merged(FOLDER / "rso.yaml", configs, (FOLDER,))))
    alone = make_plan(load_recipe(tmp_path / "one.yaml", (), (), "one", (FOLDER,)))
    assert {step.name: step.key for step in alone.steps} == {step.name: step.key for step in plan.steps}


def test_inputs_of_different_prompts_are_refused_when_the_plan_is_made(
    own_heldout: str, data_dir: Path, tmp_path: Path
):
    """By the step's name, with the line to write: a run sees it after the training. One file is one origin."""
    config = own_heldout + "judges: {words: {ranker: {use: brevity, with: {words: 9}}}}\n"
    said = r"judge_by_words\.from: .*prompts \(prompts\): prompts; candidates \(eval_sample\), .*: heldout_prompts"
    with pytest.raises(WinnowError, match=said) as caught:
        planned(data_dir, config + "judge_by_words: {from: {prompts: prompts}}", tmp_path)
    (problem,) = caught.value.problems
    assert "write `judge_by_words: {from: {prompts: heldout_prompts}}`, or `eval_sample: {from" in problem
    with pytest.raises(WinnowError, match=r"evaluate_by_words\.from: .*let all of them come from one step of prompts"):
        planned(data_dir, config + "other: {like: eval_baseline, with: {seed: 4}, from: {prompts: prompts}}\n"
                "evaluate_by_words: {from: {baseline: other}}", tmp_path)  # fmt: skip
    again = "again: {like: prompts, with: {keep: [demonstration]}}\njudge: {from: {prompts: again}}"
    assert planned(data_dir, again, tmp_path).target.name == "evaluate"


# Another run


def test_a_run_is_compared_with_the_draws_of_another(judged, data_dir: Path, tmp_path: Path):
    """Nothing of that run is drawn again, and draws with one seed do not meet."""
    store = Store(shutil.copytree(judged[0].root, tmp_path / "store"))
    config = "judges: {words: {ranker: {use: brevity, with: {words: 9}}, against: [run, judged]}}"
    plan = planned(data_dir, config, tmp_path, "eval_sample.seed=7")
    find_opponents([plan], store)
    costs = {cost.step.name: cost for cost in step_costs(plan, store, Profile(), local=True)}
    assert costs["judge_by_words_vs_run"].work.of("judgements").value == 36, (
        "a plan says at most two draws against each of two, for nine prompts"
    )
    ran = made(plan, store)
    assert "against_run" not in ran
    assert not any("judged" in step for step in ran), "a run is not compared with itself"
    assert any("itself" in note for note in plan.notes)
    links = store.run(plan.name)
    assert links["against_run"]["key"] == store.run("run")["eval_sample"]["key"]
    sql = (
        "SELECT j.k AS k, c.k AS other FROM judgements AS j JOIN candidates AS c ON baseline_id = c.candidate_id "
        f"WHERE j.key = '{links['judge_by_words_vs_run']['key']}' AND c.key = '{links['against_run']['key']}'"
    )
    rows = query(open_catalog(store, plan.name), sql).to_pylist()
    assert len(rows) == 18
    assert all(row["k"] != row["other"] for row in rows)
    assert [row["prompts"] for row in answers(store, "judges", judge="words", against="run")] == [9]


def test_columns_that_prompts_keep_do_not_make_them_others(judged, data_dir: Path, tmp_path: Path):
    config = "judges: {words: {ranker: {use: brevity, with: {words: 9}}, against: run}}"
    plan = planned(data_dir, config, tmp_path, "prompts.keep=[demonstration]", name="with_column")
    with_free_names([plan], judged[0])
    against = next(step for step in plan.steps if step.name == "against_run")
    assert against.key == judged[0].run("run")["eval_sample"]["key"]


@pytest.mark.parametrize(
    ("against", "sets", "said"),
    [
        ("rsso", [], "no run 'rsso'.*run it first"),
        ("run", ["eval_sample.temperature=0.5"], "temperature: 1.0 -> 0.5"),
        ("run", ["prompts.heldout=0.7"], r"prompts\.options\.heldout: 0\.\d+ -> 0.7"),
        ("run@2", [], "has no rounds"),
    ],
)
def test_a_run_that_cannot_be_compared_with_is_refused(judged, data_dir, tmp_path, against, sets, said):
    plan = planned(data_dir, f"judges: {{words: {{ranker: {{use: brevity, with: {{words: 9}}}}, against: {against}}}}}",
                   tmp_path, *sets, name="other")  # fmt: skip
    with pytest.raises(WinnowError, match=said):
        with_free_names([plan], judged[0])


# What a plan refuses


@pytest.mark.parametrize(
    ("judges", "said"),
    [
        ("Gold: {ranker: ranker}", "judges.Gold: .*small letters"),
        ("a_vs_b: {ranker: ranker}", "judges.a_vs_b: "),
        ("gold: {ranker: ranker}", "judges.gold: `evaluate.gold`"),
        ("a: {}", "judges.a: .*set `ranker`"),
        ("a: {rankr: ranker}", r"judges.a.rankr: unknown option; did you mean 'ranker'"),
        ("a: {from: {}}", r"judges.a.from: unknown option; known: against, ranker, use, with$"),
        ("a: {ranker: rankerr}", "judge_by_a.from.ranker: no step 'rankerr'.*'ranker'"),
        ("a: {ranker: prompts}", "judge_by_a.from.ranker: needs a model"),
        ("a: {use: reward, ranker: ranker}", "judges.a.use: stage reward judges nothing"),
        ("a: {use: ratings, ranker: ranker}", "judges.a.ranker: stage ratings asks none"),
        ("proxy: {use: autosxs}", "judges.proxy.use"),
        ("a: {ranker: ranker, against: [sft, sft]}", "judges.a.against: 'sft' is listed 2 times"),
        ("a: {ranker: ranker, against: []}", "judges.a.against: must be sft, target"),
        ("a: {ranker: sft, with: {by: pointwise}}", "judge_by_a: ranker: needs a reward model"),
        ("a: {ranker: ranker, with: {by: {name: hosted_judge, url: 'http://x/v1', model: y}}}", "`ranker` is one"),
        ("a: {use: autosxs, with: {task: poem}}", "judge_by_a.task: must be"),
        ("a: {use: autosxs}", "reads a model, and there is none"),
    ],
)
def test_a_plan_refuses_judges_that_cannot_judge(data_dir: Path, tmp_path: Path, judges: str, said: str):
    with pytest.raises(WinnowError, match=said):
        planned(data_dir, f"judges: {{{judges}}}", tmp_path)


def test_two_opponents_whose_steps_would_have_one_name_are_refused_of_two_judges_too(data_dir: Path, tmp_path: Path):
    """Their draws would be one step's: each judge's win rate of `a-b` would be that against `a.b`."""
    judges = "judges: {one: {ranker: ranker, against: a-b}, two: {ranker: ranker, against: a.b}}"
    with pytest.raises(WinnowError, match=r"judges\.two\.against: 'a\.b' differs from 'a-b' only in signs"):
        planned(data_dir, judges, tmp_path)


def test_a_judge_against_target_texts_needs_them(data_dir: Path, tmp_path: Path):
    text = "judges: {a: {ranker: ranker, against: target}}\nprompts: {with: {demonstration: null}}"
    with pytest.raises(WinnowError, match="targets: demonstrations are read from `prompts`"):
        planned(data_dir, text, tmp_path)


# A blind sheet, and its ratings as a judge


def exported(store: Store, folder: Path, **options) -> tuple[list[dict], dict[str, dict]]:
    """Return the lines of a new sheet, and those of its key by id."""
    export_blind(store, "judged", folder / "sheet.csv", **options)
    lines, key = (
        [*csv.DictReader(io.StringIO((folder / name).read_text(encoding="utf-8-sig"), newline=""))]
        for name in ("sheet.csv", "sheet.key.csv")
    )
    return lines, {row["id"]: row for row in key}


def rate(folder: Path, name: str, lines: list[dict], choose) -> Path:
    """Write a filled sheet: `choose` returns the rating of a line."""
    rows = [{"id": line["id"], "rating": choose(line)} for line in lines]
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "rating"])
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


def judges_of(*sheets: str, against: str = "sft") -> str:
    return (
        f"judges: {{people: {{use: ratings, with: {{sheets: [{', '.join(f'./{name}' for name in sheets)}], "
        f"key: ./sheet.key.csv}}, against: {against}}}}}\nevaluate: {{with: {{gold: null}}}}"
    )


@pytest.mark.parametrize("against", ["sft", "target"])
def test_a_sheet_shows_nothing_of_whose_response_is_whose(judged, tmp_path: Path, against: str):
    """A pair per prompt on shuffled sides, its ids no hash of a table, and the key beside it; the same bytes again."""
    lines, key = exported(judged[0], tmp_path, against=against)
    assert len({line["id"] for line in lines}) == len(lines) == 9
    assert list(lines[0]) == ["id", "prompt", "response 1", "response 2", "rating"]
    assert {row["candidate_is"] for row in key.values()} == {"1", "2"}
    text = (tmp_path / "sheet.csv").read_text()
    assert not any(word in text for word in ("judged", "sft", *(row["candidate_id"] for row in key.values())))
    for line in lines:
        (ours,) = query(open_catalog(judged[0], "judged"), "SELECT any_value(text) AS text FROM candidates WHERE "
                        f"candidate_id = '{key[line['id']]['candidate_id']}'")["text"].to_pylist()  # fmt: skip
        assert line[f"response {key[line['id']]['candidate_is']}"] == ours
    (tmp_path / "again").mkdir()
    export_blind(judged[0], "judged", tmp_path / "again" / "sheet.csv", against=against)
    assert (tmp_path / "again" / "sheet.csv").read_bytes() == (tmp_path / "sheet.csv").read_bytes()
    with pytest.raises(WinnowError, match="exists already"):
        export_blind(judged[0], "judged", tmp_path / "sheet.csv")


def test_ratings_are_a_judge_with_ties_blanks_and_agreement(judged, data_dir: Path, tmp_path: Path):
    """Of nine pairs: rater 1 prefers ours on six, the other's on one, same on one, one blank; rater 2 on seven ours.

    Rater 2 says the other's where rater 1 is blank or says same. So seven of nine are decided for us or halved:
    6 wins, 1 loss where both say so or 1 tie where they differ, and the blank one is rater 2's alone.
    """
    lines, key = exported(judged[0], tmp_path)
    ours = {line["id"]: key[line["id"]]["candidate_is"] for line in lines}
    theirs = {name: str(3 - int(side)) for name, side in ours.items()}
    order = {line["id"]: n for n, line in enumerate(lines)}
    rate(tmp_path, "one.csv", lines, lambda line: {6: theirs[line["id"]], 7: "same", 8: ""}.get(
        order[line["id"]], ours[line["id"]]))  # fmt: skip
    rate(tmp_path, "two.csv", lines, lambda line: ours[line["id"]] if order[line["id"]] < 7 else theirs[line["id"]])
    store = Store(shutil.copytree(judged[0].root, tmp_path / "store"))
    made(planned(data_dir, judges_of("one.csv", "two.csv"), tmp_path, name="people"), store)
    (row,) = answers(store, "judges", judge="people")
    assert row["win"] == pytest.approx((6 + 0.5 + 0 + 0) / 9), "pair 6 is a tie, pairs 7 and 8 are lost"
    assert (row["comparisons"], row["ties"], row["undecided"]) == (9, 1, 0)
    assert row["agreement"] == pytest.approx(6 / 8)
    votes = answers(store, "votes", judged_by="judge_by_people")
    assert sum(row["votes"] for row in votes) == 18
    # One rater alone: the blank pair has no verdict and is counted.
    made(planned(data_dir, judges_of("one.csv"), tmp_path, name="alone"), store)
    row = next(row for row in answers(store, "judges", judge="people") if row["agreement"] is None)
    assert row["win"] == pytest.approx(6.5 / 8)
    assert (row["prompts"], row["ties"], row["undecided"]) == (8, 1, 1)


def test_ratings_that_cannot_be_read_are_refused_with_their_lines(judged, data_dir: Path, tmp_path: Path):
    lines, _ = exported(judged[0], tmp_path)
    (tmp_path / "bad.csv").write_text(
        f"id,rating\n{lines[0]['id']},3\n{lines[1]['id']},1\n{lines[1]['id']},2\nnobody,1\n"
    )
    with pytest.raises(WinnowError) as error:
        planned(data_dir, judges_of("bad.csv"), tmp_path)
    problems = "\n".join(error.value.problems)
    for said in ("bad.csv:2: rating '3'", "bad.csv:4: ", "rated twice", "bad.csv:3", "bad.csv:5: id 'nobody'"):
        assert said in problems
    (tmp_path / "bad.csv").write_text(f"id,rating\n{lines[0]['id']},1\n")
    with pytest.raises(WinnowError, match=r"bad\.csv is listed twice"):  # two raters, who would agree on everything
        planned(data_dir, judges_of("bad.csv", "bad.csv"), tmp_path)
    (tmp_path / "bad.csv").write_text("id,vote\nx,1\n")
    with pytest.raises(WinnowError, match=r"bad\.csv has no column rating"):
        planned(data_dir, judges_of("bad.csv"), tmp_path)


def test_ratings_of_another_runs_responses_are_refused(judged, data_dir: Path, tmp_path: Path):
    """They are not silently no ratings."""
    lines, _ = exported(judged[0], tmp_path)
    rate(tmp_path, "one.csv", lines, lambda line: "1")
    store = Store(shutil.copytree(judged[0].root, tmp_path / "store"))
    with pytest.raises(WinnowError, match="another run's key"):
        made(planned(data_dir, judges_of("one.csv"), tmp_path, "eval_sample.seed=9", name="other"), store)


def test_the_page_for_raters_has_every_pair_and_no_name(judged, tmp_path: Path, winnow):
    out = tmp_path / "page[b].html"
    code, text = winnow("export", "--run", "judged", "--format", "blind-comparison", "--out", out, "--pairs", 4,
                        "--store", judged[0].root)  # fmt: skip
    assert (code, "4 pairs" in text, "page[b].key.csv" in text) == (0, True, True), text
    page = out.read_text()
    assert page.count('class="pair"') == 4
    assert not any(word in page for word in ("judged", "sft", "http"))
    assert winnow("export", "--run", "judged", "--format", "jsonl", "--out", "x.jsonl", "--against", "sft",
                  "--store", judged[0].root)[0] == 2  # fmt: skip

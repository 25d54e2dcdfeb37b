"""The figures of the field: which runs they plan, what they leave out and why, and what their tables say."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import jobs.evidence.measure as measure
from jobs.evidence.figures import FIGURES, SCALES, Point, make_basis
from jobs.evidence.measure import PlannedFigure, PlannedPoint, different_plans, equal_kl_rows, plan_figure
from jobs.evidence.page import write_evidence
from pipeline.config.plan import Plan
from pipeline.costs import Device
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from tests.runs import plan_of

TINY = replace(SCALES["small"], seeds_of_settings=2, labels=(20, 500))


@pytest.fixture(scope="module")
def basis(data_dir):
    return make_basis([data_dir / "demo.yaml"], [], TINY, None)


def steps(plan: Plan):
    return {step.name: step for step in plan.steps}


def test_the_points_of_a_figure_are_recipes_that_differ_in_what_it_is_about_and_in_seeds(basis):
    planned = plan_figure(basis, FIGURES["beta"])
    assert planned.left_out == []
    seen = [
        (steps(plan)["select"].options["rule"].options["beta"], steps(plan)["sample"].options["seed"])
        for plan in planned.plans
    ]
    assert seen == [(beta, seed) for beta in (0.1, 0.5, 2.5) for seed in (0, 1)]
    assert {steps(plan)["optimize"].options["nll_weight"] for plan in planned.plans} == {1.0}
    assert [steps(plan)["optimize"].options["seed"] for plan in planned.plans] == [0, 1] * 3


def test_what_two_figures_show_is_planned_once(basis):
    """At equal KL are the policies along KL; and each temperature's figure has the config's own."""
    figures = [plan_figure(basis, FIGURES[name]) for name in ("over-optimisation", "equal-kl", "beta")]
    assert len(different_plans(figures[:2])) == len(figures[0].plans)
    assert len(different_plans(figures)) == len(figures[0].plans) + 4


def test_rankers_have_fewer_labels_and_the_same_heldout_ones(basis):
    """20 of 60 rows, and not 500, which there are not; and gold in the ranker's place, which the proxy is not."""
    planned = plan_figure(basis, FIGURES["ranker"])
    assert [item.point.at for item in planned.points] == ["labels=20", "", "gold as the ranker"]
    fewer, _, gold = (steps(item.plans[0]) for item in planned.points)
    options = fewer["preferences"].options
    assert options["heldout"] == 0.2
    assert (1 - options["heldout"] - options["validation"]) * 60 == pytest.approx(20, abs=0.1)
    assert gold["reward"].options["by"].name == gold["compare"].options["by"].name == "concierge"
    assert gold["judge"].options["by"].name == "pairwise"


def test_iterated_rso_renews_its_ranker_on_judged_pairs_of_its_own_draws(basis):
    planned = plan_figure(basis, FIGURES["compute"])
    plan = next(item.plans[0] for item in planned.points if item.point.line == "iterated_rso + nll")
    by_name = steps(plan)
    renewed = by_name["renewed_ranker@2"]
    assert renewed.inputs["init"] is by_name["renewed_ranker@1"]
    assert by_name["renewed_ranker@1"].inputs["init"] is by_name["ranker"]
    assert by_name["judged@2"].options["by"].name == "concierge"
    assert by_name["judged_sample@2"].inputs["policy"] is by_name["optimize@1"]
    assert by_name["reward@2"].inputs["ranker"] is by_name["compare@2"].inputs["ranker"] is renewed
    assert by_name["judge@2"].inputs["ranker"] is by_name["ranker"], "the proxy of all rounds is one"


def test_prompts_of_another_file_are_evaluated_beside_the_heldout_ones(basis, data_dir):
    assert "--other-prompts" in plan_figure(basis, FIGURES["other-prompts"]).left_out[0]
    other = replace(basis, other_prompts=data_dir / "preferences.jsonl")
    plan = plan_figure(other, FIGURES["other-prompts"]).plans[0]
    (evaluation,) = plan.evaluations
    assert evaluation.inputs["prompts"].options["path"].path.name == "preferences.jsonl"
    assert evaluation.inputs["candidates"].inputs["policy"] is plan.target.inputs["candidates"].inputs["policy"]
    assert evaluation.inputs["baseline"].inputs["prompts"] is evaluation.inputs["prompts"]


def test_each_round_has_its_own_evaluation_on_other_prompts(basis, data_dir, monkeypatch):
    """The rounds of a run are no seeds: their mean stood at each of them, with an interval over the two."""
    planned = plan_figure(replace(basis, other_prompts=data_dir / "preferences.jsonl"), FIGURES["other-prompts"])
    item = next(item for item in planned.points if item.point.line == "raft")
    read: list[list[str]] = []

    def note_keys(item: PlannedPoint, keys: list[str], catalog: Any) -> dict[str, Any]:
        read.append(keys)
        return {}

    monkeypatch.setattr(PlannedFigure, "finished", lambda self, catalog: [item])
    monkeypatch.setattr(measure, "point_row", note_keys)
    no_catalog: Any = None
    assert [row["round"] for row in measure.table_of_figure(planned, no_catalog)] == [1, 2]
    of_name = steps(item.plans[0])
    names = ("evaluate@1", "evaluate_other@1", "evaluate@2", "evaluate_other@2")
    assert read == [[of_name[name].key for plan in item.plans] for name in names]


def test_judges_of_a_config_are_no_part_of_the_figures(data_dir, tmp_path):
    """They would be taken for evaluations on other prompts, of which the table then lacked every figure."""
    (tmp_path / "judges.yaml").write_text("judges: {polite: {ranker: {use: pattern, with: {regex: Gladly}}}}")
    configs, other = [data_dir / "demo.yaml", tmp_path / "judges.yaml"], data_dir / "preferences.jsonl"
    plan = plan_figure(make_basis(configs, [], TINY, other), FIGURES["other-prompts"]).plans[0]
    assert [step.name for step in plan.evaluations] == ["evaluate_other"]


def test_code_that_a_config_names_is_not_run_unless_the_command_names_it_too(winnow, data_dir, tmp_path):
    (tmp_path / "code.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'was_run')!r}).touch()")
    (tmp_path / "mine.yaml").write_text("plugins: [./code.py]")
    configs = ["--config", data_dir / "demo.yaml", "--config", tmp_path / "mine.yaml"]
    words = ["evidence", *configs, "--plan", "--small", "--figure", "beta", "--store", tmp_path / "store"]
    code, text = winnow(*words)
    assert (code, "--plugin" in text, (tmp_path / "was_run").exists()) == (2, True, False)
    assert winnow(*words, "--plugin", tmp_path / "code.py")[0] == 0


def test_at_equal_kl_a_method_that_is_better_everywhere_by_one_point_is_so(monkeypatch):
    """Between other points of either curve, from the KL that both reach on."""
    prompts = np.linspace(0, 1, 40)

    def figures(catalog, keys):
        result = {}
        for key in keys:  # first/seed/root of KL
            line, _, root = key.split("/")
            gold = 0.2 * float(root) + 0.01 * (line == "first") + 0.1 * prompts
            kl = np.full(40, float(root) ** 2)
            result[key] = {"gold_win": gold, "gold": gold, "kl": kl, "proxy_win": prompts, "n_tokens": prompts}
        return result

    def point(line: str, roots: tuple[str, ...]) -> list[PlannedPoint]:
        """Return a point for each root of KL, with three seeds."""
        points = []
        for root in roots:
            plans: list[Any] = [SimpleNamespace(target=SimpleNamespace(key=f"{line}/{n}/{root}")) for n in range(3)]
            points.append(PlannedPoint(Point(line, root, 0.0, "rso"), plans))
        return points

    monkeypatch.setattr(measure, "values_by_key", figures)
    monkeypatch.setattr(measure, "PAIRED", (("first", "second"),))
    points = [*point("first", ("1.0", "1.6")), *point("second", ("0.8", "1.3", "1.7"))]
    keys = [plan.target.key for item in points for plan in item.plans]
    catalog: Any = SimpleNamespace(manifests=[{"key": key} for key in keys])
    rows = equal_kl_rows(points, catalog)
    assert {round(row["gold_win"], 6) for row in rows} == {0.01}
    assert (rows[0]["at"], rows[-2]["at"], rows[-1]["at"]) == ("KL=1.00", "KL=2.56", "KL 1.00 to 2.56")
    assert all(row["gold_win_low"] <= row["gold_win"] <= row["gold_win_high"] for row in rows)


def test_a_table_has_what_the_store_measured_and_the_page_its_origin(basis, data_dir, finished, tmp_path):
    """Read of a finished run its gold win rate, its compute without what all methods begin with; command and commit."""
    plan = plan_of(data_dir)
    figure = PlannedFigure(FIGURES["compute"], [PlannedPoint(Point("rso", "", None, "rso"), [plan])], ["dpo: a reason"])
    write_evidence([figure], basis, Store(finished), tmp_path, "winnow evidence", "abc123")
    (row,) = json.loads((tmp_path / "compute.json").read_text())["rows"]
    catalog = open_catalog(Store(finished))
    expected = query(catalog, "SELECT value FROM evaluations WHERE metric = 'gold_win'")["value"][0].as_py()
    assert row["gold_win"] == pytest.approx(expected)
    assert row["seeds"] == 1
    names = {step.name for step in measure.training_steps(plan, None)}
    assert names == {"sample", "reward", "select", "compare", "pair", "reference", "examples", "optimize"}
    assert row["compute_seconds"] > 0
    page = (tmp_path / "evidence.html").read_text()
    for fact in ("winnow evidence", "abc123", "dpo: a reason", "<svg", "compute.csv"):
        assert fact in page
    assert "abc123" in (tmp_path / "compute.svg").read_text()
    assert "abc123" in (tmp_path / "compute.csv").read_text()


def test_the_command_says_what_it_would_run_and_refuses_what_it_does_not_know(winnow, data_dir, finished, tmp_path):
    words = ("evidence", "--config", data_dir / "demo.yaml", "--store", finished)
    code, text = winnow(*words, "--small", "--figure", "beta", "--plan")
    assert code == 0
    assert "beta" in text
    assert "min in all" in text
    code, text = winnow(*words, "--figure", "betas")
    assert (code, "betas" in text, "beta" in text) == (2, True, True)
    code, text = winnow(*words, "--set", "optimize.seed=3", "--plan")
    assert (code, "optimize.seed=3" in text) == (2, True)


def test_other_options_make_other_runs_beside_those_of_before(winnow, data_dir, finished, basis, tmp_path, monkeypatch):
    """A name that stands for finished results keeps them; all runs of the command have one number then."""
    store = Store(shutil.copytree(finished, tmp_path / "store"))
    store.link_run(plan_figure(basis, FIGURES["beta"]).plans[0].name, plan_of(data_dir).steps)
    names: list[str] = []
    monkeypatch.setattr("jobs.commands.evidence.run_plans", lambda plans, *rest: names.extend(p.name for p in plans))
    words = ("evidence", "--config", data_dir / "demo.yaml", "--small", "--figure", "beta", "--out", tmp_path / "out")
    code, text = winnow(*words, "--store", store.root)
    assert (code, "evidence-2" in text, {name.split()[0] for name in names}) == (0, True, {"evidence-2"})


def test_a_step_that_the_machine_cannot_run_is_refused_before_anything_runs(winnow, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.config.estimates.this_machine", lambda: Device("cpu", 2**20))
    words = ("evidence", "--config", data_dir / "demo.yaml", "--small", "--figure", "beta", "--store", tmp_path / "new")
    code, text = winnow(*words)
    assert (code, "sft" in text, "memory" in text, (tmp_path / "new").exists()) == (2, True, True, False)


def test_what_set_says_outranks_a_line_and_not_its_axis(data_dir):
    sets = ["optimize.nll_weight=3.0", "optimize.epochs=4"]
    planned = plan_figure(make_basis([data_dir / "demo.yaml"], sets, TINY, None), FIGURES["over-optimisation"])
    options = [steps(item.plans[0])["optimize"].options for item in planned.points if item.point.line == "rso + nll"]
    assert [(option["nll_weight"], option["epochs"]) for option in options] == [(3.0, 2), (3.0, 4), (3.0, 8)]

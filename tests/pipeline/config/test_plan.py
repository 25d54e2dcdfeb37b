"""Fail before the GPU wakes: every name, wire, type and option of a recipe is checked at plan time, all at once."""

from pathlib import Path

import pytest

from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import Recipe
from schemas import WinnowError


def fake_model(folder: Path) -> str:
    """What the planner asks of a model folder: the files are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return str(folder)


@pytest.fixture
def steps(tmp_path: Path) -> dict[str, dict]:
    """A right recipe, from prompts to pairs, for each test to spoil."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n')
    folder = fake_model(tmp_path / "model")
    return {
        "sft": {"use": "model", "with": {"path": folder}},
        "prompts": {"from": {"tokenizer": "sft"}, "with": {"path": str(tmp_path / "p.jsonl")}},
        "sample": {"from": {"prompts": "prompts", "policy": "sft"}},
        "reward": {"from": {"prompts": "prompts", "candidates": "sample", "ranker": "sft"}},
        "select": {"from": {"rewards": "reward"}, "with": {"rule": {"name": "plain"}}},
        "pair": {"from": {"candidates": "sample", "selections": "select"}, "with": {"rule": "neighbours"}},
        "reference": {"from": {"prompts": "prompts", "candidates": "sample", "policy": "sft"}},
        "examples": {
            "from": {"prompts": "prompts", "candidates": "sample", "pairs": "pair", "reference": "reference"},
            "with": {"imitate": "chosen"},
        },
        "optimize": {
            "from": {"init": "sft", "examples": "examples"},
            "with": {"objective": "sigmoid_norm", "nll_weight": 0.1, "learning_rate": 1e-5},
        },
    }


def plan(steps: dict, target: str = "optimize") -> Plan:
    return make_plan(Recipe("test", shards=2, target=target, steps=steps))


def problems(steps: dict, target: str = "optimize") -> tuple[str, ...]:
    with pytest.raises(WinnowError) as caught:
        plan(steps, target)
    return caught.value.problems


def only(found: tuple[str, ...], *words: str) -> None:
    """One problem, and all the words are in it."""
    assert len(found) == 1, found
    assert [word for word in words if word not in found[0]] == []


def test_a_right_recipe_plans_in_an_order_that_can_run(steps: dict):
    assert [step.name for step in plan(steps).steps] == list(steps)


def test_only_what_the_target_needs_is_planned(steps: dict):
    assert [step.name for step in plan(steps, "sample").steps] == ["sft", "prompts", "sample"]


def test_an_unknown_target_gets_the_nearest_name(steps: dict):
    only(problems(steps, "optimise"), "target: no step 'optimise'", "did you mean 'optimize'?")


def test_an_unknown_stage_gets_the_nearest_name(steps: dict):
    steps["select"]["use"] = "selekt"
    only(problems(steps), "select.use: unknown stage 'selekt'", "did you mean 'select'?")


def test_an_unknown_option_gets_the_nearest_name(steps: dict):
    steps["select"]["with"]["sed"] = 1
    only(problems(steps), "select.sed: unknown option", "did you mean 'seed'?")


def test_an_option_of_the_wrong_type_shows_its_value(steps: dict):
    steps["sample"]["with"] = {"temperature": "hot"}
    only(problems(steps), "sample.temperature", "number", "'hot'")


def test_a_mistake_inside_a_nested_function_shows_its_whole_place(steps: dict):
    steps["optimize"]["with"]["objective"] = {"name": "hinge", "dleta": 2.0}
    only(problems(steps), "optimize.objective.dleta: unknown option", "did you mean 'delta'?")


def test_an_unknown_input_gets_the_nearest_name(steps: dict):
    steps["select"]["from"] = {"reward": "reward", "rewards": "reward"}
    only(problems(steps), "select.from.reward: select has no such input", "did you mean 'rewards'?")


def test_a_wire_to_a_step_that_is_not_there_gets_the_nearest_name(steps: dict):
    steps["select"]["from"] = {"rewards": "rewrd"}
    assert "select.from.rewards: no step 'rewrd' in this recipe; did you mean 'reward'?" in problems(steps)


@pytest.mark.parametrize(
    ("step", "wire", "source", "words"),
    [
        ("sample", "policy", "prompts", ["needs a model", "'prompts' (prompts) makes none"]),
        ("sample", "prompts", "sft", ["needs a table of prompts", "'sft' (model) makes none"]),
        ("select", "rewards", "sample", ["needs a table of rewards", "'sample' (sample) makes none"]),
        ("optimize", "examples", "pair", ["needs a table of examples", "'pair' (pair) makes none"]),
    ],
)
def test_a_wire_of_the_wrong_kind_says_what_is_needed_and_what_it_got(steps: dict, step, wire, source, words):
    steps[step]["from"][wire] = source
    only(problems(steps), f"{step}.from.{wire}", *words)


def test_a_step_that_makes_several_tables_serves_each_of_them(steps: dict, tmp_path: Path):
    """`preferences` is prompts, candidates and pairs at once; `optimize` is a model beside its tables."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "hello", "chosen": "Hi.", "rejected": "No."}\n')
    steps["preferences"] = {"from": {"tokenizer": "sft"}, "with": {"path": str(tmp_path / "pairs.jsonl")}}
    steps["examples"]["from"] |= dict.fromkeys(["prompts", "candidates", "pairs"], "preferences")
    steps["reference"]["from"] |= dict.fromkeys(["prompts", "candidates"], "preferences")
    steps["again"] = {"use": "sample", "from": {"prompts": "prompts", "policy": "optimize"}}
    assert plan(steps, "again").steps[-1].inputs["policy"].name == "optimize"


def test_a_missing_required_input_is_named_with_its_kind(steps: dict):
    del steps["sample"]["from"]["policy"]
    only(problems(steps), "sample.from.policy: required (a model)")
    steps["sample"]["from"] = {"prompts": None, "policy": "sft"}
    only(problems(steps), "sample.from.prompts: required (a table of prompts)")


def test_a_missing_required_option_is_named(steps: dict):
    del steps["optimize"]["with"]["learning_rate"]
    only(problems(steps), "optimize.learning_rate: required")


def test_an_optional_input_may_be_left_out(steps: dict):
    assert "selections" not in {step.name: step for step in plan(steps).steps}["reference"].inputs


def test_a_circle_names_its_members(steps: dict):
    steps["prompts"]["from"]["tokenizer"] = "optimize"
    found = [problem for problem in problems(steps) if "a cycle" in problem]
    assert len(found) >= 1
    assert "optimize -> examples -> prompts -> optimize" in found[0]


def test_a_step_that_feeds_itself_is_a_circle(steps: dict):
    steps["select"]["from"]["rewards"] = "select"
    assert any("a cycle: select -> select" in problem for problem in problems(steps))


def test_an_unneeded_step_may_lack_what_it_requires(steps: dict):
    """A base recipe names models that this target never reads; their paths need not be set."""
    steps["ranker"] = {"use": "model"}
    steps["judge"] = {"from": {"ranker": "ranker"}}
    assert len(plan(steps).steps) == 9


def test_an_unneeded_step_may_not_say_what_is_wrong(steps: dict):
    """A typo in a step that is not needed today is a typo all the same."""
    steps["ranker"] = {"use": "modle", "with": {}}
    steps["judge"] = {"with": {"dtpye": "float32"}}
    found = problems(steps)
    assert len(found) == 2
    assert "ranker.use: unknown stage 'modle'" in found[0]
    assert "judge.dtpye: unknown option" in found[1]


def test_all_mistakes_of_a_recipe_come_at_once(steps: dict):
    """Seven mistakes of seven kinds, seven lines, no line twice."""
    steps["prompts"]["with"]["heldout"] = 2.0
    steps["sample"]["from"]["polcy"] = "sft"
    steps["reward"]["from"]["ranker"] = "rankr"
    steps["select"]["with"] = {"rule": {"name": "plain", "k": 0}}
    steps["pair"]["with"]["rule"] = "neighbors"
    steps["examples"]["with"]["imitate"] = "best"
    del steps["optimize"]["with"]["objective"]
    found = problems(steps)
    places = ["prompts.heldout", "sample.from.polcy", "reward.from.ranker", "select.rule.k", "pair.rule"]
    places += ["examples: imitate", "optimize.objective"]
    assert [place for place in places if not any(line.startswith(place) for line in found)] == []
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("step", "wires", "given", "words"),
    [
        ("examples", {"reference": "reference"}, {"imitate": "best"}, ["examples: imitate: best reads selections"]),
        ("examples", {}, {"imitate": "selected"}, ["examples: imitate: selected reads selections"]),
        ("examples", {"pairs": None}, {"imitate": "chosen"}, ["examples: imitate: chosen reads pairs"]),
        ("examples", {"pairs": None}, {"imitate": "nothing"}, ["nothing to learn from"]),
        ("examples", {"candidates": None, "reference": None}, {}, ["examples: pairs needs candidates"]),
        ("pair", {"selections": None}, {"rule": "matches"}, ["pair: rule matches reads comparisons"]),
        ("pair", {"selections": None}, {"rule": "best_vs_worst"}, ["rule best_vs_worst reads selections"]),
        ("prompts", {}, {"dataset": "some/data", "revision": "1"}, ["prompts: give either `path`", "`dataset`"]),
        ("prompts", {}, {"path": None}, ["prompts: give either `path`", "`dataset`"]),
        ("prompts", {}, {"path": None, "dataset": "some/data"}, ["dataset 'some/data' needs `revision`"]),
        ("prompts", {}, {"path": __file__}, ["reads .jsonl, .ndjson, .parquet, .csv"]),
        ("prompts", {}, {"path": "/nowhere/p.jsonl"}, ["prompts.path: no such file or folder: /nowhere/p.jsonl"]),
        ("sft", {}, {"path": "/nowhere"}, ["sft.path: no such file or folder: /nowhere"]),
    ],
)
def test_what_makes_no_sense_together_is_refused_at_plan_time(steps: dict, step, wires, given, words):
    """Each at the step that says it; what reads that step is not asked for here."""
    steps[step]["from"] = steps[step].get("from", {}) | wires
    steps[step]["with"] = steps[step].get("with", {}) | given
    only(problems(steps, step), *words)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("tokenizer.json", "no tokenizer"),
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights as *.safetensors"),
    ],
)
def test_a_model_folder_that_lacks_a_part_is_refused_at_plan_time(steps: dict, tmp_path: Path, gone: str, words: str):
    """Pickled weights alone are no weights: they are code."""
    (tmp_path / "model" / gone).rename(tmp_path / "model" / "pytorch_model.bin")
    only(problems(steps), "sft.path: model folder", words)


def test_own_candidates_name_one_score(steps: dict, tmp_path: Path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "hello", "response": "Hi."}\n')
    own = {"use": "own_candidates", "from": {"tokenizer": "sft"}, "with": {"path": str(tmp_path / "own.jsonl")}}
    only(problems({**steps, "own": own}, "own"), "own: name either the `reward` column or the `probability` column")


def test_heads_divide_hidden(steps: dict, tmp_path: Path):
    given = {"corpus": str(tmp_path / "p.jsonl"), "columns": ["prompt"], "hidden": 30, "heads": 4}
    only(problems({"m": {"use": "untrained", "with": given}}, "m"), "m: hidden 30 is not a multiple of heads 4")

"""Plans: every name, input, type and option of a recipe is checked before anything runs, and all at once."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import Recipe
from schemas import WinnowError


def fake_model(folder: Path) -> str:
    """Write the files that the planner requires of a model folder, with a tensor for all its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model.safetensors")
    return str(folder)


@pytest.fixture
def steps(tmp_path: Path) -> dict[str, dict]:
    """Return a correct recipe, from prompts to an optimized policy, for each test to break."""
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


def only(lines: tuple[str, ...], *words: str) -> None:
    """Assert that there is one problem, with all the words in it."""
    assert len(lines) == 1, lines
    assert [word for word in words if word not in lines[0]] == []


def test_a_correct_recipe_plans_what_its_target_needs_in_an_order_that_can_run(steps: dict):
    assert [step.name for step in plan(steps).steps] == list(steps)
    assert [step.name for step in plan(steps, "sample").steps] == ["sft", "prompts", "sample"]
    assert "selections" not in plan(steps).steps[list(steps).index("reference")].inputs, "an optional input"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"select": {"use": "selekt"}}, ["select.use: unknown stage 'selekt'", "did you mean 'select'?"]),
        ({"select": {"with": {"rule": "plain", "sed": 1}}}, ["select.sed: unknown option", "did you mean 'seed'?"]),
        ({"sample": {"with": {"temperature": "hot"}}}, ["sample.temperature", "number", "'hot'"]),
        (
            {"optimize": {"with": {"objective": {"name": "hinge", "dleta": 2.0}, "learning_rate": 1e-5}}},
            ["optimize.objective.dleta: unknown option", "did you mean 'delta'?"],
        ),
        ({"optimize": {"with": {"objective": "hinge"}}}, ["optimize.learning_rate: required"]),
        (
            {"select": {"from": {"reward": "reward", "rewards": "reward"}}},
            ["select.from.reward: select has no such input", "did you mean 'rewards'?"],
        ),
        (
            {"sample": {"from": {"prompts": "prompts"}}},
            ["sample.from.policy: required (a model)", "`policy`"],
        ),
        (
            {"sample": {"from": {"prompts": None, "policy": "sft"}}},
            ["sample.from.prompts: required (a table of prompts)"],
        ),
        (
            {"sample": {"from": {"prompts": "prompts", "policy": "prompts"}}},
            ["sample.from.policy", "needs a model", "'prompts' (prompts) makes none"],
        ),
        (
            {"sample": {"from": {"prompts": "sft", "policy": "sft"}}},
            ["sample.from.prompts", "needs a table of prompts", "'sft' (model) makes none"],
        ),
        (
            {"optimize": {"from": {"init": "sft", "examples": "pair"}}},
            ["optimize.from.examples", "needs a table of examples", "'pair' (pair) makes none"],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_line_with_place_and_cure(steps: dict, change: dict, words: list[str]):
    ((step, body),) = change.items()
    steps[step] |= body
    only(problems(steps), *words)


def test_a_step_or_a_target_that_does_not_exist_gets_the_nearest_name(steps: dict):
    only(problems(steps, "optimise"), "target: no step 'optimise'", "did you mean 'optimize'?")
    steps["select"]["from"] = {"rewards": "rewrd"}
    assert "select.from.rewards: no step 'rewrd' in this recipe; did you mean 'reward'?" in problems(steps)


def test_a_step_that_makes_several_tables_serves_each_of_them(steps: dict, tmp_path: Path):
    """`preferences` is prompts, candidates and pairs at once; `optimize` is a model beside its tables."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "hello", "chosen": "Hi.", "rejected": "No."}\n')
    steps["preferences"] = {"from": {"tokenizer": "sft"}, "with": {"path": str(tmp_path / "pairs.jsonl")}}
    steps["examples"]["from"] |= dict.fromkeys(["prompts", "candidates", "pairs"], "preferences")
    steps["reference"]["from"] |= dict.fromkeys(["prompts", "candidates"], "preferences")
    steps["again"] = {"use": "sample", "from": {"prompts": "prompts", "policy": "optimize"}}
    assert plan(steps, "again").steps[-1].inputs["policy"].name == "optimize"


def test_a_cycle_names_its_members(steps: dict):
    steps["prompts"]["from"]["tokenizer"] = "optimize"
    assert any("a cycle: optimize -> examples -> prompts -> optimize" in problem for problem in problems(steps))
    steps["prompts"]["from"]["tokenizer"] = "sft"
    steps["select"]["from"]["rewards"] = "select"
    assert any("a cycle: select -> select" in problem for problem in problems(steps))


def test_an_unneeded_step_may_lack_what_it_requires(steps: dict):
    """A base recipe names models that this target never reads; their paths need not be set. A config for several
    recipes names data that this one never reads; they need not be on this machine."""
    steps["ranker"] = {"use": "model"}
    steps["preferences"] = {"from": {"tokenizer": "sft"}, "with": {"path": "/data/of/another/machine.jsonl"}}
    steps["judge"] = {"from": {"ranker": "ranker"}}
    assert len(plan(steps).steps) == 9


def test_an_unneeded_step_may_not_say_what_is_wrong(steps: dict):
    """A typo in a step that is not needed today is a typo all the same."""
    steps["ranker"] = {"use": "modle", "with": {}}
    steps["judge"] = {"with": {"dtpye": "float32"}}
    lines = problems(steps)
    assert len(lines) == 2
    assert "ranker.use: unknown stage 'modle'" in lines[0]
    assert "judge.dtpye: unknown option" in lines[1]


def test_all_mistakes_of_a_recipe_come_at_once(steps: dict):
    """Seven mistakes of seven kinds, seven lines, no line twice."""
    steps["prompts"]["with"]["heldout"] = 2.0
    steps["sample"]["from"]["polcy"] = "sft"
    steps["reward"]["from"]["ranker"] = "rankr"
    steps["select"]["with"] = {"rule": {"name": "plain", "k": 0}}
    steps["pair"]["with"]["rule"] = "neighbors"
    steps["examples"]["with"]["imitate"] = "best"
    del steps["optimize"]["with"]["objective"]
    lines = problems(steps)
    places = ["prompts.heldout", "sample.from.polcy", "reward.from.ranker", "select.rule.k", "pair.rule"]
    places += ["examples: imitate", "optimize.objective"]
    assert [place for place in places if not any(line.startswith(place) for line in lines)] == []
    assert len(set(lines)) == len(lines)


def test_what_makes_no_sense_together_is_refused_at_plan_time(steps: dict):
    """Each at the step that says it; what reads that step is not asked for here."""
    for step, inputs, options, words in (
        ("examples", {"reference": "reference"}, {"imitate": "best"}, ["best", "selections"]),
        ("examples", {}, {"imitate": "selected"}, ["selected", "selections"]),
        ("examples", {"pairs": None}, {"imitate": "chosen"}, ["chosen", "pairs"]),
        ("examples", {"pairs": None}, {"imitate": "nothing"}, []),
        ("examples", {"candidates": None, "reference": None}, {}, ["pairs", "candidates"]),
        ("pair", {"selections": None}, {"rule": "matches"}, ["matches", "comparisons"]),
        ("pair", {"selections": None}, {"rule": "best_vs_worst"}, ["best_vs_worst", "selections"]),
        ("prompts", {}, {"dataset": "some/data", "revision": "1"}, ["`path`", "`dataset`"]),
        ("prompts", {}, {"path": None}, ["`path`", "`dataset`"]),
        ("prompts", {}, {"path": None, "dataset": "some/data"}, ["'some/data'", "`revision`"]),
        ("prompts", {}, {"path": __file__}, [".jsonl, .ndjson, ", ".parquet"]),
        ("prompts", {}, {"path": "/nowhere/p.jsonl"}, ["prompts.path: ", "/nowhere/p.jsonl"]),
        ("sft", {}, {"path": "/nowhere"}, ["sft.path: ", "/nowhere"]),
    ):
        body = steps[step]
        broken = {**body, "from": body.get("from", {}) | inputs, "with": body.get("with", {}) | options}
        only(problems({**steps, step: broken}, step), step, *words)


def test_a_model_folder_that_lacks_a_part_is_refused_at_plan_time(steps: dict, tmp_path: Path):
    """Pickled weights alone are no weights: they are code."""
    for file, words in (
        ("tokenizer.json", "tokenizer"),
        ("config.json", "config.json"),
        ("model.safetensors", "*.safe"),
    ):
        moved = (tmp_path / "model" / file).rename(tmp_path / "model" / "pytorch_model.bin")
        only(problems(steps), "sft.path: model folder", words)
        moved.rename(tmp_path / "model" / file)


def test_a_stage_checks_its_options_against_each_other(steps: dict, tmp_path: Path):
    (tmp_path / "draws.jsonl").write_text('{"prompt": "hello", "response": "Hi."}\n')
    data = {"path": str(tmp_path / "draws.jsonl"), "reward": "response", "probability": "response"}
    draws = {"use": "own_candidates", "from": {"tokenizer": "sft"}, "with": data}
    only(
        problems({**steps, "draws": draws}, "draws"),
        "draws: `reward` is 'response' and `probability` is 'response'",
    )
    options = {"corpus": str(tmp_path / "p.jsonl"), "columns": ["prompt"], "hidden": 30, "heads": 4}
    only(problems({"m": {"use": "untrained", "with": options}}, "m"), "m: hidden 30 is not a multiple of heads 4")


@pytest.mark.parametrize(
    ("reader", "item"),
    [
        ({"use": "select", "with": {"rule": "plain"}}, "rewards"),
        ({"use": "combine", "with": {"weights": {"first": 1.0}}}, "first"),
        ({"use": "rescale"}, "rewards"),
    ],
)
def test_a_step_that_reads_rewards_of_candidates_without_scores_is_refused_with_the_lines(
    steps: dict, tmp_path: Path, reader: dict, item: str
):
    """With these lines the recipe plans; so it does with a column of scores, or where nothing reads rewards."""
    (tmp_path / "draws.jsonl").write_text('{"prompt": "hello", "response": "Hi.", "score": 1}\n')
    data = {"path": str(tmp_path / "draws.jsonl")}
    draws = {"use": "own_candidates", "from": {"tokenizer": "sft"}, "with": data}
    steps = {**steps, "draws": draws, "selected": reader | {"from": {item: "draws"}}}
    assert plan(steps, "draws").target.name == "draws"
    lines = f"`reward: {{from: {{prompts: draws, candidates: draws}}}}` and `selected: {{from: {{{item}: reward}}}}`"
    only(
        problems(steps, "selected"),
        f"selected.from.{item}: the table of rewards of step 'draws' would be empty",
        lines,
    )
    scored = draws | {"with": data | {"reward": "score"}}
    assert plan({**steps, "draws": scored}, "selected").target.name == "selected"
    steps["reward"]["from"] |= {"prompts": "draws", "candidates": "draws"}
    steps["selected"]["from"] = {item: "reward"}
    assert plan(steps, "selected").target.name == "selected"

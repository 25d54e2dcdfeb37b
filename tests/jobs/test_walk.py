"""The first hour of a practitioner: own policy, own reward model, chat data of their own, one short config."""

from pathlib import Path
from typing import Any

import pytest

from jobs.recipes import names, plans
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from tests.conftest import write_jsonl
from tests.families import write_chat_model

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Return the time in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "its name"}}},
    },
}
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "get_time", "arguments": {"city": "Rome"}}}],
}
RESULT: dict[str, Any] = {"role": "tool", "name": "get_time", "content": "12:00"}
# The policy's shape, the reward model's, and the stages that reject rows with tools, for which a template has no form.
WALKS: dict[str, tuple[str, str, set[str]]] = {
    "qwen2": ("qwen2", "llama", set()),
    "llama": ("llama", "gemma", {"reward"}),
    "gemma": ("gemma", "qwen2", {"prompts", "preferences", "own_candidates"}),
}
STEERED = ("cvx_dpo", "logistic_head")  # recipes in which a head steers the policy
CONFIG = """\
base:           {{use: model, with: {{path: {folder}/{policy}-policy}}}}
sft:            {{use: model, with: {{path: {folder}/{policy}-policy}}}}
ranker:         {{use: model, with: {{path: {folder}/{scorer}-reward}}}}
annotator:      {{use: model, with: {{path: {folder}/{scorer}-reward}}}}
prompts:        {{with: {{path: ./chats.jsonl, prompt: messages, demonstration: answer, heldout: 0.3}}}}
demonstrations: {{with: {{path: ./chats.jsonl, prompt: messages, demonstration: answer}}}}
preferences:    {{with: {{path: ./preferences.jsonl}}}}
own_candidates: {{with: {{path: ./labels.jsonl, response: completion, reward: label}}}}
sample:         {{with: {{engine: transformers, n: 6, max_tokens: 6}}}}
select:         {{with: {{rule: {{name: rejection_sample, k: 3}}}}}}
optimize:       {{with: {{learning_rate: 1.0e-4, batch_size: 16}}}}
evaluations:    []
"""


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def chats(n: int) -> list[dict[str, Any]]:
    """Return conversations with several turns, system messages and tools, each other for another n."""
    ask = turn("user", f"What is the time in Rome, please, for {n}?")
    hello = [turn("user", "Hello."), turn("assistant", "Gladly.")]
    return [
        {"messages": [ask]},
        {"messages": [turn("system", "Be kind."), ask]},
        {"messages": [*hello, ask]},
        {"messages": [turn("system", "Be brief."), *hello, ask]},
        {"messages": [ask], "tools": [TOOL]},
        {"messages": [ask, CALL, RESULT], "tools": [TOOL]},
    ]


NO_TOOLS = pytest.mark.filterwarnings("ignore:.*the chat template does not render tools")  # by the plan, of Gemma's


@pytest.fixture(scope="module")
def folder(unmarked, tmp_path_factory) -> Path:
    """Models of all shapes, and data as people have them."""
    root = tmp_path_factory.mktemp("walk")
    for shape in ("qwen2", "llama", "gemma"):
        write_chat_model(shape, unmarked, root / f"{shape}-policy")
        write_chat_model(shape, unmarked, root / f"{shape}-reward", score=True)
    rows = [row for n in range(3) for row in chats(n)]
    write_jsonl(root / "chats.jsonl", [row | {"answer": "Gladly, at noon."} for row in rows])
    sides = {"chosen": [turn("assistant", "Gladly, at noon.")], "rejected": [turn("assistant", "Um.")]}
    tools = [{"tools": row["tools"]} if "tools" in row else {} for row in rows]
    pairs = [{"prompt": row["messages"]} | sides | tool for row, tool in zip(rows, tools, strict=True)]
    several = [turn("assistant", "Where?"), turn("user", "In Rome."), turn("assistant", "Noon.")]
    pairs += [{"prompt": [turn("user", f"What time is it, {n}?")]} | sides | {"chosen": several} for n in range(3)]
    write_jsonl(root / "preferences.jsonl", pairs)  # TRL's explicit prompt, conversational
    labels = [
        {"prompt": row["messages"], "completion": sides[side], "label": side == "chosen"} | tool
        for row, tool in zip(rows, tools, strict=True)
        for side in sides
    ]
    write_jsonl(root / "labels.jsonl", labels)
    for name, (policy, scorer, _) in WALKS.items():
        (root / f"{name}.yaml").write_text(CONFIG.format(folder=root, policy=policy, scorer=scorer))
    return root


def test_every_recipe_plans_at_the_first_try(folder):
    """With one config of at most twelve lines, all recipes that ship."""
    config = folder / "qwen2.yaml"
    assert len(config.read_text().splitlines()) <= 12
    for name in names():
        (plan,) = plans([name], [config], [])
        assert plan.steps[-1].name.startswith(("evaluate", "optimize")), name


@pytest.mark.parametrize("recipe", STEERED)
@NO_TOOLS
def test_a_policy_with_windows_is_not_steered(folder, winnow, recipe, tmp_path):
    """Gemma's layers with windows, of which the plan says the step and the cure, before anything runs."""
    code, out = winnow("plan", recipe, "--config", folder / "gemma.yaml", "--store", tmp_path / "runs")
    assert code == 2, out
    for fact in ("eval_sample", "gemma-policy", "sliding_attention", "remove `head` under `from`", "`head_reward`"):
        assert fact in out
    code, out = winnow("plan", "cvx_rerank", "--config", folder / "gemma.yaml", "--store", tmp_path / "runs")
    assert code == 0, out


def rejected(store: Store, stage: str) -> set[str]:
    sql = f"SELECT DISTINCT reason || ' ' || detail AS reason FROM rejects WHERE stage = '{stage}'"
    return set(query(open_catalog(store), sql)["reason"].to_pylist())


def run_to_the_end(winnow, config: Path, recipes: list[str], store: Store) -> None:
    """Run recipes in one command, and expect them on the leaderboard; those without an evaluation end in a policy."""
    code, out = winnow("run", *recipes, "--config", config, "--store", store.root)
    assert code == 0, out
    sql = "SELECT DISTINCT run FROM runs WHERE stage IN ('evaluate', 'optimize')"
    assert set(query(open_catalog(store), sql)["run"].to_pylist()) >= set(recipes)
    unrendered = {
        stage
        for stage in ("prompts", "preferences", "own_candidates", "reward")
        if any("does not render tools" in reason for reason in rejected(store, stage))
    }
    assert unrendered <= WALKS[config.stem][2]


@NO_TOOLS
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "qwen2" else pytest.mark.bench) for name in WALKS]
)
@pytest.mark.filterwarnings("ignore:.*of a part.s responses were cut at max_tokens")  # after six tokens
@pytest.mark.filterwarnings(
    "ignore:.*(ranker|annotator). .* have tools", "ignore:evaluate. .* of the comparisons"
)  # Llama's template
def test_runs_end_at_the_first_try(folder, winnow, name, tmp_path):
    """RSO and DPO, from data to evaluation; only what a template cannot render is left out, with its reason."""
    store = Store(tmp_path / "runs")
    run_to_the_end(winnow, folder / f"{name}.yaml", ["rso", "dpo"], store)
    for stage in {"prompts", "preferences", "reward"} & WALKS[name][2]:
        assert any("does not render tools" in reason for reason in rejected(store, stage)), stage
    sql = "SELECT count(*) AS n FROM candidates WHERE stage = 'preferences' AND mask IS NOT NULL"
    assert query(open_catalog(store), sql)["n"][0].as_py() == 3


@NO_TOOLS
@pytest.mark.bench
@pytest.mark.filterwarnings("ignore:.*of a part.s responses were cut at max_tokens")  # after six tokens
@pytest.mark.filterwarnings("ignore:.*(ranker|annotator). .* have tools", "ignore:evaluate. .* of the comparisons")
@pytest.mark.filterwarnings("ignore:partition. the policy.s states say nothing")  # of so few prompts
@pytest.mark.filterwarnings("ignore:what `sample` with")  # bfloat16 reads little of what so short a training changed
@pytest.mark.parametrize("name", WALKS)
def test_every_recipe_ends_at_the_first_try(folder, winnow, name, tmp_path):
    """In one command, all but SPIN, which learns from finished responses alone: a random policy ends none here.

    And without those that are refused: test_a_policy_with_windows_is_not_steered.
    """
    refused = STEERED if name == "gemma" else ()
    recipes = [recipe for recipe in names() if recipe not in ("spin", *refused)]
    run_to_the_end(winnow, folder / f"{name}.yaml", recipes, Store(tmp_path / "runs"))

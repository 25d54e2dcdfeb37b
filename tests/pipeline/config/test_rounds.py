"""Rounds: each round's policy is the next one's sampler, every round's tables stay, and what two rounds share is one.

Unrolled, a recipe with rounds is an ordinary recipe: `sample@2` is a step like any other, and its key consists of its
options and inputs alone. So a round is what its inputs are, and no stage knows that there are rounds.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jobs import tables as show
from jobs.trace import trace_prompt
from pipeline import StageContext, stage
from pipeline.config.plan import Plan, make_plan
from pipeline.config.recipe import Recipe, load_recipe
from pipeline.config.rounds import split_round, unroll
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.sql.catalog import open_catalog, query
from pipeline.stage import stages
from pipeline.store.store import Store
from schemas import Candidates, Evaluations, Model, Prompts, WinnowError, candidate_id, prompt_id
from schemas.tables import CANDIDATES, EVALUATIONS, PROMPTS
from tests.runs import Silent, plan_of

QUERIES = Path(__file__).parents[3] / "jobs" / "queries"
LOOP = """
shards: 2
prompts:  {use: toy_prompts}
sft:      {use: toy_start}
sample:   {use: toy_draw, from: {prompts: prompts, policy: {first: sft, then: optimize}}}
keep:     {use: toy_keep, from: {candidates: sample, earlier: {first: null, then: keep}}}
optimize: {use: toy_train, from: {init: {first: sft, then: optimize}, candidates: keep}}
baseline: {use: toy_draw, from: {prompts: prompts, policy: sft}, with: {n: 2}}
evaluate: {use: toy_evaluate, from: {policy: optimize, baseline: baseline}}
"""
VARYING = ["sample", "keep", "optimize", "evaluate"]
SHARED = ["prompts", "sft", "baseline"]


def model(ctx: StageContext, content: str) -> Model:
    (ctx.folder / "model").mkdir(parents=True, exist_ok=True)
    (ctx.folder / "model" / "model.safetensors").write_text(content)
    return Model(ctx.folder / "model", "")


def read(policy: Model) -> str:
    return (policy.folder / "model.safetensors").read_text()


def toy_start(ctx: StageContext) -> Model:
    return model(ctx, "sft")


def toy_prompts(*, n: int = 4) -> Prompts:
    rows = [dict(prompt_id=prompt_id(f"p{i}"), text=f"p{i}", token_ids=[i], split="train") for i in range(n)]
    return pa.Table.from_pylist(rows, PROMPTS)


def toy_draw(prompts: Prompts, policy: Model, *, n: int = 1) -> Candidates:
    """Each response names the policy that drew it."""
    rest = dict(k=0, token_ids=[1], logp_kind="none", n_tokens=n, finish_reason="stop", text=read(policy))
    ids = prompts.column("prompt_id").to_pylist()
    rows = [dict(prompt_id=each, candidate_id=candidate_id(each, [n], len(read(policy))), **rest) for each in ids]
    return pa.Table.from_pylist(rows, CANDIDATES)


def toy_keep(candidates: Candidates, earlier: Candidates | None = None, *, threshold: float = 0.7) -> Candidates:
    return candidates if earlier is None else pa.concat_tables([candidates, earlier])


def toy_train(init: Model, candidates: Candidates, ctx: StageContext, *, learning_rate: float = 1.0) -> Model:
    return model(ctx, f"{read(init)}+{candidates.num_rows}")


def toy_evaluate(policy: Model, baseline: Candidates) -> Evaluations:
    value = float(read(policy).count("+"))
    rows = [dict(metric=name, value=value, low=0.0, high=value, n=baseline.num_rows) for name in ("gold_win", "gold")]
    return pa.Table.from_pylist(rows, EVALUATIONS)


@pytest.fixture(scope="module", autouse=True)
def _toy_stages() -> Iterator[None]:
    """Register a small pipeline for as long as these tests run."""
    unsharded: list[Callable[..., Any]] = [toy_start, toy_prompts, toy_train, toy_evaluate]
    functions: list[Callable[..., Any]] = [*unsharded, toy_draw, toy_keep]
    for fn in functions:
        stage(version=1, unsharded=fn in unsharded)(fn)
    yield
    for fn in functions:
        stages.entries.pop(fn.__name__)


def load(folder: Path, text: str = "", *sets: str, base: str = LOOP) -> Recipe:
    (folder / "base.yaml").write_text(base)
    (folder / "loop.yaml").write_text("extends: base\n" + text)
    return load_recipe(folder / "loop.yaml", (), sets)


def plan(folder: Path, text: str = "", *sets: str, base: str = LOOP) -> Plan:
    return make_plan(load(folder, text, *sets, base=base))


def problems(folder: Path, text: str = "", *sets: str) -> tuple[str, ...]:
    with pytest.raises(WinnowError) as caught:
        plan(folder, text, *sets)
    return caught.value.problems


def inputs(loop: Plan) -> dict[str, dict[str, str]]:
    return {step.name: {wire: source.name for wire, source in step.inputs.items()} for step in loop.steps}


def keys(loop: Plan) -> dict[str, str]:
    return {step.name: step.key for step in loop.steps}


# Unrolling.


def test_without_rounds_a_changing_wire_is_its_first(tmp_path: Path):
    """The base may say what rounds would do: a recipe without them is as if the wires said only `first`."""
    plain = LOOP.replace("{first: sft, then: optimize}", "sft").replace(", earlier: {first: null, then: keep}", "")
    changing = plan(tmp_path)
    assert inputs(changing)["sample"] == {"prompts": "prompts", "policy": "sft"}
    assert inputs(changing)["keep"] == {"candidates": "sample"}
    assert keys(changing) == keys(plan(tmp_path, base=plain))


def test_each_round_reads_the_one_before(tmp_path: Path):
    """Round 2 samples from round 1's policy and starts from it; what does not change is there once."""
    names = inputs(plan(tmp_path, "rounds: 3"))
    assert sorted(names) == sorted([*SHARED, *(f"{name}@{n}" for name in VARYING for n in (1, 2, 3))])
    assert names["sample@1"]["policy"] == names["optimize@1"]["init"] == "sft"
    assert names["sample@2"]["policy"] == names["optimize@2"]["init"] == "optimize@1"
    assert names["sample@3"]["policy"] == "optimize@2"
    assert names["evaluate@3"] == {"policy": "optimize@3", "baseline": "baseline"}
    assert names["keep@1"] == {"candidates": "sample@1"}, "null is no input"
    assert names["keep@2"] == {"candidates": "sample@2", "earlier": "keep@1"}


def test_the_target_is_that_of_every_round_the_last_one_last(tmp_path: Path):
    loop = plan(tmp_path, "rounds: 3")
    assert [step.name for step in loop.targets] == ["evaluate@1", "evaluate@2", "evaluate@3"]
    assert loop.target.name == loop.steps[-1].name == "evaluate@3"
    position = {step.name: n for n, step in enumerate(loop.steps)}
    assert all(position[source.name] < position[step.name] for step in loop.steps for source in step.inputs.values())
    assert position["evaluate@1"] < position["sample@2"], "a round is measured before the next one begins"


def test_every_round_is_evaluated_in_all_ways_unless_something_else_is_the_target(tmp_path: Path):
    """`evaluations` names steps beside the target; one that is none is refused by name."""
    also = "rounds: 2\nevaluations: [evaluate_more]\nevaluate_more: {like: evaluate}"
    loop = plan(tmp_path, also)
    assert [step.name for step in loop.targets] == ["evaluate@1", "evaluate@2"]
    assert [step.name for step in loop.evaluations] == ["evaluate_more@1", "evaluate_more@2"]
    assert {"evaluate_more@1", "evaluate_more@2"} <= {step.name for step in loop.steps}
    assert plan(tmp_path, also, "target=optimize").evaluations == []
    assert plan(tmp_path, also, "evaluations=[]").evaluations == []
    with pytest.raises(WinnowError, match=r"evaluations: no step 'evalute_more'.*did you mean 'evaluate_more'"):
        plan(tmp_path, also, "evaluations=[evalute_more]")
    other = also.replace("evaluate_more", "other_evaluation")
    with pytest.raises(WinnowError, match=r"evaluations: .*'other_evaluation' must begin with evaluate_"):
        plan(tmp_path, other)  # the leaderboard would take either of the two for the main one


def test_one_round_may_be_the_target(tmp_path: Path):
    loop = plan(tmp_path, "rounds: 3", "target=optimize@2")
    assert [step.name for step in loop.targets] == ["optimize@2"]
    assert not [step.name for step in loop.steps if step.name.endswith("@3")]


def test_a_round_is_no_part_of_a_key(tmp_path: Path):
    """One round is what the same recipe without rounds is, so it is cached; and so is round 1 of any number."""
    once, many = keys(plan(tmp_path)), keys(plan(tmp_path, "rounds: 3"))
    assert {name: many[name if name in SHARED else f"{name}@1"] for name in once} == once
    assert len({many[f"sample@{n}"] for n in (1, 2, 3)}) == 3


def test_rest_improves_twice_on_the_samples_of_one_grow_step(tmp_path: Path):
    """ReST: round 2 samples from the SFT policy again, which is round 1's sample step, and only keeps fewer of it."""
    text = "rounds: [{}, {sample: {from: {policy: sft}}, keep: {with: {threshold: 0.9}}}, {}]"
    key_by_step, names = keys(plan(tmp_path, text)), inputs(plan(tmp_path, text))
    assert key_by_step["sample@1"] == key_by_step["sample@2"] != key_by_step["sample@3"]
    assert key_by_step["keep@1"] != key_by_step["keep@2"]
    assert names["optimize@2"]["init"] == "optimize@1"
    by_name = keys(plan(tmp_path, text.replace("{sample: {from: {policy: sft}}, ", "{")
                        + "\nkeep: {from: {candidates: sample@1}}"))  # fmt: skip
    assert by_name["keep@2"] == key_by_step["keep@2"], "the round may be named instead"


def test_an_overlay_makes_its_step_and_what_reads_it_differ_by_round(tmp_path: Path):
    """Without any `then`: three thresholds on one set of candidates, sampled once."""
    flat = LOOP.replace("{first: sft, then: optimize}", "sft").replace(", earlier: {first: null, then: keep}", "")
    text = "rounds: [{}, {keep: {with: {threshold: 0.8}}}, {keep: {with: {threshold: 0.9}}}]"
    loop = plan(tmp_path, text, base=flat)
    assert {split_round(step.name)[0] for step in loop.steps if "@" in step.name} == {"keep", "optimize", "evaluate"}
    steps = {step.name: step for step in loop.steps}
    assert [steps[f"keep@{n}"].options["threshold"] for n in (1, 2, 3)] == [0.7, 0.8, 0.9]
    assert len({steps[f"keep@{n}"].inputs["candidates"].key for n in (1, 2, 3)}) == 1


def test_what_names_its_rounds_is_one_step_and_what_reads_a_changing_step_changes_with_it(tmp_path: Path):
    """A step that compares rounds 1 and 2 does not itself change; an input without a round means this round's step."""
    text = "rounds: 2\ntarget: both\nboth: {use: toy_keep, from: "
    loop = plan(tmp_path, text + "{candidates: sample@1, earlier: sample@2}}")
    assert [step.name for step in loop.targets] == ["both"]
    assert inputs(loop)["both"] == {"candidates": "sample@1", "earlier": "sample@2"}
    loop = plan(tmp_path, text + "{candidates: sample, earlier: baseline}}")
    assert inputs(loop)["both@2"] == {"candidates": "sample@2", "earlier": "baseline"}
    names = inputs(plan(tmp_path, "rounds: 3\nkeep: {from: {earlier: {first: null, then: baseline}}}"))
    assert [names[f"keep@{n}"].get("earlier") for n in (1, 2, 3)] == [None, "baseline", "baseline"]


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=12),
)
def test_unrolled_wires_are_plain_and_lead_to_steps_that_are_there(count: int, drawn: list[tuple[int, int, bool]]):
    """For any wiring: each wire names a step that exists, of the same round if direct, of the round before by `then`;
    a step is there once if nothing that it needs changes, and once a round if anything does."""
    steps: dict[str, dict] = {f"s{n}": {"from": {}} for n in range(6)}
    for reader, source, then in drawn:
        wire = {"first": "s0", "then": f"s{source}"} if then else f"s{source}"
        steps[f"s{reader}"]["from"][f"i{source}{then}"] = wire
    loop = unroll([steps] * count, set())
    per_round = {split_round(name)[0] for name in loop if "@" in name}
    for name, body in loop.items():
        step, number = split_round(name)
        assert (number is not None) == (step in per_round)
        for wire, source in body["from"].items():
            back = 1 if wire.endswith("True") and number != 1 else 0
            assert source in loop
            assert split_round(source)[1] in (None, (number or 0) - back)
    assert all(len([name for name in loop if split_round(name)[0] == step]) == (count if step in per_round else 1)
               for step in steps)  # fmt: skip


# --set.


TWO = "keep: {with: {threshold: 0.5}}\nrounds: [{}, {keep: {with: {threshold: 0.8}}}]"


def test_set_is_over_the_rounds_own_overlays(tmp_path: Path):
    """A step in all rounds, or in one; the later one counts. `rounds` takes the first of a list, or replaces it."""
    for sets, expected in (
        ((), [0.5, 0.8]),
        (("keep.threshold=1.0",), [1.0, 1.0]),
        (("keep@1.threshold=1.0",), [1.0, 0.8]),
        (("keep@2.threshold=1.0",), [0.5, 1.0]),
        (("keep.threshold=1.0", "keep@2.threshold=2.0"), [1.0, 2.0]),
        (("keep@2.threshold=2.0", "keep.threshold=1.0"), [1.0, 1.0]),
        (("rounds=1",), [0.5]),
        (("rounds=[{keep: {with: {threshold: 9.0}}}, {}, {}]",), [9.0, 0.5, 0.5]),
    ):
        recipe = load(tmp_path, TWO, *sets)
        bodies = [recipe.steps[f"keep@{n}"] for n in range(1, recipe.rounds + 1)]
        assert [body.get("with", {}).get("threshold") for body in bodies] == expected, sets
    assert keys(plan(tmp_path, "", "rounds=2")) == keys(plan(tmp_path, "rounds: 2"))
    assert keys(plan(tmp_path, "rounds: 2", "rounds=4")) == keys(plan(tmp_path, "rounds: 4"))


def test_set_of_one_round_moves_that_round_and_the_next(tmp_path: Path):
    """Round 1 stays cached."""
    before, after = keys(plan(tmp_path, "rounds: 3")), keys(plan(tmp_path, "rounds: 3", "optimize@2.learning_rate=0.5"))
    moved = {name for name in before if before[name] != after[name]}
    assert moved == {"optimize@2", "evaluate@2", "sample@3", "keep@3", "optimize@3", "evaluate@3"}


def test_set_of_one_round_splits_a_shared_step(tmp_path: Path):
    """Other prompts in round 2: prompts, and what reads them, exist once per round."""
    names = inputs(plan(tmp_path, "rounds: 2", "prompts@2.n=2"))
    assert names["sample@2"]["prompts"] == "prompts@2"
    assert names["evaluate@2"]["baseline"] == "baseline@2"


def test_a_path_in_a_rounds_overlay_is_beside_its_file(tmp_path: Path):
    loop = load(tmp_path, "rounds: [{}, {prompts: {with: {path: ./more.jsonl}}}]")
    assert loop.steps["prompts@2"]["with"] == {"path": str(tmp_path / "more.jsonl")}


# Mistakes.


def test_rounds_are_a_number_or_a_list(tmp_path: Path):
    """In a file and by --set."""
    for value in ("0", "-1", "true", "2.0", "[]", "many", "{a: 1}", "100", "1000000000"):
        for text, sets in ((f"rounds: {value}", ()), ("", (f"rounds={value}",))):
            (line,) = problems(tmp_path, text, *sets)
            assert "rounds: must be a number from 1 to 99, or a list with an overlay ({} for none)" in line
            assert line.endswith(f"got {yaml.safe_load(value)!r}")


@pytest.mark.parametrize(
    ("text", "sets", "words"),
    [
        (TWO, ["rounds=3"], ["rounds: --set asks for 3, and the recipe lists 2", "at most 2"]),
        ("rounds: [{}, null]", [], ["rounds, entry 2: must be a mapping of step names ({} for none), got None"]),
        ("rounds: [keep, {}]", [], ["rounds, entry 1: must be a mapping of step names", "'keep'"]),
        ("rounds: [{}, {kep: {}}]", [], ["rounds, entry 2: unknown step 'kep'; did you mean 'keep'?"]),
        ("rounds: [{}, {keep: null}]", [], ["rounds, entry 2: keep: must be a mapping", "None"]),
        ("rounds: [{}, {keep: {wiht: {}}}]", [], ["rounds, entry 2: keep.wiht: unknown key; did you mean 'with'?"]),
        ("rounds: [{}, {keep: {with: {treshold: 1.0}}}]", [], ["keep@2.treshold: unknown option", "'threshold'"]),
        ("keep: {from: {earlier: {then: kep}}}", [], ["keep.from.earlier.then: no step 'kep'", "did you mean 'keep'?"]),
        ("sample: {from: {policy: {first: sfd}}}", [], ["sample.from.policy.first: no step 'sfd'", "'sft'"]),
        ("sample: {from: {x: {first: sft}}}", [], ["sample.from.x.then: required", "null for none"]),
        ("sample: {from: {x: {then: sft}}}", [], ["sample.from.x.first: required", "null for none"]),
        ("sample: {from: {policy: {frist: sft}}}", [], ["policy.frist: unknown key; did you mean 'first'?"]),
        ("sample: {from: {policy: {first: [sft]}}}", [], ["sample.from.policy.first: must be the name of a step"]),
        ("sample: {from: {policy: [sft]}}", [], ["sample.from.policy: must be the name of a step, or {first: ...,"]),
        ("rounds: 2\nsample@2: {with: {n: 2}}", [], ["sample@2: a step's name must not contain '@'", "`rounds`"]),
        ("rounds: 2\nkeep: {from: {candidates: sample@3}}", [], ["keep.from.candidates: no step 'sample@3'", "to 2"]),
        ("rounds: 2\nkeep: {from: {candidates: baseline@1}}", [], ["baseline@1", "is one step for all rounds"]),
        ("keep: {from: {candidates: sample@1}}", [], ["no step 'sample@1'", "it has no rounds; write 'sample'"]),
        ("rounds: 2\nkeep: {from: {candidates: smple}}", [], ["keep.from.candidates: no step 'smple'", "'sample'?"]),
        ("rounds: 2\ntarget: evalute", [], ["target: no step 'evalute'", "did you mean 'evaluate'?"]),
        ("rounds: 2\ntarget: evaluate@3", [], ["target: no step 'evaluate@3'", "its rounds are 1 to 2"]),
        ("rounds: 2", ["keep@3.threshold=1.0"], ["--set keep@3.threshold=1.0", "its rounds are 1 to 2"]),
        ("rounds: 2", ["keep@0.threshold=1.0"], ["--set keep@0.threshold=1.0", "its rounds are 1 to 2"]),
        ("rounds: 2", ["kep@2.threshold=1.0"], ["unknown step 'kep@2'; did you mean 'keep'?"]),
        ("rounds: 2", ["keep@two.threshold=1.0"], ["unknown step 'keep@two'; did you mean 'keep'?"]),
        ("", ["keep@1.threshold=1.0"], ["--set keep@1.threshold=1.0", "it has no rounds; write 'keep'"]),
        ("target: baseline", ["rounds=2"], ["rounds: all 2 are the same, for nothing that 'baseline' needs changes"]),
        ("rounds: 2\nkeep: {from: {earlier: optimize}}", [], ["a cycle"]),
    ],
)  # fmt: skip
def test_a_mistake_about_rounds_says_where_what_and_what_to_write(tmp_path: Path, text, sets, words):
    lines = problems(tmp_path, text, *sets)
    assert [word for word in words if not any(word in problem for problem in lines)] == []


def test_then_makes_no_cycle_and_an_input_of_one_round_does(tmp_path: Path):
    """keep reads the last round's keep: no cycle. Sampling from this round's policy is one, reported once."""
    assert plan(tmp_path, "rounds: 3").steps
    lines = problems(tmp_path, "rounds: 3\nsample: {from: {policy: optimize}}")
    assert lines == ("optimize.from: a cycle: optimize@1 -> keep@1 -> sample@1 -> optimize@1",)


def test_a_mistake_that_all_rounds_share_is_told_once(tmp_path: Path):
    """Under the name that stands in the recipe; that of one round with its round."""
    text = "sample: {with: {m: 1}}\nrounds: [{}, {keep: {with: {threshold: high}}}, {}]"
    lines = problems(tmp_path, text)
    assert [problem.split(":")[0] for problem in lines] == ["sample.m", "keep@2.threshold"]


def test_all_mistakes_come_at_once(tmp_path: Path):
    text = "shards: 0\nsample: {from: {policy: {first: 1}}}\nrounds: [{kep: {}}, 3]\nkeep@2: {}"
    assert len(problems(tmp_path, text, "nonsense")) == 6


def test_a_check_sees_each_round_as_it_is_wired(tmp_path: Path):
    """What a stage requires of a wire must hold in every round: here round 1 has none, and the input is required."""
    lines = problems(tmp_path, "rounds: 2\nsample: {from: {policy: {first: null}}}")
    assert lines == ("sample@1.from.policy: required (a model): add `policy` under `from`",)


# Running, and asking.


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[str]]:
    """The loop twice, then the plain recipe, then another with another lr, in one store; and the steps that ran."""
    folder = tmp_path_factory.mktemp("loop")
    store, watcher = Store(folder / "store"), Silent()
    for name, text in (("loop", "rounds: 2"), ("plain", ""), ("other", "optimize: {with: {learning_rate: 2.0}}")):
        loop = plan(folder, text)
        loop.name = name
        run(loop, store, LocalExecutor(), watcher)
    return store, watcher.ran


def ask(store: Store, sql: str, *only) -> list[dict]:
    return query(open_catalog(store, *only), sql).to_pylist()


def test_a_run_with_rounds_goes_round(done: tuple[Store, list[str]]):
    """Round 2's candidates were sampled from round 1's policy, `sft+4` (4 rows kept); mixed with round 1's, 8 rows."""
    store, _ = done
    drawn = "SELECT DISTINCT round, text FROM candidates JOIN runs USING (stage, key) WHERE run = 'loop' AND step = "
    assert ask(store, f"{drawn} 'sample' ORDER BY ALL") == [dict(round=1, text="sft"), dict(round=2, text="sft+4")]
    counted = "SELECT round, count(*) AS n FROM candidates JOIN runs USING (stage, key) WHERE run = 'loop' AND step ="
    assert ask(store, f"{counted} 'keep' GROUP BY round ORDER BY round") == [dict(round=1, n=4), dict(round=2, n=8)]


def test_what_rounds_and_runs_share_is_made_once(done: tuple[Store, list[str]]):
    """`plain` is round 1 of `loop`, so nothing runs for it; `other` trains and evaluates."""
    assert done[1][-2:] == ["optimize", "evaluate"]
    assert len(done[1]) == len(SHARED) + 2 * len(VARYING) + 2


def test_the_catalog_has_the_step_and_the_round_apart(done: tuple[Store, list[str]]):
    rows = ask(done[0], "SELECT step, round FROM runs WHERE run = 'loop' ORDER BY step, round NULLS FIRST")
    assert [(row["step"], row["round"]) for row in rows] == sorted(
        [*((name, None) for name in SHARED), *((name, n) for name in VARYING for n in (1, 2))], key=str
    )
    assert ask(done[0], "SELECT count(round) AS n FROM runs WHERE run = 'plain'") == [dict(n=0)]


def test_a_round_filters_every_view(done: tuple[Store, list[str]]):
    """Its own steps and the shared ones: 4 baseline candidates, 4 drawn, and 8 kept in round 2."""
    count = "SELECT count(*) AS n FROM candidates"
    assert ask(done[0], count, "loop", 1)[0]["n"] == 4 + 4 + 4
    assert ask(done[0], count, "loop", 2)[0]["n"] == 4 + 4 + 8
    assert ask(done[0], "SELECT DISTINCT round FROM runs WHERE step = 'keep'", "loop", 2) == [dict(round=2)]
    for run_name, words in (("loop", "no round 3; it has 1, 2"), ("plain", "it has no rounds")):
        with pytest.raises(WinnowError, match=words):
            open_catalog(done[0], run_name, 3)


def test_a_round_of_a_run_is_named_as_the_leaderboard_names_it(done: tuple[Store, list[str]]):
    count = "SELECT count(*) AS n FROM candidates"
    assert [ask(done[0], count, f"loop@{number}")[0]["n"] for number in (1, 2)] == [12, 16]
    with pytest.raises(WinnowError, match=r"loop@2 --round 1: .*omit"):
        open_catalog(done[0], "loop@2", 1)
    refused = {"loop@3": "no round 3; it has 1, 2", "plain@1": "it has no rounds", "lop@2": "did you mean 'loop'"}
    for name, words in refused.items():
        with pytest.raises(WinnowError, match=words):
            open_catalog(done[0], name)


def test_the_leaderboard_has_a_row_a_round_and_what_the_run_took(done: tuple[Store, list[str]]):
    """seconds: all distinct steps of the run; own_seconds: of those that no other run shares. `plain` owns nothing."""
    store = done[0]
    board = {row["run"]: row for row in ask(store, (QUERIES / "leaderboard.sql").read_text())}
    assert list(board) == ["loop@2", "loop@1", "other", "plain"]
    seconds = {row["key"]: row["seconds"] for row in ask(store, "SELECT key, seconds FROM steps")}
    used = {name: {link["key"] for link in links.values()} for name, links in store.runs().items()}
    for row, name in (("loop@1", "loop"), ("loop@2", "loop"), ("other", "other"), ("plain", "plain")):
        own = used[name] - set().union(*(used[other] for other in used if other != name))
        assert board[row]["seconds"] == pytest.approx(sum(seconds[key] for key in used[name]))
        assert board[row]["own_seconds"] == pytest.approx(sum(seconds[key] for key in own))


def test_queries_name_the_round(done: tuple[Store, list[str]]):
    for query_name, column, expected in (
        ("status", "step", {"sample@1", "sample@2", "sample", "sft"}),
        ("evaluations_by_run", "run", {"loop@1", "loop@2", "plain"}),
    ):
        assert {row[column] for row in ask(done[0], (QUERIES / f"{query_name}.sql").read_text())} >= expected


def test_a_plan_is_shown_round_after_round(done: tuple[Store, list[str]], tmp_path: Path):
    """Each round's target in turn; a step that two rounds share stands once, and is named as what it is."""
    text = "rounds: [{}, {sample: {from: {policy: sft}}, optimize: {with: {learning_rate: 3.0}}}]"
    out = Console(file=io.StringIO(), width=200)
    out.print(show.plan_tree(plan(tmp_path, text), done[0]), highlight=False)
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].endswith("steps, 2 rounds)")
    tops = [line for line in lines if line.startswith(("├── ", "└── "))]
    assert [top.split()[1] for top in tops] == ["evaluate@1", "evaluate@2"]
    assert "cached" in tops[0]
    assert "will run" in tops[1]
    assert any("sample@2 = sample@1 (above)" in line for line in lines)


def test_trace_shows_the_last_round(done: tuple[Store, list[str]]):
    """A prompt's life in round 2; a run without rounds says nothing of them."""
    for name, expected in (("loop", "train, 1 tokens, round 2)"), ("plain", "train, 1 tokens)")):
        out = Console(file=io.StringIO(), width=200)
        trace_prompt(done[0], name, "", out)
        assert expected in out.file.getvalue()  # type: ignore[attr-defined]


def test_spin_mixes_in_the_samples_of_the_round_before(data_dir: Path):
    names = inputs(plan_of(data_dir, recipe="spin"))
    assert names["pool@1"] == {"candidates": "sample@1", "prompts": "prompts"}
    assert names["pool@2"] == {"candidates": "sample@2", "prompts": "prompts", "earlier": "sample@1"}

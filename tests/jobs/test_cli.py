"""Command `winnow`: an error that users can correct ends with exit code 2 and a message with place, value and cure."""

import csv
import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from jobs import recipes
from jobs.__main__ import GROUPS
from jobs.commands.run import _print_next_commands
from jobs.console import VisibleConsole, as_table
from jobs.output import _Visible
from jobs.tables import overruled
from pipeline.config.code import FORMAT
from pipeline.store.manifests import encode_sealed
from pipeline.store.store import Store
from schemas import Model
from tests.conftest import write_jsonl

ROOT = Path(__file__).parents[2]


def missing(facts: list[str], text: str) -> list[str]:
    """Return the facts that are not in a text, whose lines may be wrapped."""
    return [fact for fact in facts if fact not in text and fact not in " ".join(text.split())]


@pytest.fixture
def small(tmp_path: Path, tiny: Model) -> Path:
    """A recipe of two steps: a model that is copied at once, and prompts that no test here reads."""
    shutil.copytree(tiny.folder, tmp_path / "model")
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n')
    file = tmp_path / "small.yaml"
    file.write_text("""
shards: 1
target: prompts
sft: {use: model, with: {path: ./model}}
prompts: {from: {tokenizer: sft}, with: {path: ./p.jsonl}}
""")
    return file


# Help


def test_help_lists_the_commands_in_the_order_of_use(winnow):
    """In groups, by --help and by -h, also of a command; --version prints one; no command is a mistake."""
    code, text = winnow("--help")
    assert code == 0
    lines = [f"╭─ {group} ─" if n == 0 else f"│ {command.__name__} "
             for group, commands in GROUPS.items() for n, command in enumerate((None, *commands))]  # fmt: skip
    order = [text.index(line) for line in lines]
    assert order == sorted(order)
    assert "--install-completion" in text
    assert winnow("-h") == (0, text)
    assert winnow("plan", "-h") == winnow("plan", "--help")
    code, text = winnow("--version")
    assert code == 0
    assert text.startswith("winnow 0.")
    assert winnow()[0] == 2


def test_a_gpu_and_no_dtype_is_said(winnow, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the names of the steps. Nothing is said where a dtype is set: a step in float32 is then a choice."""
    command = ("plan", "sft", "--config", data_dir / "demo.yaml")
    monkeypatch.setattr("jobs.commands.run.GPU", tmp_path)
    steps = re.search("dtype: not set for (.*), which", winnow(*command)[1])[1].split(", ")
    assert "sft" in steps
    others = re.search("dtype: not set for (.*), which", winnow(*command, "--set", "sft.dtype=float32")[1])[1].split(
        ", "
    )
    assert {*others} == {*steps} - {"sft"}
    assert "dtype: not set" not in winnow(*command, "--set", "dtype=float32")[1]
    monkeypatch.setattr("jobs.commands.run.GPU", tmp_path / "none")
    assert "dtype: not set" not in winnow(*command)[1]


def test_plan_shows_what_a_part_would_run(winnow, data_dir: Path, finished: Path, tmp_path: Path):
    """--until, --from, --only and --force, as `run` takes them; and what they leave out."""
    words = ("plan", "rso", "--config", data_dir / "demo.yaml")

    def statuses(*part: str | Path) -> dict[str, str]:
        code, text = winnow(*words, *part)
        assert code == 0
        found = re.findall(r"── (?:\w+: )?(\w+)(?: \w+)? [0-9a-f]{16} (cached|will run again|will run|not run)", text)
        return dict(found)

    until = statuses("--until", "sample")
    assert {name for name, status in until.items() if status == "will run"} == {"base", "demonstrations",
        "sft_examples", "sft", "prompts", "sample"}  # fmt: skip
    assert until["optimize"] == "not run"
    shutil.copytree(finished, tmp_path / "done")
    store = ("--store", tmp_path / "done")
    code, text = winnow(*words, *store, "--force", "pair")
    assert (code, missing(["run needs what would be deleted"], text)) == (2, [])
    mine = (*store, "--name", "run")
    again = {name for name, status in statuses(*mine, "--force", "pair").items() if status == "will run again"}
    assert {"pair", "examples", "optimize", "evaluate"} <= again
    assert "sample" not in again
    assert {*statuses(*mine).values()} == {"cached"}


@pytest.mark.parametrize("recipe", ["rso", "alright"])
def test_held_out_prompts_may_be_a_file_of_their_own(winnow, data_dir: Path, tmp_path: Path, recipe: str):
    """By the lines of the page: all that evaluates reads that file, and nothing that trains does."""
    page = (ROOT / "jobs/recipes/README.md").read_text()
    (lines,) = (block for block in re.findall(r"```yaml\n(.*?)```", page, re.S) if "./test.jsonl" in block)
    for name in ("test.jsonl", "prompts.jsonl"):
        (tmp_path / name).write_bytes((data_dir / "prompts.jsonl").read_bytes())
    (tmp_path / "test.yaml").write_text(lines)
    configs = [data_dir / "demo.yaml", tmp_path / "test.yaml"]
    plan = recipes.plan_named(recipe, configs, ["evaluations=[evaluate_as_sampled, evaluate_greedy]"])
    readers = {
        source.name: {step.name for step in plan.steps if source in step.inputs.values()}
        for source in plan.steps
        if source.entry.name == "prompts"
    }
    evaluating = {
        name for name in readers["heldout_prompts"] if name.startswith(("eval", "judge", "demonstration_heldout"))
    }
    assert readers["heldout_prompts"] == evaluating
    assert {"evaluate", "evaluate_as_sampled", "evaluate_greedy", "judge", "eval_sample"} <= evaluating
    assert not [name for name in readers.get("prompts", ()) if name.startswith(("eval", "judge"))]
    words = ("plan", recipe, "--config", configs[0], "--config", configs[1])
    code, text = winnow(*words, "--set", "eval_sample.split=train")
    assert (code, missing(["eval_sample: split: train", "holds out all"], text)) == (2, []), text


def test_with_held_out_prompts_of_their_own_nothing_is_held_out_of_own_candidates(data_dir: Path, tmp_path: Path):
    """All of the completions are trained on, and the policy is evaluated on the other file."""
    (tmp_path / "test.yaml").write_text(
        f"heldout_prompts: {{with: {{path: {data_dir / 'prompts.jsonl'}}}}}\n"
        f"own_candidates: {{with: {{path: {data_dir / 'prompts.jsonl'}, response: demonstration}}}}"
    )
    plan = recipes.plan_named("own_completions", [data_dir / "demo.yaml", tmp_path / "test.yaml"], [])
    steps = {step.name: step for step in plan.steps}
    assert steps["own_candidates"].options["heldout"] == 0.0
    readers = {step.name for step in plan.steps if steps["heldout_prompts"] in step.inputs.values()}
    assert readers >= {"evaluate", "judge", "eval_sample", "eval_logp"}
    assert "prompts" not in steps


@pytest.mark.parametrize("mistake", ["prompts.heldout=0.0", "eval_sample.max_tokens=100000"])
def test_what_only_steps_that_are_left_out_need_is_not_checked(winnow, data_dir: Path, tmp_path: Path, mistake: str):
    """Nor are they part of the run; `--only` leaves out as much, and a sweep too."""
    words = ("plan", "rso", "--config", data_dir / "demo.yaml", "--set", mistake)
    for part in (("--until", "optimize"), ("--over", "optimize.seed=0,1", "--until", "optimize")):
        code, text = winnow(*words, *part)
        assert (code, missing(["what follows optimize is left out", "eval_sample"], text)) == (0, []), text
    code, text = winnow("run", *words[1:], "--only", "base")
    assert (code, [*Store(tmp_path / "store").runs().popitem()[1]]) == (0, ["base"]), text


@pytest.mark.filterwarnings("always")
def test_a_warning_names_all_steps_that_it_concerns_and_none_that_the_command_leaves_out(winnow, data_dir: Path):
    """Once per command, however many recipes say the same of steps of one name."""
    words = ("--config", data_dir / "demo.yaml", "--set", "ranker.learning_rate=1", "--set", "optimize.learning_rate=1")
    _, text = winnow("plan", "rso", "ipo", *words)
    assert [line.partition(": learning_rate: 1 is so high")[0] for line in text.splitlines() if "so high" in line] == [
        "winnow: ranker, optimize"
    ]
    _, text = winnow("plan", "rso", *words, "--until", "reward")
    assert "winnow: ranker: learning_rate: 1 is so high" in text
    assert "so high" not in winnow("plan", "rso", *words, "--until", "sample")[1]


@pytest.mark.filterwarnings("always")
def test_what_a_plan_says_of_first_prompts_is_not_said_again_by_the_run(winnow, tiny, tmp_path: Path):
    (tmp_path / "as_written.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    chats = [[{"role": role, "content": f"Hi from {role}."}] for role in ("user", "usr")]
    write_jsonl(tmp_path / "chats.jsonl", [{"prompt": chat} for chat in chats])
    (tmp_path / "odd.yaml").write_text(
        f"target: prompts\nbase: {{use: model, with: {{path: {tiny.folder}, chat_template: ./as_written.jinja}}}}\n"
        "prompts: {from: {tokenizer: base}, with: {path: ./chats.jsonl}}\n"
    )
    code, text = winnow("run", "odd.yaml", "--store", "store")
    assert (code, text.count("has the role 'usr'"), missing(["prompts: path: 1 of the first 2"], text)) == (0, 1, [])


@pytest.mark.parametrize(
    "option", ["topp=0.5", "max_new_tokens=8", "max_tokens=0", "learning_rate=1", "gpu_memory_utilization=0.5"]
)
def test_a_wrong_option_is_named_at_the_step_where_it_is_written(option, winnow, data_dir: Path):
    """Not at those that are like it, nor at those that are like these."""
    code, text = winnow("plan", "rso", "--config", data_dir / "demo.yaml", "--set", f"sample.{option}")
    assert (code, text.count(f" sample.{option.partition('=')[0]}"), "eval_" in text) == (2, 1, False), text


def test_a_step_that_nothing_reads_is_named_where_one_like_it_is_required(winnow, tmp_path: Path):
    """Somebody calls the model to start from `policy`, and the recipe calls it `sft`."""
    (tmp_path / "my.yaml").write_text(f"policy: {{use: model, with: {{path: {tmp_path}}}}}\n")
    code, text = winnow("plan", "dpo", "--config", "my.yaml")
    assert (code, missing(["sft.path: required", "step policy sets `path`", "call it sft"], text)) == (2, []), text


def test_a_judge_under_judge_is_told_to_stand_under_judges(winnow, data_dir: Path, tmp_path: Path):
    (tmp_path / "my.yaml").write_text("judge: {llama: {ranker: {use: model, with: {path: ./rm}}}}\n")
    code, text = winnow("plan", "rso", "--config", data_dir / "demo.yaml", "--config", "my.yaml")
    assert (code, missing(["judge.llama: unknown key", "`judges: {llama: ...}`"], text)) == (2, []), text


def test_a_mistake_of_several_steps_is_named_once(winnow, data_dir: Path):
    _, text = winnow("plan", "rso", "--config", data_dir / "demo.yaml", "--set", "prompts.heldout=0.0")
    (line,) = [line for line in text.splitlines() if "holds out none" in line]
    assert "eval_sample, eval_baseline: split: heldout" in line


def test_a_plan_of_a_part_that_cannot_run_is_refused(winnow, data_dir: Path):
    code, text = winnow("plan", "rso", "--config", data_dir / "demo.yaml", "--only", "pair")
    assert code == 2
    assert missing(["--only pair", "not finished", "--until sample"], text) == []


def test_a_tree_is_whole_in_a_pipe(winnow, data_dir: Path, finished: Path, tmp_path: Path):
    """A reason to run again may be longer than a line of any width."""
    shutil.copytree(finished, tmp_path / "store")
    path = data_dir / ("p" * 180 + ".jsonl")
    shutil.copyfile(data_dir / "prompts.jsonl", path)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    text = winnow("plan", "rso", "--config", data_dir / "demo.yaml", "--options", "--set", f"prompts.path={path}")[1]
    assert f"path: {path} (--set)" in text


def test_status_of_one_run(winnow, finished: Path):
    code, text = winnow("status", "--store", finished, "--run", "run")
    assert (code, missing(["optimize", "finished"], text)) == (0, [])
    code, text = winnow("status", "--store", finished, "--run", "runn")
    assert (code, missing(["runn", "'run'"], text)) == (2, [])


def test_a_trace_shows_the_pairs_of_the_data(winnow, data_dir: Path, finished: Path, tmp_path: Path):
    """Nothing selects them, so that no other section has their texts."""
    shutil.copytree(finished, tmp_path / "store")
    assert winnow("run", "dpo", "--config", data_dir / "demo.yaml", "--until", "examples")[0] == 0
    code, text = winnow("trace", "dpo")
    assert code == 0
    section = text[text.index("responses of pairs") :]
    assert missing(["chosen", "Gladly. I have booked a", "rejected", "Um, a"], section[:4000]) == []


@pytest.mark.parametrize(("beta", "other"), [(0.1, "1.0"), (0.5, "0.1")])
def test_another_beta_is_another(capsys, data_dir: Path, beta: float, other: str):
    sets = [f"select.rule.beta={beta}"]
    (plan,) = recipes.plans(["rso"], [data_dir / "demo.yaml"], sets)
    _print_next_commands(plan, "rso", [data_dir / "demo.yaml"], sets, "store")
    assert f"select.rule.beta={other} " in capsys.readouterr().out


# Mistakes


def test_an_unknown_recipe_in_a_process_of_its_own(tmp_path: Path):
    """What a shell script sees: exit code 2, the nearest name, no traceback, no file."""
    command = [sys.executable, "-m", "jobs", "plan", "rrfh"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    assert done.returncode == 2
    assert "unknown recipe 'rrfh', and no YAML file; did you mean 'rrhf'?" in text
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


MISTAKES = [
    ("plan rso --set selct.k=4", ["rso: --set selct.k=4", "unknown step 'selct'", "'select'"]),
    ("plan rso --set select.zzzz=4", ["rso: select.zzzz: unknown option", "known: finished, rule, scale, seed"]),
    ("plan rso --set select.rule.beat=4", ["rso: select.rule.beat: unknown option", "did you mean 'beta'?"]),
    ("plan rso --set select.rule.k=four", ["rso: select.rule.k", "integer", "'four'"]),
    ("plan rso --set select.rule.k=0", ["rso: select.rule.k", "greater than 0", "got 0"]),
    ("plan rso --set optimize.beta=0.2", ["optimize.beta: unknown option; set optimize.objective.beta"]),
    ("plan rso --set select.beta=0.2", ["select.beta: unknown option; set select.rule.beta"]),
    ("plan rso --set optimize.words=3", ["optimize.words: unknown option; set optimize.by.words"]),
    ("plan rso --set sample.learning_rate=1e-5", ["sample.lea", "`optimize: {with: {learning_rate: 1e-05}}`"]),
    ("plan rso --set ranker.use=pattern", ["ranker.OPTION=VALUE", "`ranker: {use: pattern}` in a config"]),
    ("plan rso --set reward.from.ranker=sft", ["`reward: {from: {ranker: sft}}` in a config"]),
    ("plan rso --set optimize.with.epochs=2", ["write --set optimize.epochs=2,"]),
    ("plan rso --set beta=0.2", ["--set beta=0.2: must be", "optimize.objective.beta", "select.rule.beta"]),
    ("plan rso --set learning_rate=1", ["--set learning_rate=1: must be", "optimize.learning_rate"]),
    ("plan rso --set select", ["--set select", "step.option=value"]),
    (
        "plan rso --set judges.p.against=sft",
        ["--set judges.p.against=sft", "a config", "`judges: {p: {against: sft}}`"],
    ),
    ("plan rso --set select.rule.k=[1", ["--set select.rule.k=[1", "not YAML"]),
    ("plan rso --set optimize.objective=hing", ["optimize.objective", "'hing'", "'hinge'"]),
    ("plan rso --set sample.engine=vlm", ["sample.engine", "'vllm', 'transformers', 'fake' or 'endpoint'", "'vlm'"]),
    ("plan rso --set target=evaluat", ["target: no step 'evaluat'", "did you mean 'evaluate'?"]),
    (
        "plan rso --set prompts.path=gone.jsonl",
        ["prompts.path: no such file", "gone.jsonl; a path beside the config begins with ./"],
    ),
    ("run rso ipo --set select.rule.k=0", ["rso, ipo: select.rule.k"]),
    ("run rso nope", ["unknown recipe 'nope'"]),
    ("run rso rafft", ["unknown recipe 'rafft', and no YAML file; did you mean 'raft'?"]),
    ("plan slic", ["unknown recipe 'slic'", "did you mean 'slic_direct' or 'slic_sample_rank'?"]),
    ("plan rso --set sample.max_tokens=100000", ["sample", ": max_tokens: 100,000", "context"]),
    ("run rso --until=", ["--until: is empty"]),
    ("run rso --only=", ["--only: is empty"]),
    ("run rso --force=", ["--force: is empty"]),
    ("plan rso rso", ["rso: both would be run 'rso'"]),
    ("plan rso --set optimize.lr=1", ["optimize.lr: unknown option; it is called 'learning_rate' now"]),
    ("plan rso --set optimize.recompute=1", ["it is called 'gradient_checkpointing' now"]),
    ("run rso --until evaluat", ["--until evaluat: no step 'evaluat' in rso", "did you mean 'evaluate'?"]),
    ("run rso --until sample --from pair", ["--until sample --from pair: give one of them"]),
    ("plan rso --set sample.max_num_seqs=8", ["sample.max_num_seqs: unknown", "`engine_options: {max_num_seqs: 8}`"]),
    ("plan rso --set sample.tensor_parallel_size=2", ["unknown option", "set `tensor_parallel` in the profile"]),
    ("plan rso --set optimize.bf16=true", ["optimize.bf16: unknown option", "'dtype'"]),
    ("plan rso --set optimize.gradient_accumulation_steps=4", ["unknown option", "'tokens_per_pass'"]),
    ("plan rso --set sample.num_generations=4", ["sample.num_generations: unknown option", "'n'"]),
    ("plan rso --set prompts.prompt=question", ["no column 'question' (option `prompt`)"]),
    ("plan rso --set sample.temperature=0", ["sample.temperature: must be greater than 0", "`top_k: 1`", "got 0"]),
    ("plan rso --set sample.temperature=0.0", ["set `top_k: 1`"]),
    (
        "plan rso --set prompts.heldout=0.0",
        ["eval_sample, eval_baseline: split: heldout", "`heldout: 0.0`", "--until optimize"],
    ),
    ("plan rso --set prompts.heldout=0.0 --until judge", ["eval_sample, eval_baseline: split: heldout"]),
    ("plan rso --set prompts.heldout=0.0 --set sample.n=0 --until optimize", ["sample.n: must be"]),
]


def test_an_option_for_one_rule_of_several_recipes_is_written_with_its_name(winnow, data_dir: Path, tmp_path: Path):
    """Laid over recipes with another rule, the refusal says what to write, and that plans them all."""

    def plan(rule: str) -> tuple[int, str]:
        (tmp_path / "k.yaml").write_text(f"select: {{with: {{rule: {rule}}}}}")
        return winnow(
            "plan", "rso", "rest", "raft", "--config", data_dir / "demo.yaml", "--config", tmp_path / "k.yaml"
        )

    code, text = plan("{k: 4}")
    assert code == 2
    (rest,) = re.findall("rest: (select.rule.k: unknown option.*)", text)
    (raft,) = re.findall("raft: (select.rule.k: .*says 4.*)", text)
    for line in (rest, raft):
        (cure,) = re.findall(r"\{name: \w+, k: 4\}", line)
    assert "rejection_sample, gumbel_top_k, best_of, plain" in rest
    code, text = plan(cure)
    assert code == 0, text


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ("learning_rate: 1.0e-5", "`optimize: {with: {learning_rate: 1e-05}}`"),
        ("lr: 1.0e-5", "`optimize: {with: {learning_rate: 1e-05}}`"),
        ("optimize: {learning_rate: 1.0e-5}", "`optimize: {with: {learning_rate: 1e-05}}`"),
        ("optimize: {beta: 0.1}", "`optimize: {with: {objective: {beta: 0.1}}}`"),
        ("sample: {with: {learning_rate: 1.0e-5}}", "`optimize: {with: {learning_rate: 1e-05}}`"),
        ("select: {temperature: 0.7}", "`sample: {with: {temperature: 0.7}}`"),
        ("dtype: 16", "dtype: must be 'float32' or 'bfloat16', got 16\n"),
        ("max_tokens: 64", "(or likewise demonstrations.max_tokens, "),
    ],
)
def test_an_option_in_the_wrong_place_is_refused_with_the_line_to_write(winnow, data_dir: Path, config: str, line: str):
    Path("mine.yaml").write_text(config)
    code, text = winnow("plan", "rso", "--config", data_dir / "demo.yaml", "--config", "mine.yaml")
    assert (code, missing([line], text)) == (2, []), text


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ("rounds: [{optimize: {epochs: 3}}, {}]", ["rounds, entry 1: optimize.epochs: ", "{with: {epochs: 3}}`"]),
        ("pair: {with: {epochs: 3}}\nselect: {with: {epochs: 3}}", ["select.epochs, pair.epochs: ", "`optimize: {"]),
    ],
)
def test_the_line_to_write_is_of_the_round_and_of_all_steps_with_the_option(winnow, data_dir: Path, config, facts):
    """And of the step that is called like its stage, in rounds too."""
    Path("mine.yaml").write_text(config)
    code, text = winnow("plan", "raft", "--config", data_dir / "demo.yaml", "--config", "mine.yaml")
    assert (code, missing(facts, text)) == (2, []), text


def test_a_mistake_in_a_recipe_names_place_value_and_cure(winnow, data_dir: Path):
    """All recipes are checked, and nothing has run."""
    for words, facts in MISTAKES:
        code, text = winnow(*words.split(), "--config", data_dir / "demo.yaml")
        assert (code, missing(facts, text)) == (2, []), words
    assert not Path("store").exists()


def test_a_mistake_in_the_command_line_has_no_traceback(winnow):
    """An unknown option, a missing argument, a wrong choice: 2, as with every command of a shell."""
    for words, facts in [
        ("plan", ["recipe"]),
        ("frobnicate", ["frobnicate"]),
        ("plan rso --sets a.b=1", ["--sets"]),
        ("run rso --executor cloud", ["cloud", "in-process", "ray"]),
        ("run rso --executor ray --workers 0", ["--workers"]),
        ("run rso --executor in-process --address auto", ["only ray has an address"]),
        ("run rso --workers 4", ["--workers 4", "`--executor ray`"]),
        ("sql x --format xml", ["xml", "csv"]),
    ]:
        code, text = winnow(*words.split())
        assert (code, missing(facts, text.lower())) == (2, []), words


def test_a_config_in_place_of_a_recipe_is_said(winnow, data_dir: Path):
    """A file that extends nothing and says of no step to end with what it reads."""
    code, text = winnow("plan", str(data_dir / "demo.yaml"))
    assert (code, missing(["extends no recipe", "plan rso --config", "demo.yaml"], text)) == (2, [])


@pytest.mark.filterwarnings("always")
def test_a_selection_that_keeps_everything_is_said(winnow, data_dir: Path):
    """k of the rule is not below n of the draws; of candidates of another system, n is not known."""
    words = ("plan", "rso", "--config", str(data_dir / "demo.yaml"), "--set", "sample.n=8")
    text = winnow(*words, "--set", "select.rule.k=8")[1]
    assert missing(["keeps k = 8", "n = 8 per prompt", "`sample.n` higher"], text) == []
    assert "keeps k" not in winnow(*words, "--set", "select.rule.k=4")[1]


@pytest.mark.filterwarnings("always")
def test_an_engine_that_rounds_what_was_trained_is_said(winnow, data_dir: Path):
    """Sampling in bfloat16 from a policy saved in fp32, unless what is saved is what the engine reads."""
    words = ("plan", "raft", "--config", str(data_dir / "demo.yaml"), "--set", "sample.dtype=bfloat16")
    assert (
        missing(["sample", ": dtype: bfloat16", "save_dtype: float32", "save_rounding: stochastic"], winnow(*words)[1])
        == []
    )
    saved = ("--set", "optimize.save_dtype=bfloat16", "--set", "sft.save_dtype=bfloat16")
    assert "the engine rounds" not in winnow(*words, *saved)[1]


def test_missing_data_models_and_configs_are_named(winnow, data_dir: Path, small: Path, tmp_path: Path):
    """Data and models are the user's: the message says which steps need them, and how to give them."""
    code, text = winnow("plan", "rso")
    facts = ["sft.path: required", "prompts: give either `path`", "`--config my.yaml` names your data and models"]
    assert (code, missing(facts, text)) == (2, [])
    code, text = winnow("plan", "rso", "--config", "nowhere.yaml")
    assert (code, missing(["--config nowhere.yaml"], text)) == (2, [])

    moved = Path(shutil.copytree(data_dir, tmp_path / "moved"))
    (moved / "prompts.jsonl").unlink()
    code, text = winnow("run", "rso", "--config", moved / "demo.yaml")
    assert (code, missing([f"prompts.path: no such file or folder: {moved / 'prompts.jsonl'}"], text)) == (2, [])

    (small.parent / "model" / "tokenizer.json").unlink()
    code, text = winnow("plan", small)
    assert (code, missing([f"sft.path: model folder {small.parent / 'model'} has no tokenizer"], text)) == (2, [])
    assert not Path("store").exists()


def test_an_error_of_the_disk_names_file_and_cure(winnow, small: Path, monkeypatch: pytest.MonkeyPatch):
    """The system's own message of a full disk names no file."""

    def write_bytes(path: Path, content: bytes) -> None:
        if content:  # an empty file, with which a run tries the store, still has room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.touch()

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    code, text = winnow("run", small, "--until", "sft", "--store", "full")
    assert code == 2
    assert "No space left on device" in text
    assert "/full/" in "".join(text.split())
    assert "free some space there, or set --store" in text
    assert "resume with:" in text


def test_a_store_without_runs_is_an_error(winnow):
    """A misspelt folder, and one that is no store: no empty table, and nothing is created."""
    for words in (["status"], ["sql", "SELECT 1"], ["report"], ["trace", "nothing"]):
        code, text = winnow(*words, "--store", "nowhere")
        assert (code, Path("nowhere").exists()) == (2, False)
        assert "--store nowhere: no such folder" in text
    Path("store").mkdir()
    code, text = winnow("status")
    assert (code, list(Path("store").iterdir())) == (2, [])
    assert "--store store: no runs in this folder; `winnow run` creates them" in text


# plan and run


def test_plan_prints_every_step_with_its_key(winnow, data_dir: Path):
    """All steps of all recipes; nothing is created by looking."""
    code, text = winnow("plan", "rso", "dpo", "--config", data_dir / "demo.yaml")
    assert code == 0
    for plan in recipes.plans(["rso", "dpo"], [data_dir / "demo.yaml"], []):
        assert f"{plan.name}  ({len(plan.steps)} steps)" in text
        for step in plan.steps:
            line = next(line for line in text.splitlines() if step.key in line)
            assert step.name in text
            assert "will run: never run" in line
    assert not Path("store").exists()


def test_plan_says_where_options_come_from(winnow, data_dir: Path, tmp_path: Path):
    """With --options each that is not a default; always what a config or --set says in place of the recipe."""
    config = tmp_path / "mine.yaml"
    config.write_text("select: {with: {rule: {k: 6}}}\nreward: {with: {orders: both}}")
    words = (
        "plan",
        "rrhf",
        "--config",
        data_dir / "demo.yaml",
        "--config",
        config,
        "--set",
        "select.seed=3",
    )
    code, text = winnow(*words)
    assert code == 0
    assert missing(["select.rule.k: 6 (", "mine.yaml), not 8 of the recipe"], text) == []
    assert "orders" not in text
    text = winnow(*words, "--options")[1]
    assert missing(["rule.name: plain (rrhf.yaml)", "seed: 3 (--set)", "mine.yaml)"], text) == []
    assert "orders: both" not in text


def test_what_several_steps_have_in_place_of_the_recipe_is_one_line(data_dir: Path, tmp_path: Path):
    """As of `sample`, whose options other steps take; another name of the function that the recipe has is none."""
    config = tmp_path / "mine.yaml"
    config.write_text("sample: {with: {temperature: 0.9}}\noptimize: {with: {objective: {name: dpo}}}")
    sets = ["evaluations=[evaluate_as_sampled]"]
    lines = overruled(recipes.plan_named("rso", [data_dir / "demo.yaml", config], sets))
    (line,) = (line for line in lines if "temperature" in line)
    assert line.startswith("temperature: 0.9 (")
    assert "mine.yaml), not 0.7 of the recipe, in 3 steps: sample, " in line
    assert not any("objective.name" in line for line in lines)


def test_plan_says_what_is_cached_and_what_will_run_and_why(winnow, small: Path):
    """Nothing is there; then the model is, and a second run computes nothing; then the model's folder has changed."""
    sft, _ = (step.key for step in recipes.plans([str(small)], [], [])[0].steps)
    assert f"{sft} will run: never run" in winnow("plan", small)[1]
    code, text = winnow("run", small, "--set", "target=sft")
    assert (code, missing(["running", "finished"], text)) == (0, [])
    code, text = winnow("run", small, "--set", "target=sft")
    assert (code, "cached" in text, "running" in text) == (0, True, False)

    text = winnow("plan", small)[1]
    assert f"{sft} cached" in text
    assert text.count("will run: never run") == 1
    (small.parent / "model" / "generation_config.json").write_text("{}")
    text = winnow("plan", small)[1]
    assert sft not in text
    assert "will run: options.path.content: " in text


def test_run_until_a_step(winnow, small: Path):
    """That step and what it needs, under the name of the whole run."""
    code, _ = winnow("run", small, "--until", "sft")
    assert code == 0
    text = winnow("ls", "small")[1]
    assert ("finished" in text, "not run" in text) == (True, True)


def test_an_error_of_rays_ends_with_code_2_and_the_command_to_resume(winnow, small: Path, monkeypatch):
    """Raised by Ray itself, outside a task: its traceback would say nothing of the machine that has failed."""

    from ray.exceptions import RaySystemError

    def wait(self, seconds):
        raise RaySystemError("System error: broken pipe")

    monkeypatch.setattr("pipeline.execution.executor.LocalExecutor.wait", wait)
    code, text = winnow("run", small)
    assert code == 2
    assert (
        missing(["RaySystemError", "broken pipe", "finished parts are kept", "resume with:", f"run {small}"], text)
        == []
    )


def test_a_run_that_evaluates_nothing_prints_no_leaderboard(winnow, finished: Path, data_dir: Path, tmp_path: Path):
    """The evaluations of other runs are no answer to it; a run that evaluates is shown beside them."""
    shutil.copytree(finished, tmp_path / "store")
    words = ("run", "rso", "--config", data_dir / "demo.yaml")
    assert "leaderboard" not in winnow(*words, "--set", "target=prompts")[1]
    text = winnow(*words)[1]
    assert missing(["leaderboard", "│ run "], text) == []


def test_an_override_can_be_longer_than_a_file_name(winnow, small: Path):
    """A path in --set has slashes too; both are in the run's name."""
    deep = shutil.copytree(small.parent / "model", small.parent / ("d" * 120) / ("e" * 120))
    (deep / "generation_config.json").write_text("{}")  # else it is the same model, and no other run
    assert winnow("run", small, "--set", "target=sft", "--set", f"sft.path={deep}")[0] == 0
    code, text = winnow("sql", "SELECT step FROM runs", "--format", "csv")
    assert (code, text.count("sft")) == (0, 1)
    for words in (["sql", "SELECT 1", "--run"], ["trace"]):
        code, text = winnow(*words, "smal")
        assert (code, missing(["no run 'smal'", "small[target=sft,path="], text)) == (2, [])


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(
    ("number", "code", "word", "words"),
    [
        (signal.SIGINT, 130, "interrupted", []),
        (signal.SIGTERM, 143, "terminated", []),
        pytest.param(signal.SIGTERM, 143, "terminated", ["--executor", "ray"], marks=pytest.mark.bench),
    ],
)
def test_a_signal_ends_a_run_and_keeps_finished_parts(tmp_path: Path, data_dir: Path, number, code, word, words):
    """Exit code 128 and the signal, as in every shell, the command as it was typed, and no traceback.

    On Ray, whose own handler of SIGTERM would end the process without a word, once a step is finished.
    """
    command = [sys.executable, "-m", "jobs", "run", "rso", "--config", str(data_dir / "demo.yaml"), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            if ("finished" if words else "running") in line:
                process.send_signal(number)
                break
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == code, rest
    assert missing([word, "finished parts are kept"], rest) == []
    line = next(line for line in rest.splitlines() if "resume with: " in line)
    assert shlex.split(line.partition("resume with: ")[2]) == command
    assert "Traceback" not in rest


# sql


@pytest.fixture
def store(winnow) -> Store:
    """The default store of the command, with a run of no step."""
    store = Store(Path("store"))
    store.link_run("nothing", [])
    return store


def test_sql_prints_a_table_csv_or_json(winnow, store: Store):
    """The same two rows three times; a comma, a quote and a null survive."""
    statement = "SELECT * FROM (VALUES (1, 'a, \"b\"', 0.5), (2, NULL, 123456.789::DOUBLE)) AS t(n, text, x) ORDER BY n"
    code, text = winnow("sql", statement)
    assert (code, missing(["n", "text", 'a, "b"', "0.5", "1.235e+05"], text)) == (0, [])
    text = winnow("sql", statement, "--format", "json")[1]
    assert [json.loads(line) for line in text.splitlines()] == [
        {"n": 1, "text": 'a, "b"', "x": 0.5},
        {"n": 2, "text": None, "x": 123456.789},
    ]
    text = winnow("sql", statement, "--format", "csv")[1]
    assert list(csv.reader(io.StringIO(text))) == [["n", "text", "x"], ["1", 'a, "b"', "0.5"], ["2", "", "123456.789"]]


def test_sql_prints_values_of_every_kind(winnow, store: Store):
    """Dates, decimals, bytes, lists: whatever DuckDB returns is printed."""
    for statement in [
        "SELECT DATE '2026-01-01' AS day, now() AS moment, INTERVAL 3 DAYS AS span, TIME '12:00' AS hour",
        "SELECT 1.5::DECIMAL(4, 2) AS money, 1::HUGEINT AS big, 'nan'::DOUBLE AS x, 'x'::BLOB AS raw, uuid() AS id",
        "SELECT [1, 2] AS list, {'a': 1} AS struct, MAP {'k': 1} AS map",
        "SELECT sum(n) AS total FROM range(3) AS t(n)",
        "SELECT * FROM prompts",
        "SELECT '[red]not a colour[/]' AS text",
        "DESCRIBE prompts",
    ]:
        for form in ("table", "json", "csv"):
            code, text = winnow("sql", statement, "--format", form)
            assert code == 0, statement
            assert text.strip() or form == "json"
            if "total" in statement and form == "json":
                assert json.loads(text) == {"total": 3}
            if "colour" in statement:
                assert "[red]not a colour[/]" in text


def test_sql_that_is_wrong_or_not_allowed_is_refused(winnow, store: Store):
    """An unknown name says where names are described, and these statements are answered."""
    for statement in ("SELEC 1", "DROP TABLE runs", "SELECT * FROM read_text('/etc/passwd')", ""):
        code, text = winnow("sql", statement)
        assert code == 2
        assert "winnow: sql: " in text
    for wrong in ("SELECT * FROM nowhere", "SELECT nothing FROM candidates"):
        assert missing(["SHOW TABLES", "DESCRIBE candidates"], winnow("sql", wrong)[1]) == []
    assert "selections" in winnow("sql", "SHOW TABLES")[1]
    assert "finish_reason" in winnow("sql", "DESCRIBE candidates")[1]


HOSTILE = "a\x1b[31m\x1b]0;title\x07\x9b2J\x7f\rb\tc\nd"
HARMLESS = r"a\x1b[31m\x1b]0;title\x07\x9b2J\x7f\x0db"


def test_control_sequences_are_written_out(winnow, store: Store):
    """In tables, text, markup, trees and errors; in CSV and JSON for a terminal, and not where they are data."""
    codes = "".join(f" || chr({ord(letter)})" for letter in HOSTILE)
    code, text = winnow("sql", f"SELECT ''{codes} AS x")
    assert (code, HARMLESS in text, "\x1b" in text) == (0, True, False)
    _, text = winnow("sql", f"SELECT ''{codes} AS x", "--format", "csv")
    assert HOSTILE in text
    code, text = winnow("plan", "\x1b[31m.yaml")
    assert (code, r"\x1b[31m.yaml" in text, "\x1b" in text) == (2, True, False)
    out = io.StringIO()
    console = VisibleConsole(file=out, width=80)
    console.print(HOSTILE, markup=False)
    console.print(escape(HOSTILE))
    console.print(Tree(escape(HOSTILE)))
    assert (out.getvalue().count(HARMLESS), "\x1b" in out.getvalue()) == (3, False)
    visible_csv = io.StringIO()
    _Visible(visible_csv).write(HOSTILE)
    assert visible_csv.getvalue() == HARMLESS + "\tc\nd"


def test_brackets_of_a_table_are_printed():
    """They are no markup of rich: neither in a title nor in a column's name nor in a cell."""
    out = io.StringIO()
    Console(file=out, width=80).print(as_table(pa.table({"low [high]": ["[x]"]}), "median [least, most]"))
    assert missing(["median [least, most]", "low [high]", "[x]"], out.getvalue()) == []


def test_plan_and_run_say_which_code_changed_without_its_version(winnow, data_dir, finished, tmp_path):
    """`matches` had another source when `pair` ran: its name, its version and the ways out; nothing reruns."""
    shutil.copytree(finished, tmp_path / "store")
    (manifest,) = (tmp_path / "store").glob("pair/*/manifest.json")
    content = json.loads(manifest.read_text())
    assert content["code"]["matches"] != FORMAT + "0" * 12
    words = ("rso", "--config", data_dir / "demo.yaml", "--store", tmp_path / "store")
    assert "code changed" not in winnow("plan", *words)[1]
    content["code"]["matches"] = FORMAT + "0" * 12
    content["commit"] = "0" * 40  # of this one's commit, nothing would be compared
    manifest.write_bytes(encode_sealed(content))
    for command in ("plan", "run"):
        code, text = winnow(command, *words)
        assert code == 0
        (line,) = (line for line in text.splitlines() if "code changed" in line)
        for fact in ("pair", "`matches`", "version is still 1", "--force pair", "winnow adopt"):
            assert fact in line
        assert "running" not in text


@pytest.mark.parametrize(
    "words",
    [
        ("status", "--store", ""),
        ("status", "--address", ""),
        ("sql", "SELECT 1", "--run", ""),
        ("sql", "SELECT 1", "--out", ""),
        ("run", "rso", "--profile", ""),
        ("run", "rso", "--until", ""),
        ("plan", "rso", "--config", "my.yaml", "--config", ""),
    ],
)
def test_an_empty_value_is_refused_by_the_name_of_its_option(winnow, words):
    """As in `--run "$RUN"` with an unset variable: the default would answer another question."""
    code, text = winnow(*words)
    assert (code, text.count("\n")) == (2, 1)
    assert text.startswith(f"winnow: {words[-2]}: is empty")


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "gs://"])
@pytest.mark.parametrize("words", [("run", "nothing"), ("plan", "nothing"), ("status",)])
def test_a_store_without_a_bucket_is_refused_before_all_else(winnow, recwarn, url, words):
    """One line; not the unknown recipe first, and no warning of a library."""
    code, text = winnow(*words, "--store", url)
    assert (code, text.count("\n")) == (2, 1)
    assert text.startswith(f"winnow: {url}: names no bucket")
    assert not recwarn.list

"""Plugins: a user's file registers functions of any kind, is part of the keys where it is used, and reaches workers."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.code import FORMAT
from pipeline.config.plan import Plan, make_plan, stale_code
from pipeline.config.recipe import load_recipe
from pipeline.plugins import running_only, unload_plugins
from schemas import WinnowError
from tests.pipeline.test_registry import REGISTRIES

ROOT = Path(__file__).parents[3]
STAGES = """
from schemas import Prompts
from pipeline import stage

@stage(version=1, unsharded=True)
def my_prompts(*, rows: int = 3) -> Prompts: ...
"""
RULES = """
from dataclasses import dataclass
from pipeline import stage, Bound, Registry
from schemas import Prompts
from typing import Annotated

sorting = Registry("sorting")

@sorting()
def by_length(texts, *, reverse: bool = False): return sorted(texts, key=len, reverse=reverse)

@stage(version=1)
def my_sort(prompts: Prompts, *, rules: list[Annotated[Bound, sorting]] = ["by_length"]) -> Prompts:  # noqa: B006
    return rules[0](["aaa", "b"])
"""
RECIPE = """
shards: 2
target: sorted
plugins: [stages.py, ./rules.py]
plain: {use: my_prompts}
sorted: {use: my_sort, from: {prompts: plain}}
"""


@pytest.fixture(autouse=True)
def _unloaded() -> Iterator[None]:
    """Forget the plugins of each test: their names would be taken in the next."""
    yield
    unload_plugins()


def plan(folder: Path, stages: str = STAGES, rules: str = RULES, recipe: str = RECIPE, *sets: str) -> Plan:
    (folder / "stages.py").write_text(stages)
    (folder / "rules.py").write_text(rules)
    (folder / "recipe.yaml").write_text(recipe)
    return make_plan(load_recipe(folder / "recipe.yaml", (), sets))


def keys(plan: Plan) -> dict[str, str]:
    return {step.name: step.key for step in plan.steps}


def refused(folder: Path, source: str) -> str:
    with pytest.raises(WinnowError) as caught:
        plan(folder, source)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_a_recipe_uses_what_its_plugins_register(tmp_path: Path):
    """Stages and nested functions, options included; the plan lists the files by absolute paths."""
    made = plan(tmp_path, STAGES, RULES, RECIPE, "sorted.rules=[{name: by_length, reverse: true}]")
    assert made.plugins == [tmp_path / "stages.py", tmp_path / "rules.py"]
    assert made.target.options["rules"][0](["b", "aaa"]) == ["aaa", "b"]
    with pytest.raises(WinnowError, match=r"sorted\.rules\.0\.revers: unknown option; did you mean 'reverse'"):
        plan(tmp_path, STAGES, RULES, RECIPE, "sorted.rules=[{name: by_length, revers: true}]")


def test_plugins_of_config_and_recipe_add_up(tmp_path: Path):
    """Each path is relative to its own file; an absolute path is taken as it is."""
    (tmp_path / "configs").mkdir()
    plan(tmp_path)
    absolute = tmp_path / "rules.py"
    (tmp_path / "configs" / "demo.yaml").write_text("plugins: [../stages.py]\nplain: {with: {rows: 9}}")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("[stages.py, ./rules.py]", f"[{absolute}]"))
    made = make_plan(load_recipe(tmp_path / "recipe.yaml", (tmp_path / "configs" / "demo.yaml",)))
    assert [path.resolve() for path in made.plugins] == [tmp_path / "stages.py", absolute]
    assert made.steps[0].options == {"rows": 9}


def test_a_file_that_the_command_names_is_a_plugin_as_if_the_recipe_listed_it(tmp_path: Path):
    """Same plan, same keys; a file that both name is one plugin, and Python's own callers name none."""
    listed = plan(tmp_path)
    alone = RECIPE.replace("[stages.py, ./rules.py]", "[stages.py]")
    with running_only([tmp_path / "rules.py", tmp_path / "stages.py"]):
        named = plan(tmp_path, recipe=alone)
    assert (keys(named), named.plugins) == (keys(listed), [tmp_path / "stages.py", tmp_path / "rules.py"])
    unload_plugins()
    with pytest.raises(WinnowError, match="unknown stage 'my_sort'"):
        plan(tmp_path, recipe=alone)


def test_a_plugin_can_extend_every_registry(tmp_path: Path):
    source = """
from typing import Annotated
from pipeline import Bound, stage
from schemas import Prompts
from tests.pipeline.test_registry import REGISTRIES

registry = REGISTRIES[NUMBER]

@registry(**next(iter(registry.entries.values())).metadata)
def mine(*args, words: int = 3): ...

@stage(version=1, unsharded=True)
def my_prompts(*, function: Annotated[Bound, registry] = "mine") -> Prompts: ...
"""
    recipe = "plugins: [stages.py]\ntarget: a\na: {use: my_prompts, with: {function: {name: mine, words: 4}}}"
    for number, registry in enumerate(REGISTRIES):
        made = plan(tmp_path, source.replace("NUMBER", str(number)), recipe=recipe)
        function = made.target.options["function"]
        assert (function.options, function.entry.kind) == ({"words": 4}, registry.kind)
        assert set(made.target.identity["plugins"]) == {"stage my_prompts", f"{registry.kind} mine"}


def test_the_content_of_a_plugin_is_in_the_keys_of_the_steps_that_use_it(tmp_path: Path):
    """rules.py is used by `sorted` alone, stages.py by `plain`, and so by what reads it. A name or a path is not."""
    before = plan(tmp_path)
    assert [set(step.identity["plugins"]) for step in before.steps] == [
        {"stage my_prompts"},
        {"stage my_sort", "sorting by_length"},
    ]
    after = keys(plan(tmp_path, rules=RULES + "# more\n"))
    assert after["plain"] == keys(before)["plain"]
    assert after["sorted"] != keys(before)["sorted"]
    after = keys(plan(tmp_path, STAGES + "# more\n"))
    assert not set(after.values()) & set(keys(before).values())
    assert keys(plan(tmp_path)) == keys(before), "the first content again, the first keys again"
    (tmp_path / "elsewhere").mkdir()
    unload_plugins()
    assert keys(plan(tmp_path / "elsewhere")) == keys(before)


def test_two_plugins_of_one_file_name_do_not_clash(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "code.py").write_text(STAGES.replace("my_prompts", f"prompts_{name}"))
    text = "plugins: [one/code.py, two/code.py]\ntarget: a\na: {use: prompts_one}\nb: {use: prompts_two}"
    assert plan(tmp_path, recipe=text).target.entry.fn.__module__.startswith("winnow_plugin_")


def test_a_plugin_that_cannot_be_loaded_says_where_and_why(tmp_path: Path):
    """And leaves nothing registered, so that the corrected file loads."""
    place = f"plugin {tmp_path / 'stages.py'}, line "
    for source, words in {
        STAGES + "\nboom = 1 / 0\n": "8: ZeroDivisionError: division by zero",
        STAGES + "\nimport no_such_module\n": "8: ModuleNotFoundError: No module named 'no_such_module'",
        STAGES + "\ndef f(:\n": "8: SyntaxError: invalid syntax",
        STAGES + "\nraise SystemExit('no')\n": "8: SystemExit: no",
    }.items():
        assert refused(tmp_path, source).startswith(place + words)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("stages.py", "stagse.py"))
    with pytest.raises(WinnowError, match=r"plugins: no such file: .*stagse\.py"):
        make_plan(load_recipe(tmp_path / "recipe.yaml"))
    (tmp_path / "recipe.yaml").write_text("plugins: [3]\na: {}")
    with pytest.raises(WinnowError, match=r"plugins\.0: must be a valid string, got 3"):
        load_recipe(tmp_path / "recipe.yaml")
    assert plan(tmp_path).steps


def test_a_name_that_is_taken_is_refused(tmp_path: Path):
    """A stage of ours, an alias, a function of another plugin: replacing one would change what other recipes mean."""
    words = refused(tmp_path, STAGES.replace("my_prompts", "prompts"))
    assert "line 5: TypeError: stage 'prompts' is already registered, in stages.data.prompts" in words
    words = refused(
        tmp_path, STAGES + RULES[RULES.index("@stage") :].replace("list[Annotated[Bound, sorting]]", "list")
    )
    assert "'my_sort' is already registered" in words
    assert str(tmp_path / "stages.py") in words


CHILD = """
import pickle, sys
entry, bound = pickle.load(open(sys.argv[1], "rb"))
again = pickle.loads(pickle.dumps((entry, bound)))
from stages.selection.rules import selection_rule  # imported by the plugin first, and none of its functions
assert all(entry.plugin is None for entry in selection_rule.entries.values())
print(entry.name, bound(["aaa", "b"]), again[0] is entry, entry.fn.__module__, entry.plugin_digest)
"""


def test_functions_of_a_plugin_reach_a_worker_that_has_not_the_file(tmp_path: Path):
    """The pickle carries the source; a worker executes it once, whatever the file says by then."""
    from ray import cloudpickle

    made = plan(tmp_path, rules=RULES + "from stages.selection.rules import selection_rule\n")
    entry, bound = made.target.entry, made.target.options["rules"][0]
    (tmp_path / "pickled").write_bytes(cloudpickle.dumps((entry, bound)))
    (tmp_path / "rules.py").unlink()
    command = [sys.executable, "-c", CHILD, str(tmp_path / "pickled")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    module = f"winnow_plugin_{entry.plugin_digest[:16]}"
    assert done.stdout.split("\n")[0] == f"my_sort ['b', 'aaa'] True {module} {entry.plugin_digest}"


def test_an_installed_package_is_a_plugin_by_its_entry_point(tmp_path: Path):
    """In a process of its own: its functions are found without `plugins:`, and its files' content is in the keys."""
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[winnow.plugins]\nmine = mine_stages\n")
    (tmp_path / "recipe.yaml").write_text("target: a\na: {use: my_prompts}")
    code = """
import sys, pickle
from pathlib import Path
from pipeline.config.plan import make_plan
from pipeline.config.recipe import load_recipe
step = make_plan(load_recipe(Path(sys.argv[1]))).target
assert pickle.loads(pickle.dumps(step.entry)) is step.entry
print(step.key, step.identity["plugins"])
"""

    def run(source: str, before: str = "") -> subprocess.CompletedProcess:
        (tmp_path / "mine_stages.py").write_text(source)
        command = [sys.executable, "-B", "-c", before + code, str(tmp_path / "recipe.yaml")]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")

    first, imported = run(STAGES), run(STAGES, "import mine_stages\n")
    assert "{'stage my_prompts': " in first.stdout, first.stderr
    assert imported.stdout == first.stdout, "whoever imported it first"
    assert run(STAGES + "\n# more").stdout.split()[0] != first.stdout.split()[0]
    broken = run(STAGES + "\n1 / 0")
    assert "plugin 'mine' of the installed package mine: ZeroDivisionError" in broken.stderr


def test_a_function_whose_source_changes_is_reported_as_stale(tmp_path: Path):
    """Layout, comments, docstrings and the version do not count; a manifest from before the field says nothing."""
    manifest = {"code": plan(tmp_path).target.code}
    assert {name for name in manifest["code"] if "." not in name} == {"my_sort", "by_length"}
    body = "return sorted(texts, key=len, reverse=reverse)"
    same = RULES.replace(body, f"\n    'Sort.'\n    # why\n    {body.replace(', ', ',')}").replace(
        "@sorting()", "@sorting(version=2)"
    )
    assert plan(tmp_path, rules=same).target.code == manifest["code"]
    step = plan(tmp_path, rules=RULES.replace("key=len", "key=str")).target
    (line,) = stale_code(step, manifest)
    assert "sorted: `by_length` has changed since this result was computed, and its version is still 1" in line
    assert "`--force sorted`" in line
    assert stale_code(step, {}) == []
    own = {name: digest for name, digest in manifest["code"].items() if "." not in name}
    assert stale_code(plan(tmp_path).target, {"code": own}) == [], "a manifest without what the functions use"
    (line,) = stale_code(plan(tmp_path).target, {"code": manifest["code"] | {"rules.gone": FORMAT + "before"}})
    assert "what `my_sort` uses has changed (rules.gone) since" in line
    assert "code" not in step.identity


OBJECTIVE = "from stages.training.objectives import objective\nfrom stages.evaluation.evaluate import gold_reward\n"
DECORATED = '@objective(reads=("ref",), per="pairs")\n'


@pytest.mark.parametrize(
    ("source", "facts"),
    [
        ('@objective(reads=("reff",), per="pairs")\ndef f(b): ...', ["reads.0", "'ref'", "'reff'"]),
        ('@objective(reads="ref", per="pairs")\ndef f(b): ...', ["reads", "tuple", "'ref'"]),
        ('@objective(reads=(), per="pear")\ndef f(b): ...', ["per", "'pairs'", "'pear'"]),
        ('@objective(reads=(), per="pairs", foo=3)\ndef f(b): ...', ["foo: unknown metadata", "reads"]),
        ('@objective(reads=(), per="pairs", version="x")\ndef f(b): ...', ["version", "integer", "'x'"]),
        ('@objective(reads=(), per="pairs", aliases="mine")\ndef f(b): ...', ["aliases", "tuple", "'mine'"]),
        ("@objective\ndef f(b): ...", ["objective f", "must set reads, per"]),
        (DECORATED + "def f(): ...", ["called with 1 positional", "takes 0"]),
        (DECORATED + "def f(b, beta: float = 2.0): ...", ["takes 2 (b, beta)", "after `*`"]),
        (DECORATED + "def f(b, **options): ...", ["**"]),
        (DECORATED + "async def f(b): ...", ["async"]),
        (DECORATED + "class F: ...", ["must be a function"]),
        ('objective(reads=(), per="pairs")(lambda b: 0)', ["no name", "`def`"]),
        (DECORATED + "def f(b, *, _x: int = 1): ...", ["cannot be called _x"]),
        (DECORATED + "def f(b, *, model_config: int = 1): ...", ["cannot be called model_config"]),
        (DECORATED + "def f(b, *, name: str = 'a'): ...", ["cannot be called name"]),
        (DECORATED + "def f(b, *, beta=1.0): ...", ["option beta has no type"]),
        ("@gold_reward()\ndef f(response): ...", ["called with 2", "prompt, response"]),
    ],
    ids=str,
)
def test_what_no_recipe_could_use_is_refused_where_it_is_registered(source: str, facts: list[str], tmp_path: Path):
    """Metadata, arguments, options: one line with the file, its line and the name, and what to write instead."""
    text = refused(tmp_path, OBJECTIVE + source)
    assert [fact for fact in (f"plugin {tmp_path / 'stages.py'}, line ", "TypeError", *facts) if fact not in text] == []


def test_a_plugin_is_one_file(tmp_path: Path):
    """A worker gets its text alone, so it cannot import what is beside it; the message says what to do."""
    (tmp_path / "helper.py").write_text("x = 1\n")
    for source in ("import helper", "from helper import x", "from .helper import x"):
        text = refused(tmp_path, source)
        assert [fact for fact in ("a plugin is one file", "stages.py", "entry point") if fact not in text] == []
    assert "one file" not in refused(tmp_path, "import no_such_module")


def test_a_plugin_is_read_in_the_encoding_that_it_declares(tmp_path: Path):
    """As Python reads it: with a byte order mark, or with a coding comment."""
    plan(tmp_path)
    for encoding, line in {"utf-8-sig": "", "latin-1": "# -*- coding: latin-1 -*-"}.items():
        unload_plugins()
        (tmp_path / "stages.py").write_text(f"{line}\nCITY = 'Z\u00fcrich'\n{STAGES}", encoding=encoding)
        module = make_plan(load_recipe(tmp_path / "recipe.yaml")).steps[0].entry.fn.__module__
        assert sys.modules[module].CITY == "Z\u00fcrich"

"""Reference of recipes, stages and options: what `winnow recipes` and `winnow options` print, and the READMEs."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest

from jobs.recipes import names
from jobs.reference import describe_type, recipe_table, registries, stage_table
from pipeline import Bound, Finite, Range
from pipeline.plugins import unload_plugins
from pipeline.stage import stages
from schemas import WinnowError
from stages.ranking.rankers import ranker as rankers
from stages.selection.rules import selection_rule


def test_the_generated_blocks_are_up_to_date():
    """`python -m tests.readmes --write` brings them up to date."""
    command = [sys.executable, "-m", "tests.readmes"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_recipe_says_what_it_is_and_what_it_optimises():
    """The objective is that of the policy that is evaluated: none if it is the SFT policy itself."""
    rows = {row["recipe"]: row for row in recipe_table().to_pylist()}
    assert sorted(rows) == names()
    assert all(row["about"] for row in rows.values())
    expected = {"rso": "sigmoid_norm", "raft": "nll", "sft": "none", "cvx_dpo": "convex_relu (head)"}
    assert {name: rows[name]["objective"] for name in expected} == expected


def test_the_type_of_an_option_in_words():
    assert describe_type(Annotated[int, Range(gt=0)]) == "int > 0"
    assert describe_type(Annotated[float, Range(ge=0, lt=1)] | None) == "float ≥ 0, < 1 or null"
    assert describe_type(Finite) == "finite float"
    assert describe_type(Literal["vllm", "fake"]) == "`vllm` or `fake`"
    assert describe_type(dict[str, list[int]]) == "mapping of str to list of int"
    assert describe_type(list[Annotated[Bound, selection_rule]]) == "list of selection rule"


def test_the_commands(winnow):
    """A stage has inputs, outputs, options, and the functions that its options name, which have pages of their own."""
    code, text = winnow("recipes")
    assert code == 0
    assert all(name in text for name in names())
    code, text = winnow("options")
    assert code == 0
    assert all(row["stage"] in text for row in stage_table().to_pylist())
    code, text = winnow("options", "select")
    facts = ["rewards (table rewards)", "table selections", "rule", "required", "selection rule", "rejection_sample"]
    assert code == 0
    assert [fact for fact in facts if fact not in text] == []
    assert text.count("rejection_sample") == 1
    code, text = winnow("options", "rejection_sample")
    assert code == 0
    assert [fact for fact in ("arXiv:2309.06657", "beta", "int > 0", "float ≥ 0 or null") if fact not in text] == []
    code, text = winnow("options", "rejection_sampel")
    assert code == 2
    assert "did you mean 'rejection_sample'?" in text


def test_every_number_of_an_option_has_bounds():
    """What numpy, numba or torch would refuse after hours is refused when the plan is made. A temperature and a limit
    may be infinite."""
    infinite = {"beta", "clip", "max_grad_norm"}
    entries = [*stages.entries.values(), *(entry for kind in registries().values() for entry in kind.entries.values())]
    unbounded = []
    for entry in [entry for entry in entries if entry.fn.__module__.startswith("stages.")]:  # other tests register some
        for name, field in entry.options.model_fields.items():
            words = describe_type(field.annotation, tuple(field.metadata)).split()
            values = [10**23, -1] if "int" in words else [math.nan, *[math.inf] * (name not in infinite)]
            for value in values if {"int", "float"} & {*words} and "mapping" not in words else []:
                try:
                    entry.validate({name: value}, "")
                    problems: tuple[str, ...] = ()
                except WinnowError as error:
                    problems = error.problems
                if not any(problem.startswith(f"{name}: ") for problem in problems):
                    unbounded.append((entry.name, name, value))
    assert unbounded == []


def test_options_of_a_kind_of_function_lists_its_functions(winnow):
    """By the kind, and by the registry's name in code; an unknown name lists all names once, by kind."""
    for word, function in [
        ("objective", "nll"),
        ("preference_reader", "hh"),
        ("reader", "hh"),
        ("pair_rule", "matches"),
    ]:
        code, text = winnow("options", word)
        assert (code, function in text.split()) == (0, True), word
    code, text = winnow("options", "zzzz")
    assert (code, text.count("bradley_terry")) == (2, 2), "a score method, and an alias of an objective"
    assert "score method: bradley_terry, least_squares" in text


def test_options_describes_functions_of_plugins(winnow, tmp_path):
    """Those of the files that a config or the command names, and of installed packages, as `plan` and `run` do."""
    source = "from stages.evaluation.evaluate import gold_reward\n\n@gold_reward()\ndef shortness(prompt, response):\n"
    (tmp_path / "mine.py").write_text(source + '    """Prefer short responses."""\n    return -len(response)\n')
    (tmp_path / "my.yaml").write_text("plugins: [./mine.py]\n")
    try:
        assert winnow("options", "shortness")[0] == 2
        code, text = winnow("options", "shortness", "--config", "my.yaml")
        assert (code, "--plugin" in text and "mine.py" in text) == (2, True)
        code, text = winnow("options", "shortness", "--config", "my.yaml", "--plugin", "mine.py")
        assert (code, "Prefer short responses" in text) == (0, True)
        unload_plugins()
        code, text = winnow("options", "shortness", "--plugin", "mine.py")
        assert (code, "Prefer short responses" in text) == (0, True)
    finally:
        unload_plugins()


def test_a_function_of_a_file_is_listed_where_an_option_takes_one(winnow):
    """As a ranker, a gold reward and a pair rule; and no other kind of function can be in a file."""
    for words, count in (
        (("ranker",), 1),
        (("gold reward",), 1),
        (("objective",), 0),
        (("reward",), 1),
        (("python",), 3),
    ):
        code, text = winnow("options", *words)
        assert code == 0
        assert len(re.findall(r"^ ?`?python\b", text, re.MULTILINE)) == count
    with pytest.raises(WinnowError, match="did you mean 'python'"):
        rankers.bind("pythn")

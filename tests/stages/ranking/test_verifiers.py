"""Verifiable rewards, columns kept with a prompt, and functions that a config names by their file."""

import pickle
import subprocess
import sys
import time
import warnings

import psutil
import pyarrow as pa
import pytest

from jobs.recipes import FOLDER
from pipeline.config.keys import canonical
from pipeline.config.plan import make_plan
from pipeline.config.recipe import load_recipe
from pipeline.plugins import unload_plugins
from pipeline.store.fingerprints import DataPath
from schemas import WinnowError, WinnowWarning
from schemas.tables import CANDIDATES, JUDGEMENTS, PROMPTS
from stages.data.prompts import prompts
from stages.evaluation.evaluate import evaluate, gold_reward
from stages.ranking.rankers import check_fields
from stages.ranking.rankers import ranker as rankers
from stages.ranking.reward import reward
from stages.ranking.verifiers import _prefix, code_tests, json_schema, math_answer, runs_to_its_end
from stages.selection.pair import pair_rule
from tests.conftest import write_jsonl
from tests.material import bound
from tests.runs import ROOT

SCHEMA = '{"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}'


def test_answers_are_equal_as_mathematics():
    cases = {("0.5", r"so $\\boxed{\\frac{1}{2}}$"): 1, ("#### 18", "It is 18."): 1, (r"\\frac{1}{2}", "It is 18."): 0}
    for (answer, response), score in cases.items():
        assert math_answer("", response, {"answer": answer}) == score, (answer, response)


def test_a_reference_in_latex_is_read_in_full():
    """As MATH writes it, without delimiters: what begins or ends with the same number is another answer."""
    wrong = {
        r"3\sqrt{13}": r"\boxed{3}",
        r"\left( 3, \frac{\pi}{2} \right)": r"\boxed{3}",
        "6+9i": "It is 6.",
        "2x": "2",
        "10^{-3}": "10",
        r"(-\infty, 3]": "3",
        "1,2,3": "1.2",
        "12!": r"$12$",
        "5x-7": "5",
        r"\begin{pmatrix}1\\2\end{pmatrix}": "1",
        "2xy": "2",
        "1,234": "1.234",
        "50%": "51%",
        "$18": "19",
    }
    for answer, other in wrong.items():
        fields = {"answer": answer}
        check_fields(bound(rankers, "math_answer"), fields)
        assert math_answer("", rf"So \boxed{{{answer}}}.", fields) == 1, answer
        assert math_answer("", other, fields) == 0, answer


@pytest.mark.parametrize(
    "answer",
    [
        "3.14e5",
        "2 hours 30 minutes",
        "A",
        "(C)",
        r"\text{(C)}",
        "Yes",
        "No",
        "Paris",
        r"\text{Evelyn}",
        "",
        "####",
        "?",
    ],
)
def test_a_reference_that_is_no_mathematics_rejects_its_row(answer):
    """It would be read as a product of variables, or as its last number, and every plain response be wrong."""
    with pytest.raises(ValueError, match="answer is no answer that math-verify can parse"):
        check_fields(bound(rankers, "math_answer"), {"answer": answer})


def test_json_fits_its_schema_or_is_wrong():
    fenced = 'Here:\n```json\n{"city": "Oslo"}\n```'
    for response, score in {fenced: 1, '{"city": "Oslo"}': 1, '{"city": 1}': 0, "Oslo": 0, "[" * 10**5: 0}.items():
        assert json_schema("", response, {"schema": SCHEMA}) == score, response[:30]
    with pytest.raises(ValueError, match="schema is no JSON schema"):
        check_fields(bound(rankers, "json_schema"), {"schema": '{"type": "objeckt"}'})


def test_what_json_has_no_number_for_is_wrong():
    """No error ends the step, and no schema is fitted by it: Python's reader would take them for numbers."""
    for response in ("NaN", "Infinity", "-Infinity", "1e400", "[1e999]", '"\\ud800"'):
        for schema in ("{}", '{"type": "number", "multipleOf": 0.01}'):
            assert json_schema("", response, {"schema": schema}) == 0, (response, schema)
    assert json_schema("", "1" + "0" * 400, {"schema": '{"type": "number", "multipleOf": 0.01}'}) == 1


@pytest.mark.parametrize(
    "schema",
    [
        '{"$ref": "#/definitions/money"}',
        '{"properties": {"a": {"items": {"$ref": "#/$defs/b"}}}}',
        '{"$ref": "http://127.0.0.1:9/x"}',
        '{"pattern": "["}',
        r'{"pattern": "(?=a)b"}',
        r'{"pattern": "(a)\\1"}',
        '{"multipleOf": NaN}',
        "[" * 10**5,
    ],
)
def test_a_schema_that_no_response_can_be_held_against_rejects_its_row(schema):
    with pytest.raises(ValueError, match="schema is no JSON schema"):
        check_fields(bound(rankers, "json_schema"), {"schema": schema})


def test_a_pattern_that_backtracking_would_never_end_on_takes_linear_time():
    text = '"' + "a" * 50_000 + 'b"'
    assert json_schema("", text, {"schema": '{"pattern": "^(a+)+$"}'}) == 0


def test_code_is_right_if_its_tests_run_to_their_end():
    double = "Sure:\n```python\ndef double(x):\n    return 2 * x\n```\nDone."
    for response, score in {
        double: 1,
        double.replace("2 *", "3 *"): 0,
        "def double(x):\n    return 2 * x": 1,
        "def double(x) return": 0,
        "import os\nos._exit(0)": 0,  # an exit before the tests is no success
        "raise SystemExit": 0,
    }.items():
        assert code_tests("", response, {"tests": "assert double(4) == 8"}) == score, response


def test_tests_that_are_no_python_reject_their_row():
    with pytest.raises(ValueError, match="tests is no Python"):
        check_fields(bound(rankers, "code_tests"), {"tests": "assert add(1, 2 == 3"})


ADD = "def add(a, b):\n    return a + b"
CASE = "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(add(1, 2), 3)\n"
VACUOUS = {
    "nothing": "",
    "a literal": '"assert add(1, 2) == 3"',
    "pytest": "def test_add():\n    assert add(1, 2) == 3",
    "unittest": CASE,
    "HumanEval": "def check(candidate):\n    assert candidate(1, 2) == 3",
    "an exit": "raise SystemExit",
}


@pytest.mark.parametrize("tests", VACUOUS.values(), ids=VACUOUS)
def test_tests_that_an_empty_program_passes_reject_their_row(tests):
    """Every program would be right by them."""
    with pytest.raises(ValueError, match="tests is no test that an empty program fails"):
        check_fields(bound(rankers, "code_tests"), {"tests": tests})


@pytest.mark.parametrize(
    "tests",
    [
        '["assert add(1, 2) == 3", "assert add(2, 2) == 4"]',
        CASE + "unittest.main()",
        VACUOUS["HumanEval"] + "\ncheck(add)",
    ],
    ids=["MBPP", "unittest", "HumanEval"],
)
def test_tests_that_call_the_code_are_right_for_right_code_alone(tests):
    """A JSON list is its lines, and `unittest.main()`, which exits with code 0, is success."""
    check_fields(bound(rankers, "code_tests"), {"tests": tests})
    assert code_tests("", ADD, {"tests": tests}) == 1
    assert code_tests("", ADD.replace("+", "-"), {"tests": tests}) == 0


def test_an_exit_that_the_tests_reach_in_the_program_is_no_success():
    assert code_tests("", "def add(a, b):\n    raise SystemExit(0)", {"tests": "assert add(1, 2) == 3"}) == 0


@pytest.mark.parametrize(
    "response",
    [
        f"Use ``` to fence:\n```python\n{ADD}\n```\nDone.",
        "1. So:\n\n   ```python\n" + "".join(f"   {line}\n" for line in ADD.split("\n")) + "   ```",
        f"~~~python\n{ADD}\n~~~\n",
        f"```python\n{ADD}```",
        f"````\n{ADD}\n\ns = '```'\n````",
    ],
    ids=["inline before", "indented", "tildes", "closed on the last line", "four"],
)
def test_the_block_is_what_markdown_takes_for_one(response):
    assert code_tests("", response, {"tests": "assert add(1, 2) == 3"}) == 1


def test_a_sandboxed_process_is_limited_in_time_memory_and_files(tmp_path):
    assert not runs_to_its_end(["x = bytearray(2 * 10**9)"], 10, 256)
    assert not runs_to_its_end(["open('x', 'wb').write(bytes(2**25))"], 10, 256)
    # It leaves a process behind that would go on for ever.
    beats = tmp_path / "beats"
    beat = f"import os, time\nos.fork()\nwhile True:\n    open({str(beats)!r}, 'a').write('x')\n    time.sleep(0.02)"
    assert not runs_to_its_end([beat], 1, 256)
    count = beats.stat().st_size
    time.sleep(0.3)
    assert beats.stat().st_size == count > 1


def test_a_sandboxed_process_has_no_network_where_unshare_is_allowed():
    if "unshare" not in _prefix():
        pytest.skip("this machine does not allow unshare")
    interfaces = "import socket\nassert [name for _, name in socket.if_nameindex()] == ['lo']"
    assert runs_to_its_end([interfaces], 10, 256)


def rows_with_answers(tmp_path):
    rows: list[dict] = [
        {"prompt": "2 + 2?", "answer": 4},
        {"prompt": "3 + 3?", "answer": {"n": 6}},
        {"prompt": "4 + 4?", "answer": None},
    ]
    return DataPath(str(write_jsonl(tmp_path / "sums.jsonl", rows)))


def test_columns_are_kept_with_their_prompt_as_text(tiny, tmp_path, ctx):
    """A number and an object as JSON; a row without the column is rejected by name."""
    rows = prompts(tiny, ctx, path=rows_with_answers(tmp_path), keep=["answer"], heldout=0.0).to_pylist()
    assert {row["text"]: dict(row["fields"]) for row in rows} == {
        "2 + 2?": {"answer": "4"},
        "3 + 3?": {"answer": '{"n": 6}'},
    }
    assert [row["reason"] for row in ctx.rejects.to_pylist()] == ["no answer"]
    assert {row["fields"] for row in prompts(tiny, ctx, path=rows_with_answers(tmp_path)).to_pylist()} == {None}


@pytest.fixture
def sums():
    """Two prompts with their answers, and a right and a wrong response to both."""
    known = {"p": ("2 + 2?", "4"), "q": ("3 + 3?", "6")}
    rows = [
        dict(prompt_id=name, text=text, token_ids=[1], split="heldout", fields=[("answer", answer)])
        for name, (text, answer) in known.items()
    ]
    answers = {"p": ["It is 4.", "It is 5."], "q": ["It is 5.", "It is 6."]}
    responses = [
        dict(prompt_id=name, candidate_id=f"{name}{k}", k=k, token_ids=[k], text=text, n_tokens=1, finish_reason="stop",
             logp_kind="none")
        for name, texts in answers.items()
        for k, text in enumerate(texts)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, PROMPTS), pa.Table.from_pylist(responses, CANDIDATES)


RIGHT = {"p0": 1.0, "p1": 0.0, "q0": 0.0, "q1": 1.0}


def test_a_verifier_is_a_reward_and_a_gold_reward_that_reads_the_prompts_column(sums, ctx):
    rewards = reward(*sums, ctx, by=bound(rankers, "math_answer")).to_pylist()
    assert {row["candidate_id"]: row["reward"] for row in rewards} == RIGHT
    assert {row["label_threshold"] for row in rewards} == {0.5}
    judged = [
        dict(prompt_id=name[0], k=int(name[1]), candidate_id=name, baseline_id=f"{name[0]}0", logit=0.0)
        for name in RIGHT
    ]
    judgements = pa.Table.from_pylist(judged, JUDGEMENTS)
    outcomes, _ = evaluate(sums[0], sums[1], sums[1], judgements, ctx, gold=bound(gold_reward, "math_answer"))
    assert {row["candidate_id"]: row["gold"] for row in outcomes.to_pylist()} == RIGHT
    for registry in (rankers, gold_reward):  # each is its own kind after a pickle
        assert pickle.loads(pickle.dumps(bound(registry, "math_answer"))).entry.kind == registry.kind


FILE = """
from stages.selection.pair import Preference


def has(prompt, response, *, word: str = "4"):
    return float(word in response)


def right(prompt, response, fields):
    return float(fields["answer"] in response)


def graded(prompt, response):
    return float(len(response))


def best_first(rows):
    for row in rows[1:]:
        yield Preference(rows[0]["candidate_id"], row["candidate_id"], 1.0)


def many(a, b, c, d):
    return 0.0


def fails(prompt, response):
    return {}["x"]
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    yield tmp_path / "mine.py"
    unload_plugins()


def from_file(registry, file, function, **options):
    return registry.bind({"name": "python", "file": str(file), "function": function, **options})


def test_a_function_of_a_file_is_a_reward_a_gold_reward_and_a_pair_rule(file, sums, ctx):
    """Without a decorator, with options of its own, with the prompt's columns if it has a third parameter."""
    for function, word in (("right", None), ("has", "It is 4")):
        options: dict = {} if word is None else {"word": word}
        by = from_file(rankers, file, function, label_threshold=0.5, **options)
        scores = {row["candidate_id"]: row["reward"] for row in reward(*sums, ctx, by=by).to_pylist()}
        assert scores == (RIGHT if function == "right" else RIGHT | {"q1": 0.0})
        again = pickle.loads(pickle.dumps(by))
        assert again("", "It is 4", *[{"answer": "4"}] * (function == "right")) == 1.0
    assert from_file(rankers, file, "has", label_threshold=0.5).metadata["label_threshold"] == 0.5
    assert from_file(gold_reward, file, "right").metadata["reads_fields"]
    rule = from_file(pair_rule, file, "best_first", reads="candidates")
    assert rule.metadata["reads"] == "candidates"
    assert [item.rejected for item in rule([{"candidate_id": name} for name in "abc"])] == ["b", "c"]


def test_what_a_recipe_says_of_a_function_in_a_file_is_part_of_the_key(file):
    """`label_threshold` and `reads` are declared in place of a decorator; without them the key is as it was."""
    for registry, function, options in (
        (rankers, "has", {"label_threshold": 0.5}),
        (pair_rule, "best_first", {"reads": "candidates"}),
    ):
        plain, declared = (from_file(registry, file, function, **extra) for extra in ({}, options))
        assert canonical(declared) == canonical(plain) | options
        assert canonical(pickle.loads(pickle.dumps(declared))) == canonical(declared)
    assert canonical(from_file(rankers, file, "has", label_threshold=None)) == canonical(
        from_file(rankers, file, "has")
    )


def test_a_gold_reward_has_no_threshold_of_labels(file):
    """Win rates do not read it: accepted, it would do nothing."""
    with pytest.raises(WinnowError, match="label_threshold: unknown option"):
        from_file(gold_reward, file, "right", label_threshold=0.5)
    with pytest.raises(WinnowError, match="label_threshold: must be a finite number, got 'half'"):
        from_file(rankers, file, "right", label_threshold="half")


def test_labels_of_a_users_program_that_does_not_call_them_so_are_warned_of(file, sums, ctx):
    """By the setting that is missing; without it, the best response of a prompt without a right one is kept."""
    with pytest.warns(WinnowWarning, match=r"right gave in a part are 0 or 1\..*label_threshold to 0\.5 beside `file`"):
        reward(*sums, ctx, by=from_file(rankers, file, "right"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", WinnowWarning)
        rows = reward(*sums, ctx, by=from_file(rankers, file, "right", label_threshold=0.5))
        reward(*sums, ctx, by=from_file(rankers, file, "graded"))
    assert set(rows["label_threshold"].to_pylist()) == {0.5}


def test_a_file_or_function_that_cannot_be_used_is_one_line(file):
    cases: list[tuple[str, dict, list[str]]] = [
        ("hass", {}, ["hass", "mine.py", "did you mean 'has'"]),
        ("many", {}, ["many", "mine.py", "prompt, response, fields"]),
        ("has", {"words": "x"}, ["words", "word"]),
        ("has", {"word": 3}, ["word", "3"]),
    ]
    for function, options, facts in cases:
        with pytest.raises(WinnowError) as caught:
            from_file(rankers, file, function, **options)
        assert [fact for fact in facts if fact not in str(caught.value)] == [], str(caught.value)
    with pytest.raises(WinnowError, match=r"no such file.*absent\.py"):
        from_file(rankers, file.parent / "absent.py", "has")
    with pytest.raises(WinnowError, match=r"needs `file`.*`function`"):
        rankers.bind({"name": "python", "file": str(file)})
    with pytest.raises(WinnowError, match=r"fails of .*mine\.py, line \d+: KeyError: 'x'"):
        from_file(rankers, file, "fails")("", "")


def test_a_third_parameter_with_a_default_is_no_option_that_the_columns_would_fill(file):
    """`strict=False` would silently be the mapping of columns, which is true; a `fields` with a default may be that."""
    head = "def strict(prompt, response, strict=False):\n    return float(strict)\n"
    file.write_text(f"{head}def columns(prompt, response, fields=None):\n    return float(bool(fields))\n")
    for registry in (rankers, gold_reward):
        with pytest.raises(WinnowError, match=r"strict=False.*\*, strict.*fields"):
            from_file(registry, file, "strict")
        assert from_file(registry, file, "columns").metadata["reads_fields"]


def planned(tiny, data_dir, tmp_path, *lines, keep="[]"):
    """Return the plan of rso with a model, prompts and these lines."""
    data = f"{{path: {data_dir / 'prompts.jsonl'}, keep: {keep}}}"
    config = tmp_path / "my.yaml"
    config.write_text(
        "\n".join(
            [
                f"sft: {{with: {{path: {tiny.folder}}}}}",
                f"prompts: {{with: {data}}}",
                "sample: {with: {max_tokens: 24}}",
                *lines,
            ]
        )
    )
    return make_plan(load_recipe(FOLDER / "rso.yaml", (config,), (), "run", (FOLDER,)))


def test_the_content_of_the_file_is_part_of_the_key(file, tiny, data_dir, tmp_path):
    """An edit computes the rewards again; and `ranker: {use: python}` is one line for every step that ranks."""
    lines = ["ranker: {use: python, with: {file: ./mine.py, function: has}}"]
    steps = {step.name: step for step in planned(tiny, data_dir, tmp_path, *lines).steps}
    assert "ranker" not in steps
    assert [steps[name].options["by"].name for name in ("reward", "compare", "judge")] == ["has"] * 3
    file.write_text(FILE.replace("word in", "word not in"))
    again = {step.name: step for step in planned(tiny, data_dir, tmp_path, *lines).steps}
    changed = {name for name in steps if steps[name].key != again[name].key}
    assert {"reward", "compare", "judge", "evaluate"} <= changed
    assert not {"prompts", "sample", "sft"} & changed


def test_a_plan_says_which_column_is_not_kept_and_which_library_is_missing(tiny, data_dir, tmp_path, monkeypatch):
    for name, step in (("by", "reward"), ("gold", "evaluate")):
        with pytest.raises(
            WinnowError, match=rf"{step}.*: {name}: math_answer reads the column answer.*keep: \[answer\]"
        ):
            planned(tiny, data_dir, tmp_path, "ranker: {use: math_answer}", "evaluate: {with: {gold: math_answer}}")
    monkeypatch.setattr("stages.ranking.rankers.find_spec", lambda name: None)
    with pytest.raises(
        WinnowError, match=r"math_answer needs the library math_verify: .* -m pip install .*math.verify"
    ):
        planned(tiny, data_dir, tmp_path, "ranker: {use: math_answer}")


KILLED = r"""
import sys
from stages.ranking.verifiers import runs_to_its_end
runs_to_its_end([f"import time\nopen({sys.argv[1]!r}, 'w').close()\ntime.sleep(600)", ""], 600.0, 1024)
"""


def test_a_program_ends_with_the_run_that_is_killed_while_it_runs(tmp_path):
    """Not only at its time limit: it may sleep, which takes no CPU time."""
    begun = tmp_path / "begun"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(begun)], cwd=ROOT) as process:
        while not begun.exists():
            assert process.poll() is None
            time.sleep(0.05)
        programs = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert programs
    assert psutil.wait_procs(programs, timeout=20)[1] == []

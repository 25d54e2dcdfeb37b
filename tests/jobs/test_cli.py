"""The command `winnow`: what people can mend ends with exit code 2 and a message that says where, what and how."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from jobs import recipes
from jobs.console import as_table
from pipeline.store.store import Store
from schemas import Model

ROOT = Path(__file__).parents[2]


def outside(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    """Runs the command as people do, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jobs", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def small(tmp_path: Path, tiny: Model) -> Path:
    """A recipe of two steps: a model taken in, which takes no time, and prompts that are never made here."""
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


def test_an_unknown_recipe_in_a_process_of_its_own(tmp_path: Path):
    """Exit code 2, the nearest name, no traceback: what a shell script sees."""
    done = outside("plan", "rrfh", cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 2
    assert "unknown recipe 'rrfh'; did you mean 'rrhf'?" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "rso", "--set", "selct.k=4"], ["rso: --set selct.k=4", "unknown step 'selct'", "'select'"]),
        (["plan", "rso", "--set", "select.zzzz=4"], ["rso: select.zzzz: unknown option", "known: rule, scale, seed"]),
        (
            ["plan", "rso", "--set", "select.rule.beat=4"],
            ["rso: select.rule.beat: unknown option", "did you mean 'beta'?"],
        ),
        (["plan", "rso", "--set", "select.rule.k=four"], ["rso: select.rule.k", "integer", "'four'"]),
        (["plan", "rso", "--set", "select.rule.k=0"], ["rso: select.rule.k", "greater than 0", "got 0"]),
        (["plan", "rso", "--set", "select"], ["--set select", "step.option=value"]),
        (["plan", "rso", "--set", "select.rule.k=[1"], ["--set select.rule.k=[1", "not YAML"]),
        (["plan", "rso", "--set", "optimize.objective=hing"], ["optimize.objective", "'hing'", "'hinge'"]),
        (["plan", "rso", "--set", "sample.engine=vlm"], ["sample.engine", "'vllm', 'transformers' or 'fake'", "'vlm'"]),
        (["plan", "rso", "--set", "target=evaluat"], ["target: no step 'evaluat'", "did you mean 'evaluate'?"]),
        (["plan", "rso", "--set", "prompts.path=gone.jsonl"], ["prompts.path: no such file", "gone.jsonl"]),
        (["run", "rso", "ipo", "--set", "select.rule.k=0"], ["rso: select.rule.k", "ipo: select.rule.k"]),
        (["run", "rso", "nope"], ["unknown recipe 'nope'"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in ("plan", "run") else "",
)
def test_a_mistake_names_place_value_and_cure(winnow, world: Path, words: list[str], said: list[str]):
    code, text = winnow(*words, "--config", world / "demo.yaml")
    assert code == 2
    assert [word for word in said if word not in text] == []
    assert not Path("store").exists(), "nothing may have run"


def test_a_recipe_without_a_world_says_what_it_lacks(winnow):
    """Data and models are the user's: the message says which steps want them."""
    code, text = winnow("plan", "rso")
    assert code == 2
    assert "sft.path: required" in text
    assert "prompts: give either `path`" in text
    assert "`--config world.yaml` says where your data and models are" in text


def test_a_missing_world_is_named(winnow):
    code, text = winnow("plan", "rso", "--config", "nowhere.yaml")
    assert code == 2
    assert "--config nowhere.yaml: there is no such file" in text


def test_a_missing_data_file_is_named(winnow, world: Path, tmp_path: Path):
    moved = Path(shutil.copytree(world, tmp_path / "moved"))
    (moved / "prompts.jsonl").unlink()
    code, text = winnow("run", "rso", "--config", moved / "demo.yaml")
    assert code == 2
    assert f"prompts.path: no such file or folder: {moved / 'prompts.jsonl'}" in text
    assert not Path("store").exists()


def test_a_model_folder_without_tokenizer_is_named(winnow, small: Path):
    (small.parent / "model" / "tokenizer.json").unlink()
    code, text = winnow("plan", small)
    assert code == 2
    assert f"sft.path: model folder {small.parent / 'model'} has no tokenizer" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["plan", "run", "sql"]),
        (["--help"], ["plan", "run", "sql"]),
        (["plan"], ["recipe"]),
        (["frobnicate"], ["frobnicate"]),
        (["plan", "rso", "--sets", "a.b=1"], ["--sets"]),
        (["run", "rso", "--executor", "cloud"], ["cloud", "in-process", "ray"]),
        (["run", "rso", "--executor", "ray", "--workers", "0"], ["--workers"]),
        (["sql", "SELECT 1", "--format", "xml"], ["xml", "csv"]),
    ],
    ids=" ".join,
)
def test_a_mistake_in_the_command_line_itself_is_no_traceback(winnow, words: list[str], said: list[str]):
    """An unknown flag, a missing argument, a wrong choice: 2, as with every command of a shell; help is 0."""
    code, text = winnow(*words)
    assert code == (0 if words == ["--help"] else 2)
    assert [word for word in said if word not in text.lower()] == []


@pytest.mark.parametrize("words", [["status"], ["sql", "SELECT 1"], ["report"], ["trace", "nothing"]], ids=" ".join)
def test_a_store_without_runs_is_said_to_be_one(winnow, words: list[str]):
    """A folder misspelt, and a folder that is none, such as the one above the store: no empty table, nothing made."""
    code, text = winnow(*words, "--store", "nowhere")
    assert (code, Path("nowhere").exists()) == (2, False)
    assert "--store nowhere: there is no such folder" in text
    Path("store").mkdir()
    code, text = winnow(*words)
    assert (code, list(Path("store").iterdir())) == (2, [])
    assert "--store store: no runs in this folder; winnow run makes one" in text


def test_plan_prints_every_step_with_its_key(winnow, world: Path):
    """All steps of all recipes asked for; nothing is made by looking."""
    code, text = winnow("plan", "rso", "dpo", "--config", world / "demo.yaml")
    assert code == 0
    for made in recipes.plans(["rso", "dpo"], [world / "demo.yaml"], []):
        assert f"{made.name}  ({len(made.steps)} steps)" in text
        for step in made.steps:
            line = next(line for line in text.splitlines() if step.key in line)
            assert step.name in text
            assert "will run: never made" in line
    assert not Path("store").exists()


def test_plan_says_what_is_cached_and_what_will_run_and_why(winnow, small: Path):
    """First nothing is there; then the model is; then another model stands in the folder: the field is named."""
    sft, _ = (step.key for step in recipes.plans([str(small)], [], [])[0].steps)
    assert f"{sft} will run: never made" in winnow("plan", small)[1]

    assert winnow("run", small, "--set", "target=sft")[0] == 0
    _, text = winnow("plan", small)
    assert f"{sft} cached" in text
    assert text.count("will run: never made") == 1

    (small.parent / "model" / "generation_config.json").write_text("{}")
    _, text = winnow("plan", small)
    assert sft not in text
    assert "will run: options.path.content: " in text


def test_a_second_run_makes_nothing(winnow, small: Path):
    code, text = winnow("run", small, "--set", "target=sft")
    assert code == 0
    assert "running" in text
    assert "made" in text
    code, text = winnow("run", small, "--set", "target=sft")
    assert code == 0
    assert "cached" in text
    assert "running" not in text


def test_a_run_that_evaluates_nothing_prints_no_leaderboard(winnow, finished: Path, world: Path, tmp_path: Path):
    """What older runs of the store came to is no answer to it; a run that evaluates is shown beside them."""
    shutil.copytree(finished, tmp_path / "store")
    on = ("--config", world / "demo.yaml")
    assert "leaderboard" not in winnow("run", "rso", *on, "--set", "target=prompts")[1]
    said = winnow("run", "rso", *on)[1]
    assert "leaderboard" in said
    assert "│ run " in said


def test_a_run_with_an_override_of_any_kind_ends_well(winnow, small: Path):
    """A path in --set has slashes, and a long one is longer than a file's name may be."""
    deep = shutil.copytree(small.parent / "model", small.parent / ("d" * 120) / ("e" * 120))
    code, _ = winnow("run", small, "--set", "target=sft", "--set", f"sft.path={deep}")
    assert code == 0
    code, text = winnow("sql", "SELECT step FROM runs", "--format", "csv")
    assert (code, text.count("sft")) == (0, 1)


@pytest.fixture
def store(winnow) -> Store:
    """Where the command looks by default, with a run of no step."""
    store = Store(Path("store"))
    store.link_run("nothing", [])
    return store


def test_sql_answers_as_table_csv_or_json(winnow, store: Store):
    """The same two rows three times; a comma, a quote and a null survive."""
    statement = "SELECT * FROM (VALUES (1, 'a, \"b\"', 0.5), (2, NULL, 123456.789::DOUBLE)) AS t(n, text, x) ORDER BY n"
    code, text = winnow("sql", statement)
    assert code == 0
    assert [word for word in ("n", "text", 'a, "b"', "0.5", "1.235e+05") if word not in text] == []

    _, text = winnow("sql", statement, "--format", "json")
    assert [json.loads(line) for line in text.splitlines()] == [
        {"n": 1, "text": 'a, "b"', "x": 0.5},
        {"n": 2, "text": None, "x": 123456.789},
    ]

    _, text = winnow("sql", statement, "--format", "csv")
    assert list(csv.reader(io.StringIO(text))) == [["n", "text", "x"], ["1", 'a, "b"', "0.5"], ["2", "", "123456.789"]]


@pytest.mark.parametrize("form", ["table", "json", "csv"])
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT DATE '2026-01-01' AS day, now() AS moment, INTERVAL 3 DAYS AS span, TIME '12:00' AS hour",
        "SELECT 1.5::DECIMAL(4, 2) AS money, 1::HUGEINT AS big, 'nan'::DOUBLE AS x",
        "SELECT 'x'::BLOB AS raw, uuid() AS id",
        "SELECT [1, 2] AS list, {'a': 1} AS struct, MAP {'k': 1} AS map",
        "SELECT sum(n) AS total FROM range(3) AS t(n)",
        "SELECT * FROM prompts",
        "SELECT '[red]not a colour[/]' AS text",
        "DESCRIBE prompts",
    ],
)
def test_sql_prints_values_of_every_kind(winnow, store: Store, statement: str, form: str):
    """Dates, decimals, bytes, lists: whatever DuckDB answers with is printed."""
    code, text = winnow("sql", statement, "--format", form)
    assert code == 0
    assert text.strip() or form == "json"
    if "total" in statement and form == "json":
        assert json.loads(text) == {"total": 3}
    if "colour" in statement:
        assert "[red]not a colour[/]" in text


@pytest.mark.parametrize("statement", ["SELEC 1", "DROP TABLE runs", "SELECT * FROM read_text('/etc/passwd')", ""])
def test_sql_that_is_wrong_or_not_allowed_is_refused(winnow, store: Store, statement: str):
    code, text = winnow("sql", statement)
    assert code == 2
    assert "winnow: sql: " in text


def test_sql_that_names_no_table_says_where_they_are_described(winnow, store: Store):
    """And the statements that it names are answered."""
    for wrong in ("SELECT * FROM nowhere", "SELECT nothing FROM candidates"):
        assert "`SHOW TABLES` and `DESCRIBE candidates`" in winnow("sql", wrong)[1]
    assert "selections" in winnow("sql", "SHOW TABLES")[1]
    assert "finish_reason" in winnow("sql", "DESCRIBE candidates")[1]


def test_an_unknown_run_names_those_there_are(winnow, small: Path):
    winnow("run", small, "--set", "target=sft")
    for words in (["sql", "SELECT 1", "--run"], ["trace"]):
        code, text = winnow(*words, "smal")
        assert code == 2
        assert "no run 'smal'" in text
        assert "small[target=sft]" in text


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_interrupted_run_says_so_and_keeps_what_is_finished(tmp_path: Path, world: Path):
    """Ctrl-C is exit code 130, as in every shell, and no traceback."""
    command = [sys.executable, "-u", "-m", "jobs", "run", "rso", "--config", str(world / "demo.yaml")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    ) as made:
        for line in made.stdout or ():
            if "running" in line:
                made.send_signal(signal.SIGINT)
                break
        rest, _ = made.communicate(timeout=60)
    assert made.returncode == 130, rest
    assert "interrupted; finished parts are kept" in rest
    assert "Traceback" not in rest


def test_brackets_of_a_table_are_printed():
    """They are no markup of rich's: neither in a title nor in a column's name."""
    said = io.StringIO()
    console = Console(file=said, width=80)
    console.print(as_table(pa.table({"low [high]": ["[x]"]}), "median [least, most]"))
    words = " ".join(said.getvalue().split())
    assert [word for word in ("median [least, most]", "low [high]", "[x]") if word not in words] == []

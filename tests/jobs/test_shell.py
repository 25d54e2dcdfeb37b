"""`winnow sql`: results in every format, to the terminal and to files, and the shell."""

import csv
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

import jobs.__main__  # noqa: F401 - registers every command
from jobs import queries
from jobs.commands.app import app
from jobs.console import as_result
from jobs.output import MAX_TABLE_ROWS
from jobs.shell import completions, split
from pipeline.store.store import Store
from tests.catalogs import link, put, rewards

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("sql") / "store")
    put(store, "reward", "1", [rewards(0.5, 1.5)])
    link(store, "one", reward=("reward", "1"))
    return store


def sql(store: Store, *words: object, typed: str | bytes | None = None) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["sql", *map(str, words), "--store", str(store.root)], input=typed)
    return (2, str(done.exception)) if done.exception and not done.output else (done.exit_code, done.output)


ROWS = "SELECT reward, candidate_id, [1, NULL] AS ids, components FROM rewards ORDER BY reward"


def test_every_format_has_the_same_rows_in_a_file(store: Store, tmp_path: Path):
    files = {form: tmp_path / f"answer.{form}" for form in ("table", "csv", "json", "parquet")}
    for form, file in files.items():
        code, text = sql(store, ROWS, "--format", form, "--out", file)
        assert (code, text.split()) == (0, ["wrote", str(file)])
    expected = [dict(reward=r, candidate_id=c, ids=[1, None], components=None) for r, c in ((0.5, "c0"), (1.5, "c1"))]
    assert pq.read_table(files["parquet"]).to_pylist() == expected
    assert [json.loads(line) for line in files["json"].read_text().splitlines()] == expected
    header, *lines = csv.reader(io.StringIO(files["csv"].read_text()))
    assert [header, *lines] == [list(expected[0]), ["0.5", "c0", "[1, null]", ""], ["1.5", "c1", "[1, null]", ""]]
    assert "c1" in files["table"].read_text()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_failure_leaves_no_file_and_keeps_an_old_one(store: Store, tmp_path: Path):
    """A column that Parquet has no type for is found when the file is written."""
    (tmp_path / "answer").write_text("mine")
    for statement in ("SELECT INTERVAL 3 DAYS AS span", "SELECT error('stop') FROM rewards", "DROP TABLE runs"):
        code, text = sql(store, statement, "--format", "parquet", "--out", tmp_path / "answer")
        assert code == 2, text
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]
    assert "is not a file" in sql(store, "SELECT 1", "--format", "csv", "--out", tmp_path)[1]
    assert "is not a file" in sql(store, "SELECT 1", "--format", "csv", "--out", "/dev/null")[1]
    for name in ("n.csv", "n.CSV"):
        assert sql(store, "SELECT 7 AS n", "--out", tmp_path / name)[0] == 0
        assert (tmp_path / name).read_text() == "n\n7\n", "as the name ends"
    for name in ("n.foo", "n"):
        code, text = sql(store, "SELECT 7 AS n", "--out", tmp_path / name)
        assert (code, ".parquet" in text, "--format" in text, (tmp_path / name).exists()) == (2, True, True, False)
    assert "no such folder" in sql(store, "SELECT 1", "--out", tmp_path / "no" / "n.csv")[1]
    assert "add --out FILE" in sql(store, "SELECT 1", "--format", "parquet")[1]


def test_a_long_table_says_how_many_rows_it_omits(store: Store, tmp_path: Path):
    """A million rows: the table has the first ones in order, a file all of them."""
    many = "SELECT 1000000 - range AS n FROM range(1000000) ORDER BY n"
    code, text = sql(store, many)
    assert code == 0
    assert f"{1_000_000 - MAX_TABLE_ROWS:,} more rows" in text
    assert f"│ {MAX_TABLE_ROWS} " in text
    assert f"│ {MAX_TABLE_ROWS + 1} " not in text
    assert sql(store, many, "--format", "parquet", "--out", tmp_path / "many.parquet")[0] == 0
    assert pq.read_metadata(tmp_path / "many.parquet").num_rows == 1_000_000


def test_columns_that_do_not_fit_are_below_each_other():
    table = pa.table({f"column_{n}": [f"value {n} of the first", f"value {n} of the second"] for n in range(8)})
    text = [""] * 2
    for n, width in enumerate((200, 80)):
        out = io.StringIO()
        Console(file=out, width=width).print(as_result(table, width))
        text[n] = out.getvalue()
        assert all(value in text[n] for column in table.to_pydict().values() for value in column)
    beside, below = text
    assert [line.count("value") for line in beside.splitlines() if "value" in line] == [8, 8]
    assert [line.count("value") for line in below.splitlines() if "value" in line] == [1] * 16


def test_json_has_null_where_json_has_no_number(store: Store):
    lines = sql(store, "SELECT 'nan'::DOUBLE AS x, ['inf'::DOUBLE, 1.0] AS y", "--format", "json")[1]
    assert json.loads(lines, parse_constant=pytest.fail) == {"x": None, "y": [None, 1.0]}


def test_a_query_by_its_name(store: Store):
    assert sql(store, "reward_histogram", "--format", "csv")[1].startswith("what,low,high,n\n")
    assert "did you mean 'leaderboard'" in sql(store, "leaderbord")[1]
    code, text = sql(store, "--list")
    assert code == 0
    assert all(name in text for name in queries.names())


def test_db_exports_the_whole_store(store: Store, tmp_path: Path):
    file = tmp_path / "out.duckdb"
    assert "wrote" in sql(store, "--db", file)[1]
    with duckdb.connect(str(file)) as copy:
        assert copy.sql("SELECT sum(reward) FROM rewards").fetchall() == [(2.0,)]
    assert "already" in sql(store, "--db", file)[1]
    for words in (["SELECT 1", "--db", tmp_path / "x"], ["--out", tmp_path / "x"]):
        assert "--db a whole store without one" in sql(store, *words)[1]


def test_statements_end_by_a_semicolon_that_is_not_in_quotes():
    assert split("SELECT 1; SELECT ';") == (["SELECT 1;"], " SELECT ';")
    assert split("SELECT ';'\n -- it's; \n;\n") == (["SELECT ';'\n -- it's; \n;"], "")
    assert split("SELECT /* ; */ 1") == ([], "SELECT /* ; */ 1")
    assert split("leaderboard\n") == (["leaderboard\n"], "")
    assert split(".tables rewards\n") == ([".tables rewards\n"], "")
    assert split(" \n-- nothing; at all\n")[1] == ""
    assert split("SELECT $$a;b$$; SELECT 'é'; SELECT $t$;") == (["SELECT $$a;b$$;", " SELECT 'é';"], " SELECT $t$;")
    assert split("SELECT E'a\\';b'; /* c */\n") == (["SELECT E'a\\';b';"], "")
    assert split("/* a;\n") == ([], "/* a;\n")
    assert [split(f"{word}\n")[0] for word in ("quit", ".quit;", "EXIT;", ".q")] != [[]] * 4


def test_a_pipe_that_is_no_text_ends_with_its_line(store: Store):
    """Bytes that are not UTF-8, and characters that no statement has, are errors of one line; a byte order mark is
    not read; each word that ends other shells ends this one."""
    for typed, words in (
        (b"\n\xff\xfe;\n", "line 2 of the input is not UTF-8"),
        (b"SELECT \0;\n", "\\0"),
    ):
        code, text = sql(store, typed=typed)
        assert (code, words in text, "Traceback" in text) == (2, True, False)
    assert sql(store, "--format", "csv", typed=b"\xef\xbb\xbfSELECT 1 AS a;\n") == (0, "a\n1\n")
    for word in (".quit;", "quit", "exit;"):
        assert sql(store, typed=f"{word}\nSELECT nothing;") == (0, ""), word


def test_statements_from_a_pipe(store: Store):
    """Over several lines, two in one, the last without a semicolon; an error ends none of the others, but is told."""
    typed = "SELECT\n1 AS a\n; SELECT 2 AS b; SELECT 'x;y' AS c;\n-- a comment; here\nSELECT nothing;\nSELECT 9 AS d"
    code, text = sql(store, "--format", "csv", typed=typed)
    assert code == 2
    assert [line for line in text.split("\n") if len(line) < 4] == ["a", "1", "b", "2", "c", "x;y", "d", "9", ""]
    assert sql(store, "--format", "csv", typed="SELECT 1 AS a;\n") == (0, "a\n1\n")
    assert sql(store, typed="SELECT 1 AS a;\n.quit\nSELECT nothing;") == sql(store, typed="SELECT 1 AS a")
    assert sql(store, typed="") == (0, "")


def test_the_commands_of_the_shell(store: Store):
    code, text = sql(store, typed=".tables\n.tables rewards\n.tables steps\n.queries\n.help\nreward_histogram\n")
    facts = ["reward", "candidate", "hash of the stage", "best_of", ".quit", "all candidates"]
    assert (code, [fact for fact in facts if fact not in text]) == (0, [])
    assert "no table 'rewads'; did you mean 'rewards'?" in sql(store, typed=".tables rewads\n")[1]
    assert "no command .shell; .help" in sql(store, typed=".shell ls\n")[1]


def test_tab_completes_tables_columns_queries_keywords_and_commands():
    assert {"rewards", "candidate_id", "leaderboard", "SELECT", ".tables"} <= set(completions())


class Terminal:
    """`winnow sql` at a terminal of its own."""

    def __init__(self, store: Store, cache: Path) -> None:
        self.unread = ""
        self.fd, terminal = pty.openpty()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs", "sql", "--store", str(store.root), "--format", "csv"],
            stdin=terminal, stdout=terminal, stderr=terminal, env=environment | {"WINNOW_CACHE": str(cache)},
        )  # fmt: skip
        os.close(terminal)

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def wait_for(self, words: str) -> None:
        """Read up to these words; what one read brings beyond them is for the next call."""
        end = time.monotonic() + 60
        while words not in self.unread:
            assert select.select([self.fd], [], [], max(0, end - time.monotonic()))[0], self.unread
            self.unread += os.read(self.fd, 4096).decode(errors="replace")
        self.unread = self.unread.partition(words)[2]

    def cancel(self, press: Callable[[], None]) -> None:
        """Press Ctrl-C, and again while nothing happens: keys and signals may come too early."""
        for _ in range(30):
            press()
            if select.select([self.fd], [], [], 2)[0]:
                break
        self.wait_for("cancelled")
        self.wait_for("winnow>")

    def close(self) -> None:
        self.type(".quit\r")
        assert self.process.wait(timeout=30) == 0
        os.close(self.fd)


@pytest.mark.skipif(os.name == "nt", reason="a terminal and signals")
def test_the_shell_at_a_terminal(store: Store, tmp_path: Path):
    """Ctrl-C cancels a statement, running or half typed, but not the shell; Tab completes; history is kept."""
    shell = Terminal(store, tmp_path / "cache")
    shell.wait_for("winnow>")
    shell.type("SELECT count(*) FROM range(1000000000) a, range(1000000000) b WHERE a.range + b.range = 7;\r")
    time.sleep(1)
    shell.cancel(lambda: shell.process.send_signal(signal.SIGINT))  # a terminal signals only the session it controls
    shell.type("SELECT half\r")
    shell.wait_for("...>")
    shell.cancel(lambda: shell.type("\x03"))
    shell.type("SELECT 40\r")
    shell.wait_for("...>")
    shell.type("+ 2 AS a;\r")
    shell.wait_for("42")
    shell.wait_for("winnow>")
    shell.type("leaderb\t")
    shell.wait_for("oard")
    shell.type("\r")
    shell.wait_for("run,gold_win")
    shell.close()
    assert "+ 2 AS a;" in (tmp_path / "cache" / "sql_history").read_text()

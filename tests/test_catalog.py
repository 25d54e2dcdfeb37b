"""SQL over the store: a view for every table, whatever is in it; and nothing that a statement says can do harm."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.catalog import RUNS, STEPS, open_catalog, query
from pipeline.store import StepFolder, Store, write_json
from schemas import TABLES, WinnowError
from schemas.tables import PROMPTS, REJECTS, REWARDS

QUERIES = Path(__file__).parent.parent / "jobs" / "queries"
NASTY = ["it's", 'a "quoted" name', "'; DROP TABLE runs; --", "semi;colon", "émoji 🙂", "%s {x} $1 ?", "back\\slash"]

# What the page and the terminal read of each query's answer.
COLUMNS = {
    "curves": {"step", "metric", "value"},
    "evaluations_by_run": {"run", "metric", "value", "low", "high"},
    "leaderboard": {
        "run",
        "gold_win",
        "proxy_win",
        "gold_reward",
        "kl_nats",
        "tokens",
        "prompts",
        "seconds",
        "own_seconds",
    },
    "rejects": {"step", "stage", "key", "reason", "n", "first_place"},
    "responses": {"prompt", "baseline", "response", "gold_baseline", "gold"},
    "reward_histogram": {"what", "reward"},
    "selection": {"prompts", "kept", "passes", "effective_sample_size"},
    "status": {"run", "step", "stage", "key", "state", "rows", "seconds"},
}


def put(store: Store, stage: str, key: str, tables: Sequence[pa.Table], **extra) -> None:
    """A sealed step of one shard, as a run leaves it."""
    folder = StepFolder(store.root / stage / key)
    record = {"seconds": 1.5, "counters": {"tokens": 7}, "rejects": {}}
    folder.write_part(0, {table.schema.metadata[b"table"].decode(): table for table in tables}, record)
    identity = {"options": {"k": 8}, "inputs": {"prompts": "abc"}}
    made = {"stage": stage, "key": key, "identity": identity, "made": "2026-01-01T00:00:00+00:00", "commit": "c0ffee"}
    folder.seal(made | extra, 1, lambda manifest: None)


def link(store: Store, run: str, **steps: tuple[str, str]) -> None:
    links = {name: {"stage": stage, "key": key} for name, (stage, key) in steps.items()}
    write_json(store.root / "runs" / f"{run}.json", links)


def rewards(*values: float, prompt: str = "p") -> pa.Table:
    rows = [dict(prompt_id=prompt, candidate_id=f"c{n}", reward=value) for n, value in enumerate(values)]
    return pa.Table.from_pylist(rows, REWARDS)


def rejects(*reasons: str) -> pa.Table:
    return pa.Table.from_pylist([dict(place="here", reason=reason, detail="") for reason in reasons], REJECTS)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two runs that share their prompts; one has its own rewards; one more step that no run names."""
    store = Store(tmp_path / "store")
    texts = [dict(prompt_id=f"p{n}", text=text, token_ids=[n], split="train") for n, text in enumerate(NASTY)]
    put(store, "prompts", "1111", [pa.Table.from_pylist(texts, PROMPTS), rejects("too long", "too long", "empty")])
    put(store, "reward", "2222", [rewards(0.5, 1.5), rejects()])
    put(store, "reward", "3333", [rewards(9.0), rejects("too long")])
    link(store, "one", prompts=("prompts", "1111"), reward=("reward", "2222"))
    link(store, "two", prompts=("prompts", "1111"), later=("select", "4444"))
    return store


def rows(store: Store, sql: str, run: str | list[str] | None = None) -> list[dict]:
    return query(open_catalog(store, run), sql).to_pylist()


@pytest.mark.parametrize("name", [*TABLES, "runs", "steps"])
def test_every_table_has_a_view_even_in_an_empty_store(tmp_path: Path, name: str):
    """With its own columns, and with the stage and key of the step that made each row."""
    answer = query(open_catalog(Store(tmp_path / "nothing")), f"SELECT * FROM {name}")
    expected = {"runs": RUNS, "steps": STEPS}[name].names if name in ("runs", "steps") else [*TABLES[name].names]
    assert answer.num_rows == 0
    assert answer.column_names == (expected if name in ("runs", "steps") else [*expected, "stage", "key"])
    assert not (tmp_path / "nothing").exists(), "looking creates nothing"


def test_empty_and_full_views_have_the_same_types(store: Store, tmp_path: Path):
    """A query that works on an empty store works on a full one."""
    for name in ("prompts", "rewards", "rejects"):
        full = query(open_catalog(store), f"SELECT * FROM {name}").schema
        empty = query(open_catalog(Store(tmp_path / "nothing")), f"SELECT * FROM {name}").schema
        assert empty.equals(full)


def test_views_join_tables_to_the_steps_that_made_them(store: Store):
    found = rows(store, "SELECT key, count(*) AS n, max(reward) AS best FROM rewards GROUP BY key ORDER BY key")
    assert found == [dict(key="2222", n=2, best=1.5), dict(key="3333", n=1, best=9.0)]
    made = rows(store, "SELECT * FROM steps WHERE key = '1111'")[0]
    assert (made["stage"], made["rows"], made["rejects"], made["tokens"]) == ("prompts", len(NASTY), 3, 7)
    assert (made["options"], made["inputs"], made["commit"]) == ('{"k": 8}', '{"prompts": "abc"}', "c0ffee")


def test_runs_name_their_steps_made_or_not(store: Store):
    found = rows(store, "SELECT run, step, key FROM runs ORDER BY ALL")
    assert [tuple(row.values()) for row in found] == [
        ("one", "prompts", "1111"),
        ("one", "reward", "2222"),
        ("two", "later", "4444"),
        ("two", "prompts", "1111"),
    ]


def test_a_run_filters_every_view(store: Store):
    """Run one has two rewards; run two has none; rows of a step that no run names are in neither."""
    count = "SELECT (SELECT count(*) FROM prompts) AS p, (SELECT count(*) FROM rewards) AS r, count(*) AS s FROM steps"
    assert rows(store, count) == [dict(p=len(NASTY), r=3, s=3)]
    assert rows(store, count, "one") == [dict(p=len(NASTY), r=2, s=2)]
    assert rows(store, count, "two") == [dict(p=len(NASTY), r=0, s=1)]
    assert rows(store, "SELECT DISTINCT run FROM runs", "two") == [dict(run="two")]
    assert rows(store, count, ["one", "two"]) == [dict(p=len(NASTY), r=2, s=2)]


def test_an_unknown_run_names_those_there_are(store: Store):
    with pytest.raises(WinnowError, match=r"no run 'three' in .*; known: one, two"):
        open_catalog(store, "three")
    with pytest.raises(WinnowError, match=r"no run 'tow' in .*; did you mean 'two'"):
        open_catalog(store, ["one", "tow"])


def test_an_unsealed_step_is_not_seen(store: Store):
    (store.root / "reward" / "3333" / "manifest.json").unlink()
    assert rows(store, "SELECT max(reward) AS best FROM rewards") == [dict(best=1.5)]


@pytest.mark.parametrize("name", NASTY)
def test_any_run_name_and_any_text_is_only_text(store: Store, name: str):
    """Quotes, semicolons and markers in names and in data: found again as they are, and nothing else happens."""
    link(store, name, prompts=("prompts", "1111"))
    assert rows(store, "SELECT DISTINCT run FROM runs", name) == [dict(run=name)]
    assert name in [row["text"] for row in rows(store, "SELECT text FROM prompts", name)]
    assert len(rows(store, "SELECT DISTINCT run FROM runs")) == 3


def test_a_store_in_a_folder_with_a_quote_in_its_name_works(tmp_path: Path):
    """A file's name is written into SQL too; a folder may also look like a hive partition or a pattern."""
    for name in ("it's", "a=b", "x,y]", "semi;colon", "[a]", "st*r", "wh?t"):
        store = Store(tmp_path / name)
        put(store, "reward", "1", [rewards(1.0)])
        assert rows(store, "SELECT reward FROM rewards") == [dict(reward=1.0)]


HOSTILE = """
SELECT * FROM read_csv('{secret}')
SELECT * FROM read_csv_auto('{secret}')
SELECT * FROM read_text('{secret}')
SELECT * FROM read_blob('{secret}')
SELECT * FROM read_json('{secret}')
SELECT * FROM read_parquet('{secret}')
SELECT * FROM parquet_metadata('{secret}')
SELECT * FROM sniff_csv('{secret}')
SELECT * FROM '{secret}'
SELECT * FROM "{secret}"
SELECT * FROM query('SELECT * FROM read_text(''{secret}'')')
SELECT * FROM query_table('{secret}')
SELECT * FROM read_text('{store}/../secret.csv')
SELECT * FROM read_text('{store}/prompts/../../secret.csv')
SELECT * FROM read_text('{store}2/secret.csv')
SELECT * FROM read_text('file://{secret}')
SELECT * FROM read_text(['{secret}'])
SELECT * FROM glob('{folder}/*')
SELECT * FROM glob('{store}/../*')
SELECT * FROM read_csv('/etc/passwd', delim=':')
SELECT * FROM read_text('/proc/self/environ')
SELECT * FROM read_text('http://localhost/secret')
SELECT * FROM sqlite_scan('{secret}', 'x')
SELECT * FROM python_frame
SELECT * FROM secret_frame
SELECT getenv('WINNOW_SECRET')
SELECT * FROM duckdb_secrets()
SELECT * FROM (SELECT * FROM read_text('{secret}'))
SELECT (SELECT content FROM read_text('{secret}'))
WITH x AS (SELECT * FROM read_text('{secret}')) SELECT * FROM x
COPY runs TO '{folder}/out.csv'
COPY runs TO '{store}/out.csv'
COPY runs FROM '{secret}'
COPY (SELECT 1) TO '{store}/runs/evil.json'
EXPORT DATABASE '{folder}/out'
IMPORT DATABASE '{folder}'
ATTACH '{folder}/new.db' AS new
ATTACH '{store}/new.db' AS new
DETACH memory
USE memory
INSTALL httpfs
INSTALL '{folder}/x.duckdb_extension'
LOAD httpfs
LOAD '{folder}/x.duckdb_extension'
PRAGMA database_list
PRAGMA enable_profiling
PRAGMA profiling_output='{folder}/profile.json'
SET enable_external_access=true
SET lock_configuration=false
SET allowed_directories=['/']
SET temp_directory='{folder}'
RESET allowed_directories
CREATE TABLE x AS SELECT 1
CREATE OR REPLACE VIEW prompts AS SELECT 1
CREATE MACRO f() AS 1
CREATE SECRET s (TYPE s3)
INSERT INTO runs VALUES ('a', 'b', 'c', 'd')
UPDATE runs SET run = 'x'
DELETE FROM runs
TRUNCATE runs
DROP TABLE runs
DROP VIEW prompts
ALTER TABLE runs ADD COLUMN x INT
MERGE INTO runs USING steps ON false WHEN NOT MATCHED THEN INSERT VALUES ('a', 'b', 'c', 'd')
CALL pragma_version()
CALL enable_logging(storage='file', storage_path='{folder}/logs')
SELECT * FROM enable_logging(storage='file', storage_path='{folder}/logs')
SELECT * FROM enable_profiling(save_location='{folder}/profile.json')
CHECKPOINT
VACUUM
BEGIN
EXPLAIN ANALYZE SELECT 1
PREPARE p AS SELECT 1
EXECUTE p
SELECT $1
SELECT ?
SELECT 1; SELECT 2
SELECT 1; DROP TABLE runs
SELECT 1; COPY runs TO '{folder}/out.csv'
SELECT 1 /* ; */; ATTACH '{folder}/new.db'
SELECT * INTO x FROM runs
SELECT * FROM runs WHERE
SELECT nothing FROM runs
SELECT error('stop')
SELECT 'x'::INTEGER
;
--
""".strip().split("\n")  # fmt: skip


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def prey(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A small store with a secret beside it, and another folder whose name begins like the store's."""
    folder = tmp_path_factory.mktemp("prey")
    (folder / "secret.csv").write_text("a,b\nTOP,SECRET\n")
    (folder / "store2").mkdir()
    (folder / "store2" / "secret.csv").write_text("a,b\nTOP,SECRET\n")
    store = Store(folder / "store")
    put(store, "reward", "2222", [rewards(0.5)])
    link(store, "one", reward=("reward", "2222"))
    return store


@pytest.mark.parametrize("statement", ["", *HOSTILE])
def test_a_hostile_statement_is_refused(prey: Store, monkeypatch: pytest.MonkeyPatch, statement: str):
    """With words for people, without a file read outside the store or written anywhere; the catalog works on."""
    secret_frame = pa.table({"a": ["SECRET"]})  # a Python variable that DuckDB must not find
    folder = prey.root.parent
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WINNOW_SECRET", "SECRET")
    before = everything(folder)
    catalog = open_catalog(prey)
    with pytest.raises(WinnowError, match=r"^sql: ") as caught:
        query(catalog, statement.format(store=prey.root, folder=folder, secret=folder / "secret.csv"))
    assert "TOP" not in str(caught.value)
    assert everything(folder) == before
    assert query(catalog, "SELECT run FROM runs").to_pylist() == [{"run": "one"}]
    assert secret_frame.num_rows == 1


@pytest.mark.parametrize(
    "statement",
    [
        "WITH x AS (INSERT INTO runs VALUES ('a', 'b', 'c', 'd') RETURNING *) SELECT * FROM x",
        "WITH x AS (DELETE FROM runs RETURNING *) SELECT * FROM x",
        "SELECT write_log('TOP')",
        "SELECT * FROM checkpoint()",
        "SELECT current_setting('home_directory')",
    ],
)
def test_what_is_not_refused_leaves_the_store_as_it_is(prey: Store, monkeypatch: pytest.MonkeyPatch, statement: str):
    """At worst it changes its own catalog in memory, which is thrown away: the files are the truth."""
    monkeypatch.chdir(prey.root.parent)
    before = everything(prey.root.parent)
    with contextlib.suppress(WinnowError):
        query(open_catalog(prey), statement)
    assert everything(prey.root.parent) == before
    assert query(open_catalog(prey), "SELECT run FROM runs").to_pylist() == [{"run": "one"}]


@pytest.mark.parametrize(
    ("statement", "count"),
    [
        ("SELECT 1", 1),
        ("SELECT 1;", 1),
        ("-- a comment\nSELECT 1 -- another", 1),
        ("FROM runs", 4),
        ("VALUES (1), (2)", 2),
        ("WITH a AS (SELECT 1) SELECT * FROM a UNION ALL SELECT 2", 2),
        ("SELECT ';' AS a", 1),
        ("SELECT [1, 2] AS a, {'b': 1} AS c, NULL AS d, 1::DECIMAL(4, 2) AS e, DATE '2026-01-01' AS f", 1),
        ("DESCRIBE runs", 5),
    ],
)
def test_any_single_question_is_answered(store: Store, statement: str, count: int):
    assert query(open_catalog(store), statement).num_rows == count


@pytest.mark.parametrize("file", sorted(QUERIES.glob("*.sql")), ids=lambda file: file.stem)
@pytest.mark.parametrize("full", [False, True], ids=["empty", "full"])
def test_our_own_queries_run_on_any_store(tmp_path: Path, store: Store, file: Path, full: bool):
    """On an empty one too, with the columns that the report and the terminal read."""
    answer = query(open_catalog(store if full else Store(tmp_path / "nothing")), file.read_text())
    assert COLUMNS.get(file.stem, set()) <= set(answer.column_names)
    assert full or answer.num_rows == 0


def test_columns_of_one_name_are_told_apart(store: Store):
    """SELECT * over a join has the joined column twice; no value of either may be lost."""
    answer = query(open_catalog(store), "SELECT 1 AS a, 2 AS a_2, 3 AS a, 4 AS b, 5 AS a")
    assert answer.to_pylist() == [{"a": 1, "a_2": 2, "a_3": 3, "b": 4, "a_4": 5}]


def test_status_shows_steps_that_are_not_made_yet(store: Store):
    found = {(row["run"], row["step"]): row["state"] for row in rows(store, (QUERIES / "status.sql").read_text())}
    assert found["two", "later"] == "not finished"
    assert found["two", "prompts"] == found["one", "prompts"] == "made"


def test_rejects_are_counted_by_step_and_reason(store: Store):
    """A step that two runs share counts once: 2 too long, 1 empty."""
    found = [(row["step"], row["reason"], row["n"]) for row in rows(store, (QUERIES / "rejects.sql").read_text())]
    assert found == [("prompts", "too long", 2), ("prompts", "empty", 1)]

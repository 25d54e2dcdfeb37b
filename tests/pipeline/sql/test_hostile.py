"""No statement, name or row can read or change anything outside the store, or change the store."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import jobs.__main__  # noqa: F401 - registers every command
from jobs.commands.app import app
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from schemas import WinnowError, WinnowWarning
from tests.catalogs import link, put, rewards
from tests.runs import local

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
SELECT * FROM query_table(['runs', '{secret}'])
SELECT * FROM query('COPY runs TO ''{folder}/out.csv''')
SELECT * FROM query('SELECT 1; DROP TABLE runs')
SELECT * FROM query('ATTACH ''{folder}/new.db''')
SELECT * FROM query_table('rew' || 'ards')
SELECT * FROM read_text('{store}/../secret.csv')
SELECT * FROM read_text('{store}/reward/link.csv')
SELECT * FROM read_text('{store}/outside/secret.csv')
SELECT * FROM read_csv('{store}/outside/*.csv')
SELECT * FROM parquet_schema('{folder}/outside.parquet')
SELECT * FROM parquet_kv_metadata('{folder}/outside.parquet')
SELECT * FROM parquet_file_metadata('{folder}/outside.parquet')
SELECT * FROM '{folder}/outside.parquet'
SELECT * FROM read_ndjson_objects('{secret}')
SELECT * FROM read_duckdb('{folder}/x.duckdb')
SELECT * FROM read_text('{store}/prompts/../../secret.csv')
SELECT * FROM read_text('{store}2/secret.csv')
SELECT * FROM read_text('file://{secret}')
SELECT * FROM read_text(['{secret}'])
SELECT * FROM glob('{folder}/*')
SELECT * FROM glob('{store}/../*')
SELECT * FROM read_csv('/etc/passwd', delim=':')
SELECT * FROM read_text('/proc/self/environ')
SELECT * FROM read_text('http://localhost/secret')
SELECT * FROM read_parquet('s3://bucket/secret.parquet')
SELECT * FROM read_parquet('gs://bucket/secret.parquet')
SELECT * FROM read_parquet('hf://datasets/a/b.parquet')
SELECT * FROM arrow_scan(1, 2, 3)
SELECT * FROM pandas_scan(1)
SELECT * FROM postgres_scan('host=localhost', 'public', 'x')
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
RESET ALL
SET VARIABLE rewards = ['{secret}']
SET SESSION rewards = 1
SET GLOBAL python_enable_replacements=true
CREATE TEMP TABLE x AS SELECT 1
CREATE FUNCTION f() AS 1
CREATE SCHEMA x
CREATE TYPE t AS ENUM ('a')
COMMENT ON TABLE runs IS 'x'
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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A small store with a secret beside it, and another folder whose name begins like the store's."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "secret.csv").write_text("a,b\nTOP,SECRET\n")
    pq.write_table(pa.table({"a": ["SECRET"]}), folder / "outside.parquet")
    (folder / "store2").mkdir()
    (folder / "store2" / "secret.csv").write_text("a,b\nTOP,SECRET\n")
    store = Store(folder / "store")
    put(store, "reward", "2222", [rewards(0.5)])
    link(store, "one", reward=("reward", "2222"))
    (store.root / "reward" / "link.csv").symlink_to(folder / "secret.csv")
    (store.root / "outside").symlink_to(folder)
    return store


def test_a_hostile_statement_is_refused(guarded: Store, monkeypatch: pytest.MonkeyPatch):
    """With a message, and no file read outside the store or written anywhere; the catalog works afterwards."""
    secret_frame = pa.table({"a": ["SECRET"]})  # a Python variable that DuckDB must not find
    folder = local(guarded.root).parent
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WINNOW_SECRET", "SECRET")
    before, catalog = contents(folder), open_catalog(guarded)
    for statement in ("", *HOSTILE):
        message = ""
        try:
            query(catalog, statement.format(store=guarded.root, folder=folder, secret=folder / "secret.csv"))
        except WinnowError as error:
            message = str(error)
        assert message.startswith("sql: "), statement
        assert "TOP" not in message, statement
        assert contents(folder) == before, statement
        assert query(catalog, "SELECT run FROM runs").to_pylist() == [{"run": "one"}], statement
    assert secret_frame.num_rows == 1


HARMLESS = """
WITH x AS (INSERT INTO runs VALUES ('a', 'b', 'c', 'd') RETURNING *) SELECT * FROM x
WITH x AS (DELETE FROM runs RETURNING *) SELECT * FROM x
SELECT write_log('TOP')
SELECT * FROM checkpoint()
SELECT current_setting('home_directory')
SELECT * FROM glob('{store}/outside/*')
SELECT * FROM glob('{store}/**')
SELECT * FROM duckdb_settings()
SELECT * FROM duckdb_extensions()
SELECT * FROM duckdb_temporary_files()
SELECT getvariable('rewards') FROM rewards
SELECT * FROM query('SELECT run FROM runs')
SELECT content FROM read_text('{store}/runs/one.json')
SELECT repeat('x', 1000) FROM range(1000) ORDER BY random()
""".strip().split("\n")


def test_a_statement_that_is_not_refused_leaves_the_store_as_it_is(guarded: Store, monkeypatch: pytest.MonkeyPatch):
    """At worst it changes its own catalog in memory, which is thrown away."""
    folder = local(guarded.root).parent
    monkeypatch.chdir(folder)
    before = contents(folder)
    for statement in HARMLESS:
        with contextlib.suppress(WinnowError):
            rows = query(open_catalog(guarded), statement.format(store=guarded.root)).to_pylist()
            assert not [secret for secret in ("secret.csv", "SECRET") if secret in str(rows)], statement
        assert contents(folder) == before, statement
    assert query(open_catalog(guarded), "SELECT run FROM runs").to_pylist() == [{"run": "one"}]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store that a test may damage, with a file of rewards beside it that does not belong to it."""
    put(Store(tmp_path / "other"), "reward", "1", [rewards(666.0)])
    store = Store(tmp_path / "store")
    put(store, "reward", "1", [rewards(0.5)])
    link(store, "one", reward=("reward", "1"))
    return store


@pytest.fixture
def foreign_file(store: Store) -> Path:
    return next((local(store.root).parent / "other" / "reward" / "1").glob("*.parquet"))


def refused(store: Store, match: str, change: dict[str, object] | Callable[[dict], object]) -> None:
    """Change the manifest, by other fields or a function; it does not count, and a warning says why; restore it."""
    path = local(store.root) / "reward" / "1" / "manifest.json"
    before = path.read_text()
    manifest = json.loads(before)
    manifest.update(change) if isinstance(change, dict) else change(manifest)
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name not in ("sha256", "format")}))
    with pytest.warns(WinnowWarning, match=match):
        assert "1" not in {row["key"] for row in query(open_catalog(store), "SELECT key FROM steps").to_pylist()}
    path.write_text(before)


def test_a_manifest_may_only_list_files_in_its_own_folder(store: Store, foreign_file: Path):
    """Checked before any file is opened; the message names the manifest and the name."""
    for name in (
        f"../../../other/reward/1/{foreign_file.name}",
        str(foreign_file),
        "../../etc/passwd.parquet",
        "/etc/passwd",
        "rewards-*.parquet",
        "rewards-0000?.parquet",
        "rewards-[0].parquet",
        "rewards-00000.parquet'], hive_partitioning=false) UNION ALL SELECT * FROM read_text('/etc/passwd') --",
        "rewards-00000.parquet\n",
        "rewards-0\u0000.parquet",
        "s3://bucket/rewards-00000.parquet",
        ".rewards-00000.parquet",
        "..",
        "",
    ):
        file = {"file": name, "rows": 1, "bytes": 1, "sha256": ""}
        refused(store, r"manifest.json: .*files\.0\.file: .*pattern", {"files": [file]})


def test_a_manifest_must_be_in_the_folder_that_it_names(store: Store):
    refused(store, "it belongs to select/1", {"stage": "select"})
    refused(store, "it belongs to reward/2", {"key": "2"})
    for field, value in (("key", 1), ("stage", "../../other/reward"), ("key", "1'; --")):
        refused(store, rf"not a valid manifest \({field}: ", {field: value})


def test_an_invalid_manifest_is_named_with_its_field(store: Store):
    changes: list[tuple[str, dict[str, object] | Callable[[dict], object]]] = [
        ("files", lambda manifest: manifest.pop("files")),
        ("files.0.file", {"files": [{"name": "x"}]}),
        ("files.0.file", lambda manifest: manifest["files"][0].update(file=7)),
        ("files.0.rows", lambda manifest: manifest["files"][0].pop("rows")),
        ("rows", {"rows": [1]}),
        ("counters", {"counters": None}),
        ("seconds", {"seconds": "'; DROP TABLE runs"}),
        ("identity", {"identity": "x"}),
        ("identity.version", lambda manifest: manifest["identity"].update(version=[1])),
    ]
    for field, change in changes:
        refused(store, rf"reward/1/manifest.json: not a valid manifest \({field}: ", change)


def test_an_invalid_run_is_named(store: Store):
    for content in ([1], {"reward": "x"}, {"reward": {"stage": "reward"}}, {"reward": None}, 7):
        (store.root / "runs" / "odd.json").write_text(json.dumps(content))
        with pytest.raises(WinnowError, match=r"odd.*verify --repair"):
            open_catalog(store)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_that_leads_out_of_the_store_is_not_followed(
    store: Store, foreign_file: Path, tmp_path: Path, what: str
):
    """Whether a file is one, or its step's folder; an export does not follow it either, and leaves no file."""
    folder = local(store.root) / "reward" / "1"
    if what == "folder":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        file = next(folder.glob("*.parquet"))
        file.unlink()
        file.symlink_to(foreign_file)
    with pytest.raises(WinnowError, match="link that leads out"):
        query(open_catalog(store), "SELECT * FROM rewards")
    with pytest.raises(WinnowError, match="link that leads out"):
        open_catalog(store).export(tmp_path / "out.duckdb")
    assert not list(tmp_path.glob("*out*"))


NAMES = [
    "it's",
    'a "b"',
    "'; DROP TABLE runs; --",
    "x') UNION SELECT 'y",
    "{store}",
    "%s",
    "[red]",
    "../one",
    "\u202e\U0001f642",
]


def test_names_of_runs_steps_and_stages_are_only_text(store: Store):
    """In every view that has them, and as `--run`."""
    for name in NAMES:
        file = store.root / "runs" / f"{name.replace('/', '_')}.json"
        file.write_text(json.dumps({name: {"stage": name, "key": name, "run": "forged", "round": 9}}))
        catalog = open_catalog(store, file.stem)
        expected = dict(run=file.stem, step=name, round=None, stage=name, key=name)
        expected |= dict.fromkeys(("tags", "method", "seeds"))
        assert query(catalog, "SELECT * FROM runs").to_pylist() == [expected]
        assert query(catalog, "SELECT * FROM rewards").num_rows == 0
        with pytest.raises(WinnowError, match="no run"):
            open_catalog(store, f"{name}?")


def test_the_text_of_a_row_is_only_text(store: Store, tmp_path: Path):
    """It comes out as it went in: by SQL, by the command, and in an exported file."""
    texts = [*NAMES, "SELECT * FROM read_text('/etc/passwd')", "=cmd|' /C calc'!A0", "\x1b[31m"]
    put(store, "reward", "2", [pa.concat_tables([rewards(float(n), prompt=text) for n, text in enumerate(texts)])])
    statement = "SELECT prompt_id FROM rewards WHERE key = '2' ORDER BY reward"
    expected = [dict(prompt_id=text) for text in texts]
    assert query(open_catalog(store), statement).to_pylist() == expected
    done = CliRunner().invoke(app, ["sql", statement, "--store", str(store.root), "--format", "json"])
    assert [json.loads(line) for line in done.output.splitlines()] == expected
    open_catalog(store).export(tmp_path / "out.duckdb")
    with duckdb.connect(str(tmp_path / "out.duckdb")) as copy:
        assert copy.sql(statement).fetchall() == [(text,) for text in texts]


def test_the_shell_runs_no_command_of_another_shell(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(local(store.root).parent)
    before = contents(local(store.root).parent)
    for words in (".read /etc/passwd", ".shell ls", ".output x", ".import x y", ".open x", "!ls", "\\! ls"):
        done = CliRunner().invoke(app, ["sql", "--store", str(store.root)], input=f"{words}\n;\n")
        assert (done.exit_code, "sql: " in done.output) == (2, True), words
        assert "root:" not in done.output
        assert contents(local(store.root).parent) == before


def test_a_table_whose_name_is_hidden_is_never_empty(store: Store):
    """A view is opened when a statement has its name; a name that is put together from parts raises an error."""
    catalog = open_catalog(store)
    with pytest.raises(WinnowError, match="write the name rewards in full"):
        catalog.sql("SELECT * FROM query_table('rew' || 'ards')").arrow()
    for hidden in ("SELECT * FROM query_table('rewards')", 'SELECT * FROM "REWARDS"', "FROM main.rewards"):
        assert open_catalog(store).sql(hidden).arrow().num_rows == 1
    assert catalog.sql("SELECT * FROM rewards").arrow().num_rows == 1

"""Nothing that a statement, a name or a row says reads or changes anything outside the store, or changes the store."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import jobs.__main__  # noqa: F401 - registers every command
import pipeline
from jobs.commands.app import app
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from schemas import WinnowError
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


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def prey(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A small store with a secret beside it, and another folder whose name begins like the store's."""
    folder = tmp_path_factory.mktemp("prey")
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


@pytest.mark.parametrize("statement", ["", *HOSTILE])
def test_a_hostile_statement_is_refused(prey: Store, monkeypatch: pytest.MonkeyPatch, statement: str):
    """With words for people, without a file read outside the store or written anywhere; the catalog works on."""
    secret_frame = pa.table({"a": ["SECRET"]})  # a Python variable that DuckDB must not find
    folder = local(prey.root).parent
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
        "SELECT * FROM glob('{store}/outside/*')",
        "SELECT * FROM glob('{store}/**')",
        "SELECT * FROM duckdb_settings()",
        "SELECT * FROM duckdb_extensions()",
        "SELECT * FROM duckdb_temporary_files()",
        "SELECT getvariable('rewards') FROM rewards",
        "SELECT * FROM query('SELECT run FROM runs')",
        "SELECT content FROM read_text('{store}/runs/one.json')",
        "SELECT repeat('x', 1000) FROM range(1000) ORDER BY random()",
    ],
)
def test_what_is_not_refused_leaves_the_store_as_it_is(prey: Store, monkeypatch: pytest.MonkeyPatch, statement: str):
    """At worst it changes its own catalog in memory, which is thrown away: the files are the truth."""
    monkeypatch.chdir(local(prey.root).parent)
    before = everything(local(prey.root).parent)
    with contextlib.suppress(WinnowError):
        answer = query(open_catalog(prey), statement.format(store=prey.root))
        assert not [name for name in ("secret.csv", "SECRET") if name in str(answer.to_pylist())]
    assert everything(local(prey.root).parent) == before
    assert query(open_catalog(prey), "SELECT run FROM runs").to_pylist() == [{"run": "one"}]


@pytest.fixture
def own(tmp_path: Path) -> Store:
    """A store that a test may spoil, with a file of rewards beside it that is none of the store's."""
    put(Store(tmp_path / "other"), "reward", "1", [rewards(666.0)])
    store = Store(tmp_path / "store")
    put(store, "reward", "1", [rewards(0.5)])
    link(store, "one", reward=("reward", "1"))
    return store


def spoil(store: Store, change: Callable[[dict], object]) -> None:
    """Write something else into the manifest."""
    place = store.root / "reward" / "1" / "manifest.json"
    content = json.loads(place.read_text())
    change(content)
    place.write_text(json.dumps(content))


def stolen(store: Store) -> Path:
    return next((local(store.root).parent / "other" / "reward" / "1").glob("*.parquet"))


@pytest.mark.parametrize(
    "name",
    [
        "../../../other/reward/1/{stolen}",
        "{folder}/other/reward/1/{stolen}",
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
    ],
)
def test_a_manifest_that_lists_what_is_not_in_its_folder_is_refused(own: Store, name: str):
    """Before any file is opened; the message names the manifest."""
    name = name.format(stolen=stolen(own).name, folder=own.root.parent)
    spoil(own, lambda content: content["files"].append({"file": name, "rows": 1, "bytes": 1, "sha256": ""}))
    with pytest.raises(WinnowError, match=r"manifest.json: .* is no name of a part"):
        open_catalog(own)


@pytest.mark.parametrize(
    "claim", [{"stage": "select"}, {"key": "2"}, {"key": 1}, {"stage": "../../other/reward"}, {"key": "1'; --"}]
)
def test_a_manifest_in_another_steps_place_is_refused(own: Store, claim: dict[str, object]):
    spoil(own, lambda content: content.update(claim))
    with pytest.raises(WinnowError, match="it says that it is"):
        open_catalog(own)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("files"),
        lambda content: content.update(files=[{"name": "x"}]),
        lambda content: content.update(rows=[1]),
        lambda content: content.update(counters=None),
        lambda content: content.update(seconds="'; DROP TABLE runs"),
        lambda content: content.update(identity="x"),
        lambda content: content["identity"].update(version=[1]),
        lambda content: content["files"][0].update(file=7),
    ],
)
def test_what_is_no_manifest_is_named(own: Store, change: Callable[[dict], object]):
    spoil(own, change)
    with pytest.raises(WinnowError, match=r"reward/1/manifest.json: no manifest of ours"):
        open_catalog(own)


@pytest.mark.parametrize("content", [[1], {"reward": "x"}, {"reward": {"stage": "reward"}}, {"reward": None}, 7])
def test_what_is_no_run_is_named(own: Store, content: object):
    (own.root / "runs" / "odd.json").write_text(json.dumps(content))
    with pytest.raises(WinnowError, match="run 'odd': its file in runs/ is none of ours"):
        open_catalog(own)


@pytest.mark.parametrize("what", ["part", "folder"])
def test_a_link_that_leads_out_of_the_store_is_not_followed(own: Store, tmp_path: Path, what: str):
    """Whether a part is one, or its step's folder; an export has nothing of it either, and leaves no file."""
    folder = local(own.root) / "reward" / "1"
    if what == "folder":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        part = next(folder.glob("*.parquet"))
        part.unlink()
        part.symlink_to(stolen(own))
    with pytest.raises(WinnowError, match="no link that leads out of it"):
        query(open_catalog(own), "SELECT * FROM rewards")
    with pytest.raises(WinnowError, match="no link that leads out of it"):
        open_catalog(own).export(tmp_path / "out.duckdb")
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


@pytest.mark.parametrize("name", NAMES)
def test_names_of_runs_steps_and_stages_are_only_text(own: Store, name: str):
    """In every view that has them, and as `--run`."""
    file = own.root / "runs" / f"{name.replace('/', '_')}.json"
    file.write_text(json.dumps({name: {"stage": name, "key": name, "run": "forged", "round": 9}}))
    rows = query(open_catalog(own, file.stem), "SELECT * FROM runs").to_pylist()
    assert rows == [dict(run=file.stem, step=name, round=None, stage=name, key=name)]
    assert query(open_catalog(own, file.stem), "SELECT * FROM rewards").num_rows == 0
    with pytest.raises(WinnowError, match="no run"):
        open_catalog(own, f"{name}?")


@pytest.mark.parametrize("text", [*NAMES, "SELECT * FROM read_text('/etc/passwd')", "=cmd|' /C calc'!A0", "\x1b[31m"])
def test_a_rows_text_is_only_text(own: Store, tmp_path: Path, text: str):
    """It comes out as it went in, by SQL, by the command, and in an exported file."""
    put(own, "reward", "2", [rewards(1.0, prompt=text)])
    ask = "SELECT prompt_id FROM rewards WHERE key = '2'"
    assert query(open_catalog(own), ask).to_pylist() == [dict(prompt_id=text)]
    done = CliRunner().invoke(app, ["sql", ask, "--store", str(own.root), "--format", "json"])
    assert json.loads(done.output) == dict(prompt_id=text)
    open_catalog(own).export(tmp_path / "out.duckdb")


@pytest.mark.parametrize(
    "words", [".read /etc/passwd", ".shell ls", ".output x", ".import x y", ".open x", "!ls", "\\! ls"]
)
def test_the_shell_has_no_way_out(own: Store, monkeypatch: pytest.MonkeyPatch, words: str):
    monkeypatch.chdir(local(own.root).parent)
    before = everything(local(own.root).parent)
    done = CliRunner().invoke(app, ["sql", "--store", str(own.root)], input=f"{words}\n;\n")
    assert done.exit_code == 2
    assert "sql: " in done.output
    assert "root:" not in done.output
    assert everything(local(own.root).parent) == before


def test_a_table_is_never_empty_because_its_name_was_hidden(own: Store):
    """A view is opened when a statement has its name; a name put together out of parts is refused, not answered."""
    catalog = pipeline.open(own.root)
    with pytest.raises(WinnowError, match="write the name rewards out"):
        catalog.sql("SELECT * FROM query_table('rew' || 'ards')").arrow()
    for hidden in ("SELECT * FROM query_table('rewards')", 'SELECT * FROM "REWARDS"', "FROM main.rewards"):
        assert pipeline.open(own.root).sql(hidden).arrow().num_rows == 1
    assert catalog.sql("SELECT * FROM rewards").arrow().num_rows == 1

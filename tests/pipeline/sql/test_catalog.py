"""SQL over the store: every table has a view, whatever it holds."""

import errno
import json
import math
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

import jobs.report
from jobs import queries
from pipeline.sql.catalog import Catalog, open_catalog, query
from pipeline.sql.views import LIVE, VIEWS, null_columns, view
from pipeline.store.inventory import Inventory
from pipeline.store.storage import replace
from pipeline.store.store import Store
from schemas import TABLES, WinnowError
from schemas.tables import CANDIDATES, EXAMPLES, FEATURES, JUDGEMENTS, PROMPTS, REWARDS
from tests.catalogs import link, put, rejects, rewards, table
from tests.runs import local

NASTY = ["it's", 'a "quoted" name', "'; DROP TABLE runs; --", "semi;colon", "émoji 🙂", "%s {x} $1 ?", "back\\slash"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two runs that share their prompts; only `one` has rewards; one more step that no run links to."""
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


def rewards_file(store: Store, key: str) -> Path:
    return next((local(store.root) / "reward" / key).glob("rewards-*.parquet"))


def test_views_of_an_empty_store_have_the_columns_and_types_of_a_full_one(store: Store, tmp_path: Path):
    """So a query that works on one works on the other. Every view has the stage and key of the step of each row."""
    full, empty = open_catalog(store), open_catalog(Store(tmp_path / "nothing"))
    for name, schema in VIEWS.items():
        result = query(empty, f"SELECT * FROM {name}")
        assert (result.num_rows, result.column_names) == (0, schema.names)
        assert {"stage", "key"} <= set(result.column_names)
        assert name in ("runs", "steps", *LIVE) or result.column_names[:-2] == TABLES[name].names
        if name in ("prompts", "rewards", "rejects"):
            assert result.schema.equals(query(full, f"SELECT * FROM {name}").schema)
    assert not (tmp_path / "nothing").exists(), "reading creates nothing"


def test_views_join_tables_to_steps_and_runs(store: Store):
    best = rows(store, "SELECT key, count(*) AS n, max(reward) AS best FROM rewards GROUP BY key ORDER BY key")
    assert best == [dict(key="2222", n=2, best=1.5), dict(key="3333", n=1, best=9.0)]
    step = rows(store, "SELECT * FROM steps WHERE key = '1111'")[0]
    assert (step["stage"], step["rows"], step["rejects"], step["tokens"]) == ("prompts", len(NASTY), 3, 7)
    assert (step["options"], step["inputs"], step["commit"]) == ('{"k": 8}', '{"prompts": "abc"}', "c0ffee")
    links = rows(store, "SELECT run, step, key FROM runs ORDER BY ALL")
    assert [tuple(row.values()) for row in links] == [
        ("one", "prompts", "1111"),
        ("one", "reward", "2222"),
        ("two", "later", "4444"),  # not finished
        ("two", "prompts", "1111"),
    ]


def test_a_catalog_of_some_runs_has_their_rows_only(store: Store):
    """Opened for them, or selected from an open catalog; rows of a step that no run links to are in neither."""
    count = (
        "SELECT (SELECT count(*) FROM prompts) AS p, (SELECT count(*) FROM rewards) AS r, "
        "(SELECT list_sort(list(DISTINCT run)) FROM runs) AS runs, count(*) AS s FROM steps"
    )
    catalog, prompts = open_catalog(store), len(NASTY)
    for run, expected in (
        (None, dict(p=prompts, r=3, runs=["one", "two"], s=3)),
        ("one", dict(p=prompts, r=2, runs=["one"], s=2)),
        ("two", dict(p=prompts, r=0, runs=["two"], s=1)),
        (["one", "two"], dict(p=prompts, r=2, runs=["one", "two"], s=2)),
    ):
        assert rows(store, count, run) == query(catalog.for_run(run), count).to_pylist() == [expected]
    with pytest.raises(WinnowError, match=r"no run 'three' in .*; known: one, two"):
        open_catalog(store, "three")
    with pytest.raises(WinnowError, match=r"no run 'tow' in .*; did you mean 'two'"):
        open_catalog(store, ["one", "tow"])


def test_an_unfinished_step_is_not_visible(store: Store):
    (store.root / "reward" / "3333" / "manifest.json").unlink()
    assert rows(store, "SELECT max(reward) AS best FROM rewards") == [dict(best=1.5)]


def test_any_name_and_any_text_is_only_text(store: Store, tmp_path: Path):
    """Quotes, semicolons and markers in run names, data and folders (also hive partitions and glob patterns)."""
    for name in NASTY:
        link(store, name, prompts=("prompts", "1111"))
        assert rows(store, "SELECT DISTINCT run FROM runs", name) == [dict(run=name)]
        assert name in [row["text"] for row in rows(store, "SELECT text FROM prompts", name)]
    assert len(rows(store, "SELECT DISTINCT run FROM runs")) == 2 + len(NASTY)
    for name in ("it's", "a=b", "x,y]", "semi;colon", "[a]", "st*r", "wh?t"):
        nasty = Store(tmp_path / name)
        put(nasty, "reward", "1", [rewards(1.0)])
        assert rows(nasty, "SELECT reward FROM rewards") == [dict(reward=1.0)]


def test_any_single_select_is_answered(store: Store):
    catalog = open_catalog(store)
    for statement, count in (
        ("SELECT 1", 1),
        ("SELECT 1;", 1),
        ("-- a comment\nSELECT 1 -- another", 1),
        ("FROM runs", 4),
        ("VALUES (1), (2)", 2),
        ("WITH a AS (SELECT 1) SELECT * FROM a UNION ALL SELECT 2", 2),
        ("SELECT ';' AS a", 1),
        ("SELECT [1, 2] AS a, {'b': 1} AS c, NULL AS d, 1::DECIMAL(4, 2) AS e, DATE '2026-01-01' AS f", 1),
        ("DESCRIBE runs", 8),
    ):
        assert query(catalog, statement).num_rows == count, statement


def test_columns_of_the_same_name_are_numbered(store: Store):
    """SELECT * over a join has the joined column twice; no value of either may be lost."""
    result = query(open_catalog(store), "SELECT 1 AS a, 2 AS a_2, 3 AS a, 4 AS b, 5 AS a")
    assert result.to_pylist() == [{"a": 1, "a_2": 2, "a_1": 3, "b": 4, "a_3": 5}]


def test_only_the_tables_in_a_statement_are_opened(store: Store):
    """A damaged table does not stop a query about others; one about it says what to do."""
    rewards_file(store, "2222").write_bytes(b"no parquet")
    catalog = open_catalog(store)
    assert query(catalog, "SELECT count(*) AS n FROM prompts").to_pylist() == [dict(n=len(NASTY))]
    assert query(catalog, "DESCRIBE rejects").num_rows == 7
    with pytest.raises(WinnowError, match="sql: "):
        query(catalog, "SELECT * FROM rewards")
    rewards_file(store, "2222").unlink()
    with pytest.raises(WinnowError, match="verify --repair"):
        query(catalog, "SELECT * FROM rewards")


def test_of_a_large_store_a_statement_may_read_the_files_of_its_tables_alone(store: Store, monkeypatch):
    """DuckDB takes a second for 50,000 files. What an earlier statement returned can still be read."""
    monkeypatch.setattr("pipeline.sql.catalog.FEW_FILES", 0)
    catalog, file = open_catalog(store), str(rewards_file(store, "2222"))
    prompts = catalog.sql("SELECT count(*) AS n FROM prompts")
    with pytest.raises(WinnowError, match="Only files of tables"):
        query(catalog, f"SELECT * FROM read_parquet('{file}')".replace("rewards", "rew' || 'ards"))
    both = query(catalog, "SELECT (SELECT count(*) FROM prompts) AS n, count(*) > 0 AS some FROM rewards").to_pylist()
    assert both == [{"n": len(NASTY), "some": True}]
    assert prompts.arrow().to_pylist() == [{"n": len(NASTY)}]
    assert query(catalog, "DESCRIBE candidates").num_rows == len(VIEWS["candidates"])


def test_only_the_files_of_the_key_in_a_statement_are_opened(store: Store):
    """A file's key is known from its path; also if another table was written by several versions of a stage."""
    rewards_file(store, "3333").write_bytes(b"no parquet")
    for _ in range(2):
        assert rows(store, "SELECT max(reward) AS best FROM rewards WHERE key = '2222'") == [dict(best=1.5)]
        assert rows(store, "SELECT max(reward) AS best FROM rewards WHERE stage = 'nothing'") == [dict(best=None)]
        with pytest.raises(WinnowError):
            rows(store, "SELECT max(reward) AS best FROM rewards")
        put(store, "prompts", "5555", [rejects()], version=2)


def test_stage_and_key_are_the_same_whether_one_step_or_several_wrote_a_table(store: Store):
    """Those of one step are constants to DuckDB, which drops them from groups and joins; else they come from paths."""
    statement = "SELECT stage, key, reward FROM rewards WHERE key = '{}' ORDER BY reward"
    assert rows(store, statement.format("2222"), "one") == rows(store, statement.format("2222"))
    assert [row["key"] for row in rows(store, statement.format("2222"))] == ["2222"] * 2
    assert rows(store, statement.format("3333"), "one") == []
    one, several = (view("rewards", open_catalog(store, run).manifests, False) for run in ("one", None))
    assert "'2222' AS key" in one
    assert "parse_filename" in several


def test_a_column_that_older_parts_lack_is_null(store: Store):
    """A table's columns changed between two versions of a stage, or between two stages that write it."""
    old = pq.read_table(rewards_file(store, "2222")).drop_columns(["components"])
    put(store, "combine", "4444", [rewards(7.0)], version=2)
    put(store, "reward", "5555", [rewards(8.0)], version=2)
    pq.write_table(old, rewards_file(store, "2222"))
    table = rows(store, "SELECT key, components FROM rewards ORDER BY key, reward")
    assert [row["key"] for row in table] == ["2222", "2222", "3333", "4444", "5555"]
    assert {row["components"] for row in table} == {None}
    link(store, "both", reward=("reward", "2222"), combine=("combine", "4444"))  # only one version of each stage
    assert [row["components"] for row in rows(store, "SELECT components FROM rewards", "both")] == [None] * 3


def test_the_store_in_python(store: Store):
    """The same rows as Arrow, pandas and batches; the catalog need not be kept for its result."""
    result = open_catalog(store).sql("SELECT key, reward AS r, reward AS r FROM rewards ORDER BY reward")
    assert result.columns == ["key", "r", "r_1"]
    expected = dict(key=["2222", "2222", "3333"], r=[0.5, 1.5, 9.0], r_1=[0.5, 1.5, 9.0])
    assert result.arrow().to_pydict() == expected
    assert result.pandas().to_dict("list") == expected
    assert (result.count(), result.head(1).num_rows) == (3, 1)
    assert pa.Table.from_batches(result.batches()).to_pydict() == expected
    assert open_catalog(store, "two").sql("SELECT * FROM rewards").count() == 0


def test_stages_load_without_duckdb():
    """A training machine may have none."""
    code = "import sys, stages.all; print('duckdb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_a_store_at_a_url_is_read_and_confined_as_a_folder_is(store: Store):
    """Through its own filesystem, of which DuckDB sees only the store."""
    bucket = UPath("memory://bucket/store")
    for file in local(store.root).rglob("*.parquet"):
        bucket.fs.pipe_file(f"{bucket.path}/{file.relative_to(local(store.root)).as_posix()}", file.read_bytes())
    bucket.fs.pipe_file("/bucket/secret.parquet", rewards_file(store, "2222").read_bytes())
    here = open_catalog(store)
    remote = Catalog(bucket, here.runs, here.manifests, here.evolved)
    for statement in (
        "SELECT * FROM rewards ORDER BY reward",
        queries.text("rejects"),
        "SELECT * FROM prompts WHERE key = '1111'",
    ):
        assert query(remote, statement).equals(query(here, statement))
    for outside in (
        "memory:///bucket/secret.parquet",
        "memory:///bucket/store/../secret.parquet",
        str(rewards_file(store, "2222")),
    ):
        with pytest.raises(WinnowError, match="Only files of tables can be read"):
            query(remote, f"SELECT * FROM read_parquet('{outside}')")
    bucket.fs.rm("/bucket", recursive=True)


def test_an_exported_file_needs_no_store(store: Store, tmp_path: Path):
    """Its tables have the rows of the views, the shipped queries run on it, and every column has its meaning."""
    file, catalog = tmp_path / "out.duckdb", open_catalog(store)
    catalog.export(file)
    statements = [f"SELECT * FROM {name} ORDER BY ALL" for name in VIEWS]
    statements += [queries.text(name) for name in queries.names()]
    expected = [query(catalog, statement).to_pylist() for statement in statements]
    local(store.root).rename(tmp_path / "gone")
    with duckdb.connect(str(file), read_only=True) as copy:
        assert [copy.sql(statement).to_arrow_table().to_pylist() for statement in statements] == expected
        comment = "SELECT comment FROM duckdb_columns() WHERE table_name = 'rewards' AND column_name = 'logit_ab'"
        assert copy.sql(comment).fetchall() == [(REWARDS.field("logit_ab").metadata[b"meaning"].decode(),)]
        missing = "SELECT table_name, column_name FROM duckdb_columns() WHERE NOT internal AND comment IS NULL"
        assert copy.sql(missing).fetchall() == []
        assert copy.sql("SELECT count(*) FROM duckdb_views() WHERE NOT internal").fetchall() == [(0,)]
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.duckdb"]


def test_an_export_of_one_run_overwrites_nothing(store: Store, tmp_path: Path):
    catalog = open_catalog(store, "two")
    catalog.export(tmp_path / "two.duckdb")
    with duckdb.connect(str(tmp_path / "two.duckdb")) as copy:
        assert copy.sql("SELECT count(*) FROM rewards").fetchall() == [(0,)]
        assert copy.sql("SELECT DISTINCT run FROM runs").fetchall() == [("two",)]
    (tmp_path / "there.duckdb").write_text("mine")
    with pytest.raises(WinnowError, match="exists already; give another name"):
        catalog.export(tmp_path / "there.duckdb")
    assert (tmp_path / "there.duckdb").read_text() == "mine"
    with pytest.raises(WinnowError, match="there is no folder"):
        catalog.export(tmp_path / "no" / "out.duckdb")


# NaN and infinity

NUMBERS = ([1.5, math.nan, 2.0, None], [1.5, math.nan, -math.inf, math.inf, 2.0, None], [math.nan] * 4, [1.5, 2.0])
NUMBER_QUERIES = [
    "SELECT count(*) FROM candidates WHERE isnan(logp)",
    "SELECT count(*) FROM candidates WHERE NOT isnan(logp)",
    "SELECT count(*) FROM candidates WHERE isinf(logp)",
    "SELECT count(*) FROM candidates WHERE isfinite(logp)",
    "SELECT count(*) FROM candidates WHERE logp = 'nan'::DOUBLE",
    "SELECT count(*) FROM candidates WHERE logp > 2",
    "SELECT count(*) FROM candidates WHERE logp <= 2",
    "SELECT count(*) FROM candidates WHERE logp <> 2",
    "SELECT count(*) FROM candidates WHERE logp IS NULL",
    "SELECT count(nullif(logp, 'nan'::DOUBLE)) FROM candidates",
    "SELECT min(logp)::VARCHAR || max(logp)::VARCHAR FROM candidates",
    "SELECT list(logp::VARCHAR ORDER BY logp DESC NULLS LAST) FROM candidates",
    "SELECT list(logp::VARCHAR ORDER BY logp NULLS FIRST) FROM candidates",
    "SELECT count(*) FROM rewards WHERE isnan(components['a'])",
    "SELECT max(components['a'])::VARCHAR FROM rewards",
    "SELECT count(*) FROM examples WHERE isnan(responses[1].ref_logp)",
    "SELECT count(*) FROM examples WHERE responses[1].ref_logp > 2",
    "SELECT count(*) FROM features WHERE list_contains(features, 'nan'::FLOAT)",
]


def number_tables(values: list[float | None]) -> list[pa.Table]:
    """Return tables with these numbers in a column, a map, a struct in a list, and a list."""
    response = {"candidate_id": "c", "token_ids": [1], "weight": 1.0, "desirable": None}
    return [
        table(CANDIDATES, *({"logp": value} for value in values)),
        table(REWARDS, *({"components": None if value is None else [("a", value)]} for value in values)),
        table(EXAMPLES, *({"responses": [response | {"ref_logp": value}]} for value in values)),
        table(FEATURES, *({"features": [value]} for value in values)),
    ]


@pytest.mark.parametrize("values", NUMBERS, ids=str)
def test_sql_on_nan_and_infinity_is_what_it_is_without_parquet(values: list[float | None], tmp_path: Path):
    """The same statements on DuckDB's own tables are the truth: NaN is one number, and larger than infinity."""
    store = Store(tmp_path / "store")
    put(store, "numbers", "5555", [*number_tables(values), rejects()])
    link(store, "one", numbers=("numbers", "5555"))
    wrong, catalog = {}, open_catalog(store)
    with duckdb.connect() as memory:
        for name, rows in zip(("candidates", "rewards", "examples", "features"), number_tables(values), strict=True):
            memory.register("rows", rows)
            memory.execute(f"CREATE TABLE {name} AS FROM rows")
        for statement in NUMBER_QUERIES:
            (ours,) = query(catalog, statement).to_pylist()
            ((right,),) = memory.sql(statement).fetchall()
            if [*ours.values()] != [right]:
                wrong[statement] = (ours, right)
    assert wrong == {}


@pytest.mark.parametrize("name", TABLES)
def test_no_file_has_statistics_of_a_float_or_an_optional_text(name: str, tmp_path: Path):
    """Nested floats included: other programs that read the files trust statistics. All other columns have them."""
    store = Store(tmp_path)
    put(store, "any", "6666", [rejects(), table(TABLES[name], {})])
    (file,) = local(store.root).rglob(f"{name}-*.parquet")
    group = pq.read_metadata(file).row_group(0)
    columns = [group.column(n) for n in range(group.num_columns)]
    lacking = {column.path_in_schema for column in columns if column.statistics is None}
    floats = {column.path_in_schema for column in columns if column.physical_type in ("FLOAT", "DOUBLE")}
    assert lacking == floats | {field.name for field in TABLES[name] if field.nullable and field.type == pa.string()}


@pytest.mark.parametrize("where", ["%s IS NULL", "coalesce(%s, NULL) IS NULL", "%s IS DISTINCT FROM 'both'"])
def test_nulls_beside_one_text_are_counted_in_files_with_statistics(where, winnow, tmp_path: Path, monkeypatch):
    """As stores of before have them: of 100 nulls among 200 rows, DuckDB 2.0.0 counted 200."""
    monkeypatch.setattr("pipeline.store.store.columns_with_statistics", lambda schema: True)
    store = Store(tmp_path / "store")
    put(store, "judge", "7777", [table(JUDGEMENTS, *[{}, {"unread": "both"}] * 100), rejects()])
    link(store, "one", judge=("judge", "7777"))
    statement = f"SELECT count(*) AS n FROM judgements WHERE {where % 'unread'}"
    assert query(open_catalog(store), statement).to_pylist() == [{"n": 100}]
    code, text = winnow("sql", statement, "--store", store.root, "--format", "json")
    assert (code, json.loads(text)) == (0, {"n": 100})


def test_nan_in_a_parquet_file_that_sql_writes_is_found_by_any_duckdb(winnow, tmp_path: Path):
    store, out = Store(tmp_path / "store"), tmp_path / "out.parquet"
    put(store, "numbers", "5555", [*number_tables([1.5, math.nan, None]), rejects()])
    link(store, "one", numbers=("numbers", "5555"))
    assert winnow("sql", "SELECT logp FROM candidates", "--store", store.root, "--out", out)[0] == 0
    assert duckdb.sql(f"SELECT count(*) FROM '{out}' WHERE isnan(logp)").fetchall() == [(1,)]


def test_a_stage_on_another_disk_is_read_through_its_link(tmp_path: Path):
    """By SQL, verify and gc as by a run; of the other disk, nothing but the files that manifests list."""
    store = Store(tmp_path / "store")
    put(store, "reward", "0" * 16, [rewards(1.0, 2.0)])
    link(store, "a", rewards=("reward", "0" * 16))
    big = tmp_path / "big"
    local(store.root / "reward").rename(big)
    local(store.root / "reward").symlink_to(big)
    (big / "secret.txt").write_text("secret")
    catalog = open_catalog(store)
    assert query(catalog, "SELECT sum(reward) AS total FROM rewards").to_pylist() == [{"total": 3.0}]
    catalog.export(tmp_path / "all.duckdb")
    with pytest.raises(WinnowError, match="sql: "):
        query(catalog, f"SELECT * FROM read_text('{store.root}/reward/secret.txt')")
    assert [step.key for step in Inventory(store).steps.values()] == ["0" * 16]


def test_listing_and_asking_writes_nothing_to_a_store(winnow, tmp_path: Path):
    """So that it may be read-only: no lock, no scratch file; the page of `report` is written beside it then."""
    store = Store(tmp_path / "store")
    put(store, "reward", "0" * 16, [rewards(1.0, 2.0)])
    link(store, "a", rewards=("reward", "0" * 16))
    (local(store.root) / "locks").mkdir()
    (local(store.root) / "locks" / ("0" * 16)).touch()
    page = tmp_path / "elsewhere" / "page.html"

    def times() -> dict[Path, int]:  # those of folders change with every name in them, also one that is deleted again
        return {path: path.stat().st_mtime_ns for path in [local(store.root), *local(store.root).rglob("*")]}

    before = times()
    for words in (["ls"], ["ls", "a"], ["status"], ["sql", "FROM runs"], ["gc"], ["verify"], ["report", "--out", page]):
        assert winnow(*words)[0] == 0, words
    assert times() == before


def test_the_page_of_a_read_only_store_is_written_here(winnow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(tmp_path / "store")
    put(store, "reward", "0" * 16, [rewards(1.0, 2.0)])
    link(store, "a", rewards=("reward", "0" * 16))

    def refuse(path: Path, content: bytes, durable: bool = True) -> None:
        if path.is_relative_to(local(store.root)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        replace(path, content, durable)

    monkeypatch.setattr(jobs.report, "replace", refuse)
    code, output = winnow("report")
    assert (code, "wrote report.html" in output, (tmp_path / "report.html").exists()) == (0, True, True)


def test_a_view_without_rows_has_the_types_that_duckdb_reads_of_arrow():
    with duckdb.connect() as connection:
        for name, schema in VIEWS.items():
            expected = connection.from_arrow(schema.empty_table())
            empty = connection.sql(f"SELECT {null_columns(name)} WHERE false")
            assert (empty.columns, empty.types) == (expected.columns, expected.types)

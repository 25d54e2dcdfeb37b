"""SQL over the store: a view for every table, whatever is in it; and nothing that a statement says can do harm."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

import pipeline
from jobs import queries
from pipeline.sql.catalog import Catalog, open_catalog, query
from pipeline.sql.views import RUNS, STEPS, view
from pipeline.store.store import Store
from schemas import TABLES, WinnowError
from schemas.tables import PROMPTS, REWARDS
from tests.catalogs import link, put, rejects, rewards
from tests.runs import local

NASTY = ["it's", 'a "quoted" name', "'; DROP TABLE runs; --", "semi;colon", "émoji 🙂", "%s {x} $1 ?", "back\\slash"]


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


def test_columns_of_one_name_are_told_apart(store: Store):
    """SELECT * over a join has the joined column twice; no value of either may be lost."""
    answer = query(open_catalog(store), "SELECT 1 AS a, 2 AS a_2, 3 AS a, 4 AS b, 5 AS a")
    assert answer.to_pylist() == [{"a": 1, "a_2": 2, "a_3": 3, "b": 4, "a_4": 5}]


def part(store: Store, key: str) -> Path:
    return next((local(store.root) / "reward" / key).glob("rewards-*.parquet"))


def test_only_what_a_statement_names_is_opened(store: Store):
    """A damaged table does not stand in the way of a question about others; one about it says what to do."""
    part(store, "2222").write_bytes(b"no parquet")
    catalog = open_catalog(store)
    assert query(catalog, "SELECT count(*) AS n FROM prompts").to_pylist() == [dict(n=len(NASTY))]
    assert query(catalog, "DESCRIBE rejects").num_rows == 7
    with pytest.raises(WinnowError, match="sql: "):
        query(catalog, "SELECT * FROM rewards")
    part(store, "2222").unlink()
    with pytest.raises(WinnowError, match="put the file back, or make its step"):
        query(catalog, "SELECT * FROM rewards")


def test_a_key_opens_no_other_steps_files(store: Store):
    """A file's key is known by its name, before it is opened."""
    part(store, "3333").write_bytes(b"no parquet")
    assert rows(store, "SELECT max(reward) AS best FROM rewards WHERE key = '2222'") == [dict(best=1.5)]
    assert rows(store, "SELECT max(reward) AS best FROM rewards WHERE stage = 'nothing'") == [dict(best=None)]
    with pytest.raises(WinnowError):
        rows(store, "SELECT max(reward) AS best FROM rewards")


def test_stage_and_key_of_a_row_are_the_same_from_one_step_or_among_several(store: Store):
    """One step's are constants to DuckDB, which drops them from groups and joins; those of several are by file."""
    ask = "SELECT stage, key, reward FROM rewards WHERE key = '{}' ORDER BY reward"
    assert rows(store, ask.format("2222"), "one") == rows(store, ask.format("2222"))
    assert [row["key"] for row in rows(store, ask.format("2222"))] == ["2222"] * 2
    assert rows(store, ask.format("3333"), "one") == []
    one, several = (view("rewards", open_catalog(store, run).manifests, False) for run in ("one", None))
    assert "'2222' AS key" in one
    assert "parse_filename" in several


def test_versions_of_what_made_another_table_open_no_other_steps_files(store: Store):
    put(store, "prompts", "5555", [rejects()], version=2)
    part(store, "3333").write_bytes(b"no parquet")
    assert rows(store, "SELECT max(reward) AS best FROM rewards WHERE key = '2222'") == [dict(best=1.5)]


def test_a_column_that_one_of_two_stages_did_not_have_is_null(store: Store):
    """A table's columns changed between two stages that make it, of which neither has a second version."""
    put(store, "prompts", "5555", [rejects()], version=2)
    put(store, "combine", "4444", [rewards(7.0)])
    for key in ("2222", "3333"):
        pq.write_table(pq.read_table(part(store, key)).drop_columns(["components"]), part(store, key))
    assert [row["components"] for row in rows(store, "SELECT components FROM rewards")] == [None] * 4
    link(store, "both", reward=("reward", "2222"), combine=("combine", "4444"))  # has no part of `prompts`
    assert [row["components"] for row in rows(store, "SELECT components FROM rewards", "both")] == [None] * 3


def test_a_column_that_an_older_version_of_a_stage_did_not_have_is_null(store: Store):
    older = pq.read_table(part(store, "2222")).drop_columns(["components"])
    put(store, "reward", "4444", [rewards(7.0)], version=2)
    pq.write_table(older, part(store, "2222"))
    found = rows(store, "SELECT key, components FROM rewards ORDER BY key, reward")
    assert [row["key"] for row in found] == ["2222", "2222", "3333", "4444"]
    assert {row["components"] for row in found} == {None}


def test_a_run_of_an_open_catalog_is_that_run(store: Store):
    """Opened once, asked for every run."""
    catalog = open_catalog(store)
    for name in (None, "one", "two", ["one", "two"]):
        ask = "SELECT (SELECT count(*) FROM rewards) AS r, (SELECT count(*) FROM runs) AS n, count(*) AS s FROM steps"
        assert query(catalog.of(name), ask).equals(query(open_catalog(store, name), ask))


def test_the_store_in_python(store: Store):
    """The same rows as Arrow and as pandas; a catalog need not be kept for its answer."""
    answer = pipeline.open(str(store.root)).sql("SELECT key, reward AS r, reward AS r FROM rewards ORDER BY reward")
    assert answer.columns == ["key", "r", "r_2"]
    expected = dict(key=["2222", "2222", "3333"], r=[0.5, 1.5, 9.0], r_2=[0.5, 1.5, 9.0])
    assert answer.arrow().to_pydict() == expected
    assert answer.pandas().to_dict("list") == expected
    assert (answer.count(), answer.head(1).num_rows) == (3, 1)
    assert pa.Table.from_batches(answer.batches()).to_pydict() == expected
    assert pipeline.open(store.root, run="two").sql("SELECT * FROM rewards").count() == 0


def test_polars_is_used_where_it_is(store: Store):
    answer = pipeline.open(store.root).sql("SELECT 1 AS a")
    try:
        polars = import_module("polars")
    except ImportError:
        with pytest.raises(WinnowError, match=r"polars is not installed here; pip install polars, or take \.arrow"):
            answer.polars()
    else:
        assert answer.polars().equals(polars.DataFrame({"a": [1]}))


def test_a_store_where_nothing_was_made_is_refused(tmp_path: Path):
    with pytest.raises(WinnowError, match="no runs in this store"):
        pipeline.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_the_package_needs_no_duckdb():
    """A bare machine has none: it is imported when a store is opened."""
    code = "import sys, pipeline; print('duckdb' in sys.modules, callable(pipeline.open))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_a_store_at_a_url_is_asked_and_confined_as_a_folder_is(store: Store):
    """Through its own filesystem, of which DuckDB sees the store alone."""
    there = UPath("memory://bucket/store")
    for file in (file for file in local(store.root).rglob("*.parquet") if file.is_file()):
        there.fs.pipe_file(f"{there.path}/{file.relative_to(local(store.root)).as_posix()}", file.read_bytes())
    there.fs.pipe_file("/bucket/secret.parquet", part(store, "2222").read_bytes())
    here = open_catalog(store)
    remote = Catalog(there, here.runs, here.manifests, here.evolved)
    for ask in (
        "SELECT * FROM rewards ORDER BY reward",
        queries.text("rejects"),
        "SELECT * FROM prompts WHERE key = '1111'",
    ):
        assert query(remote, ask).equals(query(here, ask))
    for outside in ("memory:///bucket/secret.parquet", "memory:///bucket/store/../secret.parquet"):
        with pytest.raises(WinnowError, match="Only what lies in the store is read"):
            query(remote, f"SELECT * FROM read_parquet('{outside}')")
    with pytest.raises(WinnowError, match="Only what lies in the store is read"):
        query(remote, f"SELECT * FROM read_parquet('{part(store, '2222')}')")
    there.fs.rm("/bucket", recursive=True)


def test_an_exported_file_needs_no_store(store: Store, tmp_path: Path):
    """Its tables have the rows of the views, the shipped queries run on it, and its columns say what they mean."""
    file = tmp_path / "out.duckdb"
    catalog = open_catalog(store)
    catalog.export(file)
    asks = [f"SELECT * FROM {name} ORDER BY ALL" for name in (*TABLES, "runs", "steps")]
    asks += [queries.text(name) for name in queries.names()]
    expected = [query(catalog, ask) for ask in asks]
    local(store.root).rename(tmp_path / "gone")
    with duckdb.connect(str(file), read_only=True) as copy:
        for ask, answer in zip(asks, expected, strict=True):
            assert copy.sql(ask).to_arrow_table().to_pylist() == answer.to_pylist()
        told = "SELECT comment FROM duckdb_columns() WHERE table_name = 'rewards' AND column_name = 'logit_ab'"
        assert copy.sql(told).fetchall() == [(REWARDS.field("logit_ab").metadata[b"meaning"].decode(),)]
        bare = "SELECT table_name, column_name FROM duckdb_columns() WHERE NOT internal AND comment IS NULL"
        assert copy.sql(bare).fetchall() == []
        assert copy.sql("SELECT count(*) FROM duckdb_views() WHERE NOT internal").fetchall() == [(0,)]
    assert [each.name for each in tmp_path.iterdir() if "out" in each.name] == ["out.duckdb"]


def test_an_export_has_one_run_where_one_is_asked_for(store: Store, tmp_path: Path):
    open_catalog(store, "two").export(tmp_path / "two.duckdb")
    with duckdb.connect(str(tmp_path / "two.duckdb")) as copy:
        assert copy.sql("SELECT count(*) FROM rewards").fetchall() == [(0,)]
        assert copy.sql("SELECT DISTINCT run FROM runs").fetchall() == [("two",)]


def test_an_export_writes_over_nothing(store: Store, tmp_path: Path):
    (tmp_path / "there.duckdb").write_text("mine")
    with pytest.raises(WinnowError, match="is there already; delete it, or give another name"):
        open_catalog(store).export(tmp_path / "there.duckdb")
    assert (tmp_path / "there.duckdb").read_text() == "mine"
    with pytest.raises(WinnowError, match="there is no folder"):
        open_catalog(store).export(tmp_path / "no" / "out.duckdb")

"""The report and the queries behind it, on runs that differ and on runs that do not."""

import re
import shutil

import duckdb
import pyarrow as pa
import pytest

from jobs import queries
from jobs.report import _plot_histogram, write_report
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.sql.catalog import open_catalog, query
from pipeline.sql.views import RUNS
from pipeline.store.store import Store
from schemas.tables import METRICS
from tests.runs import Silent, plan_of

BOTH = "Preferences and demonstrations in one run"


@pytest.fixture(scope="module")
def mixed(data_dir, finished, tmp_path_factory):
    """A store with MAXRIGHT beside a plain run, two steered policies, and one with steering 0."""
    root = tmp_path_factory.mktemp("mixed") / "store"
    shutil.copytree(finished, root)
    for name, recipe, *sets in (
        ("maxright", "maxright"),
        ("cvx_dpo", "cvx_dpo"),
        ("logistic_head", "logistic_head"),
        ("unsteered", "cvx_dpo", "eval_sample.steer=0.0"),
    ):
        plan = plan_of(data_dir, *sets, recipe=recipe)
        plan.name = name
        run(plan, Store(root), LocalExecutor(), Silent())
    return Store(root)


def test_the_leaderboard_has_kl_of_steered_policies_too(mixed):
    """From the SFT policy, of the distribution that drew the responses; 0 where the head has no effect."""
    board = query(open_catalog(mixed), queries.text("leaderboard")).to_pylist()
    kl = {row["run"]: row["kl_nats"] for row in board}
    assert min(float(kl["cvx_dpo"]), float(kl["logistic_head"])) >= 0
    sql = "SELECT max(abs(kl)) AS kl FROM outcomes"
    largest = {run: query(open_catalog(mixed, run), sql)["kl"][0].as_py() for run in ("unsteered", "cvx_dpo")}
    assert largest["unsteered"] < 1e-4
    assert largest["cvx_dpo"] > 1e-2


def test_the_report_plots_both_losses_of_runs_that_have_two(mixed, finished, tmp_path):
    """MAXRIGHT and the two runs that measure its optima, and distances to the ideal; otherwise no such section."""
    write_report(mixed, tmp_path / "mixed.html")
    page = (tmp_path / "mixed.html").read_text()
    plot, table = page.split(BOTH)[1].split("<h2>")[0].split("</svg>")
    for policy in ("maxright", "only_preferences", "only_demonstrations"):
        assert re.search(rf"{policy} \(\d\.\d+\)", plot)
        assert f"<td>{policy}</td>" in table
    assert "ideal" in plot
    write_report(Store(finished), tmp_path / "plain.html")
    assert BOTH not in (tmp_path / "plain.html").read_text()


def catalog_of(links, losses):
    """`runs` of (run, step, round, key), and `metrics` of {key: (preference loss, imitation loss)}."""
    runs = [dict(run=run, step=step, round=round, stage="optimize", key=key) for run, step, round, key in links]
    names = ("heldout/loss", "heldout/imitation/loss")
    rows = [
        dict(step=1, metric=metric, value=value, stage="optimize", key=key)
        for key, pair in losses.items()
        for metric, value in zip(names, pair, strict=True)
        if value is not None
    ]
    tables = {
        "runs": pa.Table.from_pylist(runs, schema=RUNS),
        "metrics": pa.Table.from_pylist(
            rows, schema=pa.schema([*METRICS, pa.field("stage", pa.string()), pa.field("key", pa.string())])
        ),
    }
    connection = duckdb.connect()
    for name, table in tables.items():
        connection.register(name, table)
    return connection


def test_two_policies_of_one_name_are_two_rows():
    """Equal steps of two runs are one policy under one name; other keys of that name show their run as well."""
    links = [
        ("a", "optimize", None, "k1"),
        ("a", "only_preferences", None, "k2"),
        ("b", "optimize", 2, "k3"),
        ("b", "only_preferences", 2, "k4"),
        ("b", "only_demonstrations", None, "k5"),
        ("c", "only_demonstrations", None, "k5"),
        ("c", "optimize", None, "k6"),
    ]
    losses = {f"k{n}": (float(n), 10.0 + n) for n in range(1, 6)} | {"k6": (6.0, None)}
    rows = catalog_of(links, losses).sql(queries.text("two_losses")).to_arrow_table().to_pylist()
    assert [(row["policy"], row["preference_loss"], row["imitation_loss"]) for row in rows] == [
        ("a", 1.0, 11.0),
        ("b@2", 3.0, 13.0),
        ("only_demonstrations", 5.0, 15.0),
        ("only_preferences (a)", 2.0, 12.0),
        ("only_preferences (b@2)", 4.0, 14.0),
    ]


def test_rewards_are_plotted_alone_where_none_was_selected():
    bins = [{"what": "all candidates", "low": low, "high": low + 0.5, "n": 1} for low in (0.0, 0.5)]
    plot = _plot_histogram(bins)
    assert "all candidates (2)" in plot
    assert "kept" not in plot


def test_the_page_shows_markup_and_control_sequences_as_text(tmp_path):
    """Of a run's name, as of a response."""
    Store(tmp_path / "store").link_run("<script>alert(1)\x1b[31m", [])
    write_report(Store(tmp_path / "store"), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert r"&lt;script&gt;alert(1)\x1b[31m" in page

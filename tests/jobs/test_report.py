"""The report and the queries behind it, on runs that differ and on runs that do not."""

import json
import math
import re
import shutil
import subprocess
from datetime import UTC, datetime
from html import unescape

import duckdb
import pyarrow as pa
import pytest

from jobs import queries
from jobs.recipes import plan_named
from jobs.report import _plot_histogram, _plot_two_losses, write_report
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.sql.catalog import open_catalog, query
from pipeline.sql.views import RUNS, STEPS
from pipeline.store.store import Store, write_json
from schemas.tables import METRICS, POLICIES
from tests.catalogs import table as table_of
from tests.runs import Silent, plan_of

SHORT = "eval_sample.max_tokens=8"  # a steered token is dear
BOTH = "Preferences and demonstrations in one run"


@pytest.fixture(scope="module")
def mixed(data_dir, finished, tmp_path_factory):
    """A store with MAXRIGHT beside a plain run, two steered policies, and one with steering 0."""
    root = tmp_path_factory.mktemp("mixed") / "store"
    shutil.copytree(finished, root)
    for name, recipe, *sets in (
        ("maxright", "maxright", "optimize.epochs=2"),
        ("cvx_dpo", "cvx_dpo", SHORT),
        ("logistic_head", "logistic_head", SHORT),
        ("unsteered", "cvx_dpo", SHORT, "eval_sample.steer=0.0"),
    ):
        plan = plan_of(data_dir, *sets, recipe=recipe)
        plan.name = name
        run(plan, Store(root), LocalExecutor(), Silent())
    return Store(root)


@pytest.fixture(scope="module")
def mixed_page(mixed, tmp_path_factory):
    """The report of that store."""
    file = tmp_path_factory.mktemp("mixed_page") / "page.html"
    write_report(mixed, file)
    return file.read_text()


@pytest.fixture(scope="module")
def plain_page(finished, tmp_path_factory):
    """The report of a plain run of RSO."""
    file = tmp_path_factory.mktemp("plain_page") / "page.html"
    write_report(Store(finished), file)
    return file.read_text()


def test_the_leaderboard_has_kl_of_steered_policies_too(mixed):
    """From the SFT policy, of the distribution that drew the responses; 0 where the head has no effect."""
    board = query(open_catalog(mixed), queries.text("leaderboard")).to_pylist()
    kl = {row["run"]: row["kl_nats"] for row in board}
    assert min(float(kl["cvx_dpo"]), float(kl["logistic_head"])) >= 0
    sql = "SELECT max(abs(kl)) AS kl FROM outcomes"
    largest = {run: query(open_catalog(mixed, run), sql)["kl"][0].as_py() for run in ("unsteered", "cvx_dpo")}
    assert largest["unsteered"] < 1e-4
    assert largest["cvx_dpo"] > 1e-2


def test_the_report_plots_both_losses_of_runs_that_have_two(mixed_page, plain_page):
    """MAXRIGHT and the two runs that measure its optima, and distances to the ideal; otherwise no such section."""
    plot, table = mixed_page.split(f"{BOTH}</h2>")[1].split("<h2")[0].split("</svg>")
    for policy in ("maxright", "only_preferences", "only_demonstrations"):
        assert re.search(rf"{policy} \(\d\.\d+\)", plot)
        assert f"<td>{policy}</td>" in table
    assert "ideal" in plot
    assert BOTH not in plain_page


def catalog_of(links, losses, methods=None, **steps):
    """`runs` of (run, step, round, key), and `metrics` of {key: (preference loss, imitation loss)}.

    methods: that of a key, if it has another name. steps: options, inputs and seconds of a key.
    """
    methods = methods or {}
    runs = [
        dict(run=run, step=step, round=round, stage="optimize", key=key, method=methods.get(key, key))
        for run, step, round, key in links
    ]
    columns = {key: dict(options="{}", inputs="{}", seconds=1.0) | steps.get(key, {}) for key in losses}
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
        "steps": table_of(STEPS, *(dict(stage="optimize", key=key) | row for key, row in columns.items())),
        "policies": pa.schema([*POLICIES, pa.field("stage", pa.string()), pa.field("key", pa.string())]).empty_table(),
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


def step_of(mix, weight, seconds=10.0, seed=0, init="sft", **inputs):
    """The options and inputs of a training, as `steps` has them."""
    options = {"learning_rate": 1e-3, "mix": {"name": mix, "weight": weight, "version": 1}, "seed": seed}
    inputs = {"examples": "e", "init": init} | inputs
    return dict(options=json.dumps(options), inputs=json.dumps(inputs), seconds=seconds)


def two_losses(links, losses, methods=None, **steps):
    """The rows of the query, by policy."""
    found = catalog_of(links, losses, methods, **steps).sql(queries.text("two_losses")).to_arrow_table().to_pylist()
    return {row["policy"]: row for row in found}


ALONE = dict(p=step_of("joint", 1.0), d=step_of("joint", 0.0))


@pytest.mark.parametrize("unit", [1.0, 0.001])
def test_the_distance_depends_on_neither_the_unit_nor_what_else_is_in_the_store(unit):
    """Halfway between the two objectives alone in both losses: sqrt(2) / 2; a policy of another start is no ideal."""
    names = ["p", "d", "m", "lone"]
    links = [("run", name, None, name) for name in names]
    losses = {"p": (0.2 * unit, 3.0), "d": (0.7 * unit, 1.0), "m": (0.45 * unit, 2.0), "lone": (0.0, 0.0)}
    steps = ALONE | dict(m=step_of("alright", 0.5), lone=step_of("alright", 0.5, init="base"))
    rows = two_losses(links, losses, **steps)
    assert rows["m"]["distance"] == pytest.approx(math.sqrt(0.5))
    assert (rows["p"]["distance"], rows["d"]["distance"], rows["lone"]["distance"]) == (1.0, 1.0, None)


def test_seeds_are_one_row_with_the_standard_error_of_their_mean():
    """Each seed has its own objectives alone; 0.4 and 0.6 have the mean 0.5 and the standard error 0.1."""
    links = [("run", f"{name}{n}", None, f"{name}{n}") for n in (0, 1) for name in "pdm"]
    losses: dict = {}
    steps: dict = {}
    for n, value in enumerate((0.4, 0.6)):
        losses |= {f"p{n}": (0.0, 1.0), f"d{n}": (1.0, 0.0), f"m{n}": (value, 0.0)}
        steps |= {f"p{n}": step_of("joint", 1.0, seed=n), f"d{n}": step_of("joint", 0.0, seed=n)}
        steps[f"m{n}"] = step_of("alright", 0.25, seed=n)
    row = two_losses(links, losses, {"m0": "m", "m1": "m"}, **steps)["m0"]
    assert (row["seeds"], row["mix"], row["weight"]) == (2, "alright", 0.25)
    assert (row["preference_loss"], row["preference_loss_se"]) == (pytest.approx(0.5), pytest.approx(0.1))
    assert (row["distance"], row["distance_se"]) == (pytest.approx(0.5), pytest.approx(0.1))


def test_what_knowing_the_two_optima_costs_is_in_the_table():
    """Two trainings of 10 s before one of 10 s: three times; and their distances are of one setting."""
    links = [("run", name, None, name) for name in ("p", "d", "m", "a")]
    losses = {"p": (0.0, 1.0), "d": (1.0, 0.0), "m": (0.5, 0.5), "a": (0.5, 0.5)}
    m = step_of("maxright", 0.5, preference_optimum="p", imitation_optimum="d")
    rows = two_losses(links, losses, **ALONE, m=m, a=step_of("alright", 0.5))
    assert (rows["m"]["seconds"], rows["m"]["optima_seconds"], rows["m"]["cost"]) == (10.0, 20.0, 3.0)
    assert (rows["a"]["optima_seconds"], rows["a"]["cost"]) == (0.0, 1.0)
    assert rows["m"]["distance"] == rows["a"]["distance"] == pytest.approx(math.sqrt(0.5))


def test_a_front_is_a_line_over_its_weights():
    """Named once in the legend, each point by its weight; the objectives alone are points of their own."""
    weights = (0.25, 0.5, 0.75)
    keys = dict(zip("abc", weights, strict=True))
    links = [("run", name, None, name) for name in "pdabc"]
    losses = {"p": (0.0, 1.0), "d": (1.0, 0.0)} | {key: (1 - weight, weight) for key, weight in keys.items()}
    steps = {key: step_of("alright", weight) for key, weight in keys.items()}
    plot = _plot_two_losses([*two_losses(links, losses, **ALONE, **steps).values()])
    assert plot.count("alright") == 1
    assert all(f">{weight:g} (" in plot for weight in weights)
    assert "p (1.000)" in plot


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


# The page as readers see it

DOLLARS = "a$$b$x_$"
LONG = "Donaudampfschifffahrtsgesellschaft" * 6  # a word that no line has room for
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Runs in a frame's page: what is wider than the window and in no box that scrolls, and text that is hard to see.
PROBE = """
const frame = document.getElementById(name), page = frame.contentDocument, view = frame.contentWindow;
const wide = [], faint = [];
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const linear = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = color => rgb(color).slice(0, 3).map(c => linear(c / 255))
  .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
for (const node of page.body.querySelectorAll("*")) {
  const box = node.getBoundingClientRect();
  if (box.right > view.innerWidth + 1 && !node.closest(".scroll") && box.width) wide.push(node.tagName);
  const text = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
  if (!text || !box.width) continue;
  let back = node;
  while (back !== page.body && rgb(view.getComputedStyle(back).backgroundColor)[3] === 0) back = back.parentElement;
  const style = view.getComputedStyle(node), color = node.closest("svg") ? style.fill : style.color;
  const [a, b] = [color, view.getComputedStyle(back).backgroundColor].map(light).sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5) faint.push(node.tagName + " " + node.textContent.slice(0, 20));
}
const numbers = [...page.querySelectorAll("td.number")].map(cell => view.getComputedStyle(cell).textAlign);
return {
  width: view.innerWidth, scroll: page.documentElement.scrollWidth, wide, faint, numbers: [...new Set(numbers)],
  back: view.getComputedStyle(page.body).backgroundColor, cells: numbers.length,
};
"""
VIEWS = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]


def seen(page):
    """Return what Chromium measures of a page in a frame of each width, whose reader prefers light or dark."""
    frames = "".join(
        f'<iframe id="{width} {scheme}" src="{page.name}" style="width: {width}px; height: 900px; '
        f'color-scheme: {scheme}"></iframe>'
        for width, scheme in VIEWS
    )
    script = f"""
const measured = name => {{ {PROBE} }};
onload = () => {{
  const results = [...document.querySelectorAll("iframe")].map(frame => measured(frame.id));
  document.body.innerHTML = "<pre id=result></pre>";
  document.getElementById("result").textContent = JSON.stringify(results);
}}"""
    frame = page.with_name("frames.html")
    frame.write_text(f"<body>{frames}<script>{script}</script></body>")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--window-size=1400,1000"]
    words += [f"--user-data-dir={page.parent / 'browser'}", "--virtual-time-budget=10000", "--dump-dom", frame.as_uri()]
    done = subprocess.run([str(CHROMIUM), *words], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(unescape(done.stdout.split('<pre id="result">')[1].split("</pre>")[0]))


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    """The report of a run beside one with dollars, and one whose name, tag and responses have no place for a break."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(finished, folder / "store")
    store = Store(folder / "store")
    for name in (LONG[:120], DOLLARS):
        write_json(store.root / "runs" / f"{name}.json", store.run("run"))
    store.tag_run("run", {"team": LONG})
    write_report(store, folder / "page.html")
    text = (folder / "page.html").read_text()
    (folder / "page.html").write_text(text.replace('<div class="text">', f'<div class="text">{LONG}'))
    return folder / "page.html"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_fits_phones_and_screens_in_light_and_dark(page):
    assert_fits(page)


def assert_fits(page):
    """Nothing is wider than the window but tables, which scroll in a box; text has a contrast of 4.5 at least."""
    for (width, scheme), found in zip(VIEWS, seen(page), strict=True):
        assert found["width"] == width
        assert found["scroll"] <= width
        assert (found["wide"], found["faint"]) == ([], []), (width, scheme)
        assert (found["back"] == "rgb(255, 255, 255)") == (scheme == "light")
        assert found["cells"] > 0
        assert found["numbers"] == ["right"]


def test_the_page_says_what_it_is_about(mixed, mixed_page):
    """Commit, data, base model, options that differ between runs; links lead to sections; a step is there once."""
    page = mixed_page
    links, ids = re.findall(r'<a href="#([^"]+)"', page), re.findall(r'<h2 id="([^"]+)"', page)
    assert links == ids
    differing = page.split('<h2 id="options">')[1].split("<h2")[0]
    assert "eval_sample.steer<" in differing
    assert "<td>unsteered</td>" not in differing  # a column per run, a row per option
    sources = page.split('<h2 id="data">')[1].split("<h2")[0]
    model = query(open_catalog(mixed), "SELECT model FROM steps WHERE stage = 'untrained'")["model"][0].as_py()
    assert {"prompts", "preferences", "untrained", model[:12]} <= set(re.findall(r"<td[^>]*>([^<]*)</td>", sources))
    keys = [link["key"] for steps in mixed.runs().values() for link in steps.values()]
    listed = page.split('<h2 id="steps">')[1]
    assert {listed.count(f">{key}<") for key in keys} == {1}


def test_runs_are_overlaid_in_one_plot_per_metric(mixed, mixed_page):
    """With the metric's name and unit on the axis, and a color per run that the legend names."""
    training = mixed_page.split('<h2 id="training">')[1].split("<h2")[0]
    for label in ("loss (nats)", "margin (nats)"):
        assert training.count(f">{label}<") == 1
    colors = re.findall(r'<span style="background: (#[0-9a-f]+)"></span>(\w+)', training)
    loss = next(plot for plot in training.split("<svg")[1:] if ">loss (nats)<" in plot)
    trained = {row["run"] for row in query(open_catalog(mixed), queries.text("curves")).to_pylist()}
    assert {name for _, name in colors} >= trained
    assert all(f"stroke: {color}" in loss for color, name in colors if name in trained)


# Evaluations during training


@pytest.fixture(scope="module")
def evaluated(data_dir, finished, tmp_path_factory):
    """A store with a run that was evaluated while it trained, and kept its best policy."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(finished, folder / "store")
    (folder / "mine.yaml").write_text(
        "extends: rso\n"
        "prompts: {with: {validation: 0.3}}\n"
        "heldout_pairs: {use: examples, from: {prompts: preferences, candidates: preferences, pairs: preferences,"
        " reference: preference_reference}, with: {split: heldout}}\n"
        "optimize: {from: {heldout: heldout_pairs, prompts: prompts, baseline: validation_baseline, ranker: ranker},"
        " with: {evaluate_every: 3, keep: best, learning_rate: 1.0e-2, epochs: 4}}\n"
    )
    plan = plan_named(str(folder / "mine.yaml"), [data_dir / "demo.yaml"], [])
    run(plan, Store(folder / "store"), LocalExecutor(), Silent())
    return Store(folder / "store")


def test_the_report_plots_evaluations_during_training_first(evaluated, tmp_path):
    """A point per evaluation of the run that has them, and a star at the policy that was saved."""
    write_report(evaluated, tmp_path / "page.html")
    training = (tmp_path / "page.html").read_text().split('<h2 id="training">')[1].split("<h2")[0]
    shown, more = training.split("<details>")
    labels = re.findall(r">([^<>]+ \(nats\)|validation proxy win rate)<", shown)
    assert labels == ["validation proxy win rate", "loss (nats)", "margin (nats)"]
    assert "a star: the policy that was saved" in shown
    assert "length on validation prompts (tokens)" in more


def test_held_out_figures_are_of_the_policy_that_was_saved(evaluated):
    """One per metric, at its step, of the several that were measured during training."""
    catalog = open_catalog(evaluated, "mine")
    of_step = "JOIN runs USING (stage, key) WHERE runs.step = 'optimize'"
    (steps,) = query(catalog, f"SELECT steps FROM policies {of_step}")["steps"].to_pylist()
    losses, wins = (
        {row["at"]: row["value"] for row in query(catalog, sql).to_pylist()}
        for sql in (
            f"SELECT metrics.step AS at, value FROM metrics {of_step} AND metric = '{metric}'"
            for metric in ("heldout/loss", "validation/proxy_win")
        )
    )
    assert len(losses) == len(wins) > 2
    assert steps == min(at for at, value in wins.items() if value == max(wins.values()))
    shown = query(catalog, queries.text("heldout")).to_pylist()
    assert [row["value"] for row in shown if (row["step"], row["metric"]) == ("optimize", "loss")] == [losses[steps]]


def test_the_page_of_a_store_is_the_same_at_any_time_and_there_all_at_once(finished, plain_page, tmp_path, monkeypatch):
    """Its date is that of the newest result, or the one that is set; a page that cannot be written leaves the one
    before."""
    newest = max(datetime.fromisoformat(manifest["made"]) for manifest in Store(finished).sealed())
    date = f"{newest:%Y-%m-%d %H:%M} UTC"
    assert date in plain_page
    file = tmp_path / "page.html"
    write_report(Store(finished), file, datetime(2026, 1, 3, tzinfo=UTC))
    assert file.read_text() == plain_page.replace(date, "2026-01-03 00:00 UTC")
    before = file.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(Store(tmp_path / "empty"), file)
    assert file.read_bytes() == before
    assert [*tmp_path.iterdir()] == [file]


def test_a_name_with_dollars_is_plotted_as_it_is(page):
    """It is no formula of matplotlib's."""
    assert DOLLARS in page.read_text()

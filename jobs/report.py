"""Self-contained HTML report about a store: SQL in, plots and tables out. No stage depends on it."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs import queries
from jobs.console import visible
from pipeline.config.rounds import split_round
from pipeline.sql.catalog import Catalog, open_catalog, query
from pipeline.store.store import Store

FOLDER = Path(__file__).parent
CURVES = [
    "loss", "margin", "accuracy", "logp/chosen", "logp/rejected", "token_accuracy", "grad_norm", "tokens/saved",
    "pairs_per_second", "tokens_per_second", "peak_memory_gb", "mfu",
]  # fmt: skip
HISTOGRAM_COLORS = {"all candidates": "#9aa5b1", "kept": "#2f6f4f"}  # by `what` of reward_histogram.sql


def write_report(store: Store, out: Path) -> None:
    """Write the report about all runs of a store: one section per run, or per round of a run with rounds."""
    catalog = open_catalog(store)
    sections = []
    for run, steps in catalog.runs.items():
        rounds: list[int | None] = [*sorted({number for step in steps if (number := split_round(step)[1])})]
        for round in rounds or [None]:
            of_run = catalog.for_run(run, round)
            sections.append(
                {
                    "name": run if round is None else f"{run}@{round}",
                    "histogram": _plot_histogram(_query_rows(of_run, "reward_histogram")),
                    "selection": _query_table(of_run, "selection"),
                    "curves": _plot_curves(_query_rows(of_run, "curves")),
                    "responses": _query_rows(of_run, "responses"),
                }
            )
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, finalize=_without_control)
    template = environment.get_template("report.html")
    html = template.render(
        store=store.root.name,
        leaderboard=_query_table(catalog, "leaderboard"),
        leaderboard_plot=_plot_leaderboard(_query_rows(catalog, "evaluations_by_run")),
        runs=sections,
        steps=_query_table(catalog, "status"),
        rejects=_query_table(catalog, "rejects"),
        heldout=_query_table(catalog, "heldout"),
        two_losses=_query_table(catalog, "two_losses"),
        two_losses_plot=_plot_two_losses(_query_rows(catalog, "two_losses")),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")


def _without_control(value: Any) -> Any:
    """Return a text as terminals get it; plots, which are marked as safe, stay."""
    return visible(value) if type(value) is str else value


def _query_rows(catalog: Catalog, name: str) -> list[dict[str, Any]]:
    return query(catalog, queries.text(name)).to_pylist()


def _query_table(catalog: Catalog, name: str) -> dict[str, list[Any]]:
    """Return columns and rows for a table of the page."""
    rows = _query_rows(catalog, name)
    return {"columns": list(rows[0]) if rows else [], "rows": [list(row.values()) for row in rows]}


def _plot_leaderboard(rows: list[dict[str, Any]]) -> str:
    """Plot gold and proxy win rates with their intervals, and a line at one half."""
    if not rows:
        return ""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    figure, axes = _new_figure(7, 0.8 + 0.45 * len(runs))
    for metric, color, shift in (("gold_win", "#b8860b", -0.12), ("proxy_win", "#4a6fa5", 0.12)):
        wins = [row for row in rows if row["metric"] == metric]
        rates = [100 * row["value"] for row in wins]
        errors = [[100 * abs(row["value"] - row[end]) for row in wins] for end in ("low", "high")]
        heights = [runs.index(row["run"]) + shift for row in wins]
        axes.errorbar(rates, heights, xerr=errors, fmt="o", color=color, capsize=3, label=metric.replace("_", " "))
    axes.axvline(50, color="#999", linewidth=0.8)
    axes.set_yticks(range(len(runs)), runs)
    axes.invert_yaxis()
    axes.set_xlabel("win rate against the SFT policy (%), with 95 % intervals over prompts")
    axes.legend(frameon=False)
    return _to_svg(figure)


def _plot_histogram(rows: list[dict[str, Any]]) -> str:
    """Plot the density of rewards before and after selection."""
    if not rows:
        return ""
    figure, axes = _new_figure(6, 2.6)
    for name, color in HISTOGRAM_COLORS.items():
        bins = [row for row in rows if row["what"] == name]
        if total := sum(row["n"] for row in bins):  # without rows there is no density
            widths = [row["high"] - row["low"] for row in bins]
            heights = [row["n"] / total / width for row, width in zip(bins, widths, strict=True)]
            label = f"{name} ({total:,})"
            axes.bar([row["low"] for row in bins], heights, widths, align="edge", alpha=0.6, color=color, label=label)
    axes.set_xlabel("reward: logit of P(response beats the prompt's baseline)")
    axes.set_ylabel("density")
    axes.legend(frameon=False)
    return _to_svg(figure)


def _plot_two_losses(rows: list[dict[str, Any]]) -> str:
    """Plot both held-out losses of each policy, and the ideal point: the best that any policy reached in each."""
    if len(rows) < 2:
        return ""
    points = np.array([[row["imitation_loss"], row["preference_loss"]] for row in rows])
    ideal = points.min(axis=0)
    figure, axes = _new_figure(6, 4)
    axes.plot(*ideal, "k*", markersize=11, label="ideal point: minimum of each loss")
    axes.legend(frameon=False)
    for row, point in zip(rows, points, strict=True):
        axes.plot(*zip(ideal, point, strict=True), color="#d6dce2", linewidth=0.8, zorder=0)
        axes.plot(*point, "o", color="#2f6f4f")
        label = f"{row['policy']} ({np.linalg.norm(point - ideal):.3f})"
        axes.annotate(label, tuple(point), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("held-out imitation loss (nats per token)")
    axes.set_ylabel("held-out preference loss")
    return _to_svg(figure)


def _plot_curves(rows: list[dict[str, Any]]) -> str:
    """Plot each metric of the run's own training in a small subplot."""
    metrics = [metric for metric in CURVES if any(row["metric"] == metric for row in rows)]
    if not metrics:
        return ""
    n_rows, n_columns = -(-len(metrics) // 4), min(4, len(metrics))
    width, height = 3.0 * n_columns, 2.2 * n_rows
    # Margins in inches, not a layout engine: it would draw everything twice, which takes most of a report's time.
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(0.5 / width, 0.3 / height, 1 - 0.1 / width, 1 - 0.3 / height, wspace=0.3, hspace=0.45)
    subplots = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axes, metric in zip(subplots, metrics, strict=False):
        points = [(row["step"], row["value"]) for row in rows if row["metric"] == metric]
        axes.plot(*zip(*points, strict=True), color="#2f6f4f", linewidth=1.2)
        axes.set_title(metric, fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in subplots[len(metrics) :]:
        axes.set_visible(False)
    return _to_svg(figure)


def _new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _to_svg(figure: Figure) -> str:
    """Return inline SVG without a date, so that the same store gives the same page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]

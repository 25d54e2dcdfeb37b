"""One self-contained HTML page about a store: SQL in, plots and tables out. No stage knows it."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs import queries
from pipeline.config.rounds import split
from pipeline.sql.catalog import Catalog, open_catalog, query
from pipeline.store.store import Store

HERE = Path(__file__).parent
CURVES = [
    "loss",
    "margin",
    "accuracy",
    "logp/chosen",
    "logp/rejected",
    "token_accuracy",
    "grad_norm",
    "tokens/saved",
    "pairs_per_second",
    "tokens_per_second",
    "peak_memory_gb",
    "flop_utilisation",
]
COLORS = {"all candidates": "#9aa5b1", "kept": "#2f6f4f"}


def write_report(store: Store, out: Path) -> None:
    everything = open_catalog(store)
    page = Environment(loader=FileSystemLoader(HERE), autoescape=True).get_template("report.html")
    html = page.render(
        store=store.root.name,
        board=_named(everything, "leaderboard"),
        board_plot=_leaderboard(_rows(everything, "evaluations_by_run")),
        runs=[_section(everything, run, round) for run in everything.runs for round in _rounds(everything, run)],
        steps=_named(everything, "status"),
        rejects=_named(everything, "rejects"),
        heldout=_named(everything, "heldout"),
        two_losses=_named(everything, "two_losses"),
        two_losses_plot=_two_losses(_rows(everything, "two_losses")),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")


def _rounds(catalog: Catalog, run: str) -> list[int | None]:
    """The run's rounds; one section without a number where it has none."""
    rounds: list[int | None] = [*sorted({number for step in catalog.runs[run] if (number := split(step)[1])})]
    return rounds or [None]


def _section(everything: Catalog, run: str, round: int | None) -> dict[str, Any]:
    catalog = everything.of(run, round)
    return {
        "name": run if round is None else f"{run}@{round}",
        "histogram": _histogram(_rows(catalog, "reward_histogram")),
        "selection": _named(catalog, "selection"),
        "curves": _curves(_rows(catalog, "curves")),
        "responses": _rows(catalog, "responses"),
    }


def _rows(catalog: Catalog, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = query(catalog, queries.text(name)).to_pylist()
    return rows


def _named(catalog: Catalog, name: str) -> dict[str, Any]:
    """Columns and rows, for a table of the page."""
    rows = _rows(catalog, name)
    return {"columns": list(rows[0]) if rows else [], "rows": [list(row.values()) for row in rows]}


def _leaderboard(rows: list[dict[str, Any]]) -> str:
    """Gold and proxy win rates with their intervals, a line at one half."""
    if not rows:
        return ""
    names = list(dict.fromkeys(row["run"] for row in rows))
    figure, axes = _figure(7, 0.8 + 0.45 * len(names))
    for metric, color, shift in (("gold_win", "#b8860b", -0.12), ("proxy_win", "#4a6fa5", 0.12)):
        chosen = [row for row in rows if row["metric"] == metric]
        values = [100 * row["value"] for row in chosen]
        spread = [[100 * abs(row["value"] - row[end]) for row in chosen] for end in ("low", "high")]
        places = [names.index(row["run"]) + shift for row in chosen]
        axes.errorbar(values, places, xerr=spread, fmt="o", color=color, capsize=3, label=metric.replace("_", " "))
    axes.axvline(50, color="#999", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("wins against the SFT policy, %, with 95 % intervals over prompts")
    axes.legend(frameon=False)
    return _svg(figure)


def _histogram(rows: list[dict[str, Any]]) -> str:
    """Density of rewards before and after selection."""
    if not rows:
        return ""
    figure, axes = _figure(6, 2.6)
    for name, color in COLORS.items():
        bins = [row for row in rows if row["what"] == name]
        if total := sum(row["n"] for row in bins):  # an empty side has no density
            widths = [row["high"] - row["low"] for row in bins]
            heights = [row["n"] / total / width for row, width in zip(bins, widths, strict=True)]
            label = f"{name} ({total:,})"
            axes.bar([row["low"] for row in bins], heights, widths, align="edge", alpha=0.6, color=color, label=label)
    axes.set_xlabel("reward: logit P(beats the prompt's baseline), nats")
    axes.legend(frameon=False)
    return _svg(figure)


def _two_losses(rows: list[dict[str, Any]]) -> str:
    """Both held-out losses of each policy, and the ideal: the best that any of them reached in each."""
    if len(rows) < 2:
        return ""
    points = np.array([[row["imitation_loss"], row["preference_loss"]] for row in rows])
    ideal = points.min(axis=0)
    figure, axes = _figure(6, 4)
    axes.plot(*ideal, "k*", markersize=11, label="ideal: the least of each")
    axes.legend(frameon=False)
    for row, point in zip(rows, points, strict=True):
        axes.plot(*zip(ideal, point, strict=True), color="#d6dce2", linewidth=0.8, zorder=0)
        axes.plot(*point, "o", color="#2f6f4f")
        label = f"{row['policy']} ({np.linalg.norm(point - ideal):.3f})"
        axes.annotate(label, tuple(point), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("held-out imitation loss, nats a token")
    axes.set_ylabel("held-out preference loss")
    return _svg(figure)


def _curves(rows: list[dict[str, Any]]) -> str:
    """One small panel a metric of the run's own training."""
    names = [name for name in CURVES if any(row["metric"] == name for row in rows)]
    if not names:
        return ""
    down, across = -(-len(names) // 4), min(4, len(names))
    width, height = 3.0 * across, 2.2 * down
    figure = Figure(figsize=(width, height))  # margins in inches: to find them by drawing twice takes most of a report
    figure.subplots_adjust(0.5 / width, 0.3 / height, 1 - 0.1 / width, 1 - 0.3 / height, wspace=0.3, hspace=0.45)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        points = [(row["step"], row["value"]) for row in rows if row["metric"] == name]
        axes.plot(*zip(*points, strict=True), color="#2f6f4f", linewidth=1.2)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    """Inline SVG without a date, so that the same store makes the same page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]

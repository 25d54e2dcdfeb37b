"""One self-contained HTML page about a store: SQL in, plots and tables out. No stage knows it."""

import io
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from jinja2 import Environment, FileSystemLoader
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.catalog import open_catalog, query
from pipeline.store import Store
from schemas import WinnowError

HERE = Path(__file__).parent
CURVES = ("loss", "margin", "accuracy", "logp/chosen", "logp/rejected", "token_accuracy", "grad_norm")
COLORS = {"all candidates": "#9aa5b1", "kept": "#2f6f4f"}


def write_report(store: Store, out: Path) -> None:
    """Raises WinnowError if the store has no run to show."""
    runs = list(store.runs())
    if not runs:
        raise WinnowError(f"{store.root}: no runs here yet; winnow run makes one")
    everything = open_catalog(store)
    page = Environment(loader=FileSystemLoader(HERE), autoescape=True).get_template("report.html")
    html = page.render(
        store=store.root.name,
        board=_named(everything, "leaderboard"),
        board_plot=_leaderboard(_rows(everything, "evaluations_by_run")),
        runs=[_section(store, run) for run in runs],
        steps=_named(everything, "status"),
        rejects=_named(everything, "rejects"),
        heldout=_named(everything, "heldout"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")


def _section(store: Store, run: str) -> dict[str, Any]:
    catalog = open_catalog(store, run)
    return {
        "name": run,
        "histogram": _histogram(_rows(catalog, "reward_histogram")),
        "selection": _named(catalog, "selection"),
        "curves": _curves(_rows(catalog, "curves")),
        "responses": _rows(catalog, "responses"),
    }


def _rows(catalog: duckdb.DuckDBPyConnection, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = query(catalog, (HERE / "queries" / f"{name}.sql").read_text()).to_pylist()
    return rows


def _named(catalog: duckdb.DuckDBPyConnection, name: str) -> dict[str, Any]:
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
    bins = np.histogram_bin_edges([row["reward"] for row in rows], bins=50)
    for name, color in COLORS.items():
        values = [row["reward"] for row in rows if row["what"] == name]
        axes.hist(values, bins=list(bins), density=True, alpha=0.6, color=color, label=f"{name} ({len(values):,})")
    axes.set_xlabel("reward: logit P(beats the prompt's baseline), nats")
    axes.legend(frameon=False)
    return _svg(figure)


def _curves(rows: list[dict[str, Any]]) -> str:
    """One small panel a metric of the run's own training."""
    names = [name for name in CURVES if any(row["metric"] == name for row in rows)]
    if not names:
        return ""
    figure = Figure(figsize=(3.0 * min(4, len(names)), 2.2 * -(-len(names) // 4)), layout="constrained")
    panels = figure.subplots(-(-len(names) // 4), min(4, len(names)), squeeze=False).flatten()
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

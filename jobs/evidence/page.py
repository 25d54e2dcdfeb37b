"""Page, pictures and tables of the figures: one HTML file, and beside it an SVG, a CSV and a JSON file per figure."""

import csv
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from jobs.evidence.figures import Basis
from jobs.evidence.measure import PlannedFigure, Row, table_of_figure
from jobs.page import COLORS, INK, error_bars, label, new_figure, page_table, render, to_svg
from pipeline.sql.catalog import open_catalog
from pipeline.store.storage import make_folder, replace
from pipeline.store.store import Store

FILE_INK = "#59636e"  # of text in a picture of its own, read on white and on black
RATES = ("gold_win", "proxy_win", "other_gold_win", "other_proxy_win")
ENDS = ("_low", "_high")
TITLES = {"at": "setting", "kl_nats": "KL (nats)", "compute_seconds": "compute (s)"}
GOLD, PROXY = "o-", "s--"


def write_evidence(
    figures: list[PlannedFigure], basis: Basis, store: Store, folder: Path, command: str, commit: str
) -> list[Path]:
    """Write the page and the files of each figure that has a finished point; return what was written."""
    make_folder(folder)
    catalog = open_catalog(store)
    date = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    sections, written = [], []
    for planned in figures:
        figure, rows = planned.figure, table_of_figure(planned, catalog)
        plot, caption = PLOTS[figure.name]
        svg = plot(rows) if rows else ""
        missing = len(planned.plans) - sum(len(item.plans) for item in planned.finished(catalog))
        unfinished = [f"{missing} of {len(planned.plans)} policies, which are not finished"] if missing else []
        sections.append(
            {
                "name": figure.name,
                "title": figure.title,
                "about": figure.about,
                "svg": svg,
                "caption": caption,
                "table": page_table([_readable(row) for row in rows]),
                "left_out": [*planned.left_out, *unfinished],
            }
        )
        if rows:
            head = {"figure": figure.name, "title": figure.title, "command": command, "commit": commit, "date": date}
            table = io.StringIO()
            writer = csv.DictWriter(table, [*rows[0], "command", "commit"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | {"command": command, "commit": commit} for row in rows)
            files = {
                f"{figure.name}.svg": _as_file(svg, f"{figure.title}. {command}, commit {commit}"),
                f"{figure.name}.csv": table.getvalue(),
                f"{figure.name}.json": json.dumps(head | {"about": figure.about, "rows": rows}, indent=1) + "\n",
            }
            for name, text in files.items():
                replace(folder / name, text.encode(), durable=False)
                written.append(folder / name)
    content = {
        "store": store.root.name,
        "date": date,
        "command": command,
        "commit": commit,
        "gold": basis.gold.name if basis.gold else "",
        "figures": sections,
    }
    page = folder / "evidence.html"
    replace(page, render("evidence/page.html", content).encode(), durable=False)
    return [page, *written]


def _readable(row: Row) -> Row:
    """Return a row with each value and its interval in one cell, win rates in percent, and without the axis."""
    result: Row = {}
    for name, value in row.items():
        if name.endswith(ENDS) or name in ("x", "sqrt_kl"):
            continue
        factor, unit = (100, " %") if any(rate in name for rate in ("gold_win", "proxy_win")) else (1, "")
        title = TITLES.get(name, name.replace("_", " ") + unit)
        if isinstance(value, float) and row.get(f"{name}_low") is not None:
            digits = 1 if factor == 100 else 2
            low, high = (row[f"{name}{end}"] for end in ENDS)
            cell = f"{factor * value:.{digits}f} [{factor * low:.{digits}f}, {factor * high:.{digits}f}]"
            result[title] = cell.replace(" ", "\N{NO-BREAK SPACE}")
        else:
            result[title] = factor * value if isinstance(value, float) else value
    return result


def _as_file(svg: str, description: str) -> str:
    """Return inline SVG as a file, which says where it is from."""
    from xml.sax.saxutils import escape

    text = svg.replace("currentColor", FILE_INK)
    start = text.index(">") + 1
    head = (
        f"<desc>{escape(description)}</desc><style>text {{ fill: {FILE_INK} }}</style>"  # as the page's own style does
    )
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text[:start]}{head}{text[start:]}'


# Plots.


def _metrics(rows: list[Row]) -> list[str]:
    """Return gold and proxy win rates, as far as they were measured."""
    return [name for name in RATES[:2] if all(row.get(name) is not None for row in rows)]


def _draw_line(axes: Axes, x: list[Any], rows: list[Row], metric: str, color: str, title: str) -> None:
    """Draw a win rate with its interval: gold solid, proxy dashed."""
    style = GOLD if metric.endswith("gold_win") else PROXY
    axes.errorbar(
        x, [100 * row[metric] for row in rows], yerr=error_bars(rows, metric, 100), fmt=style, color=color, capsize=2,
        elinewidth=0.7, linewidth=1.2, markersize=3.5, alpha=1.0 if style == GOLD else 0.75, label=label(title),
    )  # fmt: skip


def _lines_of(rows: list[Row]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row["line"], []).append(row)
    return lines


def _limit_rates(axes: Axes, rows: list[Row], names: tuple[str, ...] = RATES) -> None:
    """Let the axis show the means and half: intervals over two seeds may be wider than all there is to see."""
    values = [100 * row[name] for row in rows for name in names if row.get(name) is not None] + [50.0]
    margin = 0.35 * (max(values) - min(values)) + 1
    axes.set_ylim(max(0.0, min(values) - margin), min(100.0, max(values) + margin))


def plot_along_kl(rows: list[Row]) -> str:
    """Plot gold and proxy win rates against the root of KL, a color per method; by epochs where KL was not measured."""
    figure, axes = new_figure(3.8)
    has_kl = all(row.get("sqrt_kl") is not None for row in rows)
    for color, (line, of_line) in zip(COLORS, _lines_of(rows).items(), strict=False):
        of_line.sort(key=lambda row: row["x"])
        for metric in _metrics(of_line):
            x = [row["sqrt_kl"] if has_kl else row["x"] for row in of_line]
            _draw_line(axes, x, of_line, metric, color, line if metric == "gold_win" else f"{line}, proxy")
    axes.axhline(50, color=INK, alpha=0.4, linewidth=0.8)
    _limit_rates(axes, rows)
    axes.set_xlabel("square root of KL from the SFT policy (root of nats)" if has_kl else "epochs")
    axes.set_ylabel("win rate (%)")
    axes.legend(frameon=False, fontsize=7)
    return to_svg(figure, "gold and proxy along KL")


def plot_equal_kl(rows: list[Row]) -> str:
    """Plot the difference of two methods at equal KL with its interval: of gold win rates where there is gold."""
    metric = next((name for name in RATES[:2] if any(row.get(name) is not None for row in rows)), None)
    rows = [row for row in rows if metric and row.get("x") is not None and row.get(metric) is not None]
    if not rows or metric is None:
        return ""
    figure, axes = new_figure(3.2)
    for index, (color, (line, of_line)) in enumerate(zip(COLORS, _lines_of(rows).items(), strict=False)):
        x = np.array([row["x"] for row in of_line]) + 0.004 * index
        axes.errorbar(
            x, [100 * row[metric] for row in of_line], yerr=error_bars(of_line, metric, 100), fmt="o-", color=color,
            capsize=2, elinewidth=0.7, linewidth=1.2, markersize=3.5, label=label(line),
        )  # fmt: skip
    axes.axhline(0, color=INK, alpha=0.5, linewidth=0.8)
    values = [abs(100 * row[metric]) for row in rows]
    limit = max(3 * max(values), 2.0)
    axes.set_ylim(-limit, limit)
    axes.set_xlabel("square root of KL from the SFT policy, equal for both")
    axes.set_ylabel(f"difference in {metric.replace('_', ' ')} rate (points)")
    axes.legend(frameon=False, fontsize=7)
    return to_svg(figure, "difference at equal KL")


def _plot_setting(title: str, x_label: str) -> Callable[[list[Row]], str]:
    def plot(rows: list[Row]) -> str:
        figure, axes = new_figure(3.2)
        for color, (line, of_line) in zip(COLORS, _lines_of(rows).items(), strict=False):
            of_line.sort(key=lambda row: row["x"])
            for metric in _metrics(of_line):
                x = [row["x"] for row in of_line]
                _draw_line(axes, x, of_line, metric, color, line if metric == "gold_win" else f"{line}, proxy")
        axes.set_xscale("log", base=2)
        values = sorted({row["x"] for row in rows})
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
        _limit_rates(axes, rows)
        axes.set_xlabel(x_label)
        axes.set_ylabel("win rate (%)")
        axes.legend(frameon=False, fontsize=7)
        return to_svg(figure, title)

    return plot


def plot_compute(rows: list[Row]) -> str:
    """Plot the win rate against seconds of sampling, ranking and training; a line joins the rounds of a method."""
    metric = next((name for name in RATES[:2] if all(row.get(name) is not None for row in rows)), None)
    if metric is None:
        return ""
    figure, axes = new_figure(3.8)
    for index, (line, of_line) in enumerate(_lines_of(rows).items()):
        color = COLORS[index % len(COLORS)]
        x = [row["compute_seconds"] for row in of_line]
        _draw_line(axes, x, of_line, metric, color, line)
        for row in of_line if len(of_line) > 1 else []:
            point = (row["compute_seconds"], 100 * row[metric])
            axes.annotate(f"{row['round']}", point, (3, 3), textcoords="offset points", fontsize=6)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")  # of powers of ten, the labels lie on each other
    axes.minorticks_off()
    _limit_rates(axes, rows, (metric,))
    axes.set_xlabel("sample + rank + train (seconds at this store's mean rates)")
    axes.set_ylabel(f"{metric.replace('_', ' ')} rate (%)")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
    return to_svg(figure, "gold against compute")


def plot_rankers(rows: list[Row]) -> str:
    """Plot gold and proxy win rates for each ranker, the best last."""
    figure, axes = new_figure(3.0)
    rows = sorted(rows, key=lambda row: (row["x"] is None, row["x"] or 0))
    names = [row["at"] or (f"all ({row['x']:,} labels)" if row["x"] else "the config's") for row in rows]
    for metric, color in zip(_metrics(rows), (COLORS[3], COLORS[0]), strict=False):
        _draw_line(axes, list(range(len(rows))), rows, metric, color, metric.replace("_", " "))
    axes.set_xticks(range(len(rows)), [name.replace("labels=", "") for name in names], fontsize=7)
    _limit_rates(axes, rows)
    axes.set_xlabel("labels that the ranker was trained on")
    axes.set_ylabel("win rate (%)")
    axes.legend(frameon=False, fontsize=7)
    return to_svg(figure, "rankers of several qualities")


def plot_other_prompts(rows: list[Row]) -> str:
    """Plot the win rate of each method on held-out prompts and on those of the other file."""
    metric = next((name for name in RATES[:2] if all(row.get(name) is not None for row in rows)), None)
    if metric is None:
        return ""
    figure, axes = new_figure(1.4 + 0.4 * len(rows))
    heights = np.arange(len(rows))
    for name, shift, color, title in ((metric, -0.1, COLORS[3], "held-out prompts"),
                                      (f"other_{metric}", 0.1, COLORS[4], "prompts of the other file")):  # fmt: skip
        axes.errorbar(
            [100 * row[name] for row in rows], heights + shift, xerr=error_bars(rows, name, 100), fmt="o", color=color,
            capsize=2, elinewidth=0.7, markersize=4, label=title,
        )  # fmt: skip
    values = [100 * row[name] for row in rows for name in (metric, f"other_{metric}")] + [50.0]
    axes.set_xlim(max(0.0, min(values) - 10), min(100.0, max(values) + 10))
    axes.axvline(50, color=INK, alpha=0.4, linewidth=0.8)
    axes.set_yticks(heights, [label(row["line"]) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric.replace('_', ' ')} rate against the SFT policy (%)")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.25), ncols=2)
    return to_svg(figure, "prompts from another distribution")


PLOTS: dict[str, tuple[Callable[[list[Row]], str], str]] = {
    "over-optimisation": (plot_along_kl, "Solid: gold. Dashed: proxy."),
    "equal-kl": (
        plot_equal_kl,
        "Above zero, the first method is better where both are as far from the SFT policy.",
    ),
    "candidates": (_plot_setting("candidates per prompt", "n, candidates per prompt"), "Solid: gold. Dashed: proxy."),
    "beta": (_plot_setting("temperature of rejection sampling", "select.rule.beta"), "Solid: gold. Dashed: proxy."),
    "gamma": (_plot_setting("factor of the log-ratio", "optimize.objective.beta"), "Solid: gold. Dashed: proxy."),
    "compute": (plot_compute, "Numbers are rounds."),
    "ranker": (plot_rankers, "Solid: gold. Dashed: the ranker that the policy was trained with."),
    "other-prompts": (plot_other_prompts, "Each point against the SFT policy on the same prompts."),
}

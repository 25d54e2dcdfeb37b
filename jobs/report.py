"""Self-contained HTML report about a store: SQL in, plots and tables out. No stage depends on it."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs import methods, queries
from jobs.page import COLORS, INK, label, new_figure, page_table, render, to_svg
from jobs.tables import judges_rows, tags_text
from pipeline.config.rounds import split_round
from pipeline.sql.catalog import Catalog, open_catalog, query
from pipeline.store.storage import replace
from pipeline.store.store import Store
from stages.training.config import PROXY_WIN, VALIDATION

# Metrics that are plotted for all runs together, each with the label of its axis; the first come first on the page.
CURVES = {
    PROXY_WIN: "validation proxy win rate",
    "loss": "loss (nats)",
    "margin": "margin (nats)",
    "accuracy": "accuracy (fraction of pairs)",
    "grad_norm": "gradient norm",
    "logp/chosen": "log-prob of chosen (nats)",
    "logp/rejected": "log-prob of rejected (nats)",
    "token_accuracy": "accuracy (fraction of tokens)",
    "kl": "KL estimate of the objective (nats)",
    "validation/kl": "KL on validation prompts (nats)",
    "validation/n_tokens": "length on validation prompts (tokens)",
    "validation/proxy_unread": "validation responses not read (fraction)",
    "learning_rate": "learning rate",
    "tokens/saved": "tokens saved (fraction)",
    "pairs_per_second": "pairs per second",
    "tokens_per_second": "tokens per second",
    "peak_memory_gb": "peak memory (GB)",
    "mfu": "model flop utilisation",
}
HISTOGRAM_COLORS = {"all candidates": "#8793a0", "kept": "#2a9d5c"}  # by `what` of reward_histogram.sql
WIN_RATES = ("gold_win", "proxy_win")
OTHER_WIN_RATES = [f"{name}{at}" for name in WIN_RATES for at in methods.TEMPERATURES]
TITLES = {  # of the leaderboard's columns; low and high are of the column before them
    **{f"{name}_{end}": end for name in (*WIN_RATES, *OTHER_WIN_RATES, "gold_reward") for end in ("low", "high")},
    **{f"{name}{at}": f"{name.replace('_', ' ')} % {at.replace('_', ' ').strip()}"
       for name in WIN_RATES for at in methods.TEMPERATURES},
    "gold_win": "gold win %", "proxy_win": "proxy win %", "gold_reward": "gold reward", "kl_nats": "KL (nats)",
    "own_seconds": "own seconds",
}  # fmt: skip


def write_report(store: Store, out: Path, date: datetime | None = None) -> None:
    """Write the report about all runs of a store, at once or not at all: the same store gives the same bytes.

    date: that on the page; by default that of the newest result, now if there is none.
    """
    catalog = open_catalog(store)
    if date is None:
        times = [datetime.fromisoformat(manifest["made"]) for manifest in catalog.manifests]
        date = max(times, default=datetime.now(UTC)).astimezone(UTC)
    sections: list[dict[str, Any]] = []
    for run, steps in catalog.runs.items():
        rounds: list[int | None] = [*sorted({number for step in steps if (number := split_round(step)[1])})]
        for round in rounds or [None]:
            of_run = catalog.for_run(run, round)
            sections.append(
                {
                    "id": f"run-{len(sections) + 1}",
                    "name": run if round is None else f"{run}@{round}",
                    "tags": tags_text(catalog.tags.get(run, {})),
                    "histogram": _plot_histogram(_query_rows(of_run, "reward_histogram")),
                    "selection": _query_table(of_run, "selection"),
                    "responses": _query_rows(of_run, "responses"),
                }
            )
    leaderboard, curve_rows = _query_rows(catalog, "leaderboard"), _query_rows(catalog, "curves")
    board, statement = methods.make_leaderboard(catalog)
    of_methods = [row for row in board.to_pylist() if row.get("seeds", 1) > 1]
    names = dict.fromkeys([row["run"] for row in leaderboard] + [row["run"] for row in curve_rows])
    colors = {name: COLORS[n % len(COLORS)] for n, name in enumerate(names)}
    curves = _plot_curves(curve_rows, colors, query(catalog, SAVED_STEPS).to_pylist())
    content = {
        "store": store.root.name,
        "date": f"{date:%Y-%m-%d %H:%M} UTC",
        "commits": [
            row["commit"][:12] + "+" * row["commit"].endswith("+") for row in query(catalog, COMMITS).to_pylist()
        ],
        "sources": page_table(_sources(catalog)),
        "differences": page_table(_differences(catalog)),
        "leaderboard": page_table(_in_percent(leaderboard), TITLES),
        "methods": page_table(_in_percent(of_methods), TITLES),
        "statement": [line.strip() for line in statement],
        "judges": page_table(judges_rows(catalog)),
        "leaderboard_plot": _plot_leaderboard(_query_rows(catalog, "evaluations_by_run")),
        "kl_plot": _plot_win_against_kl(leaderboard, colors),
        "colors": colors,
        "curves": curves,
        "first_curves": 3 if any(row["metric"] == PROXY_WIN for row in curve_rows) else 2,
        "runs": sections,
        "steps": page_table(query(catalog, STEPS).to_pylist()),
        "rejects": _query_table(catalog, "rejects"),
        "heldout": _query_table(catalog, "heldout"),
        "two_losses": page_table(
            [{name: row[name] for name in row if name != "front"} for row in _query_rows(catalog, "two_losses")]
        ),
        "two_losses_plot": _plot_two_losses(_query_rows(catalog, "two_losses")),
    }
    html = render("report.html", content | {"contents": _contents(content)})
    replace(out, html.encode(), durable=False)


# What the page says.

COMMITS = "SELECT commit, max(made) AS made FROM steps GROUP BY commit ORDER BY made DESC, commit"
STEPS = """
SELECT string_agg(DISTINCT runs.step, ', ' ORDER BY runs.step) AS step, stage, key,
    string_agg(DISTINCT run, ', ' ORDER BY run) AS runs,
    CASE WHEN any_value(steps.made) IS NULL THEN 'not finished' ELSE 'finished' END AS state, any_value(rows) AS rows,
    any_value(rejects) AS rejects, any_value(seconds) AS seconds, any_value(tokens) AS tokens,
    any_value(ranker_calls) AS ranker_calls
FROM runs LEFT JOIN steps USING (stage, key) GROUP BY stage, key ORDER BY any_value(made) NULLS LAST, step, key
"""


# Of each trained policy, the step after which it was saved.
SAVED_STEPS = """
SELECT min(run || coalesce('@' || round, '')) AS run, any_value(steps) AS step
FROM runs JOIN policies USING (stage, key) WHERE runs.step = 'optimize' GROUP BY stage, key
"""


def _contents(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Return id and title of each section that the page has."""
    sections = [
        ("leaderboard", "Leaderboard", True),
        ("data", "Data and models", True),
        ("options", "Options that differ between runs", content["differences"]["rows"]),
        ("training", "Training", content["curves"]),
        ("two-losses", "Preferences and demonstrations in one run", content["two_losses_plot"]),
        *((run["id"], run["name"], run["histogram"] or run["responses"]) for run in content["runs"]),
        ("heldout", "Trained models on held-out examples", content["heldout"]["rows"]),
        ("rejects", "Rejected rows, by reason", True),
        ("steps", "Steps", True),
    ]
    return [(name, title) for name, title, present in sections if present]


def _sources(catalog: Catalog) -> list[dict[str, Any]]:
    """Return the steps that read files or data sets, or no other step, with what identifies their content."""
    sql = """SELECT string_agg(DISTINCT runs.step, ', ' ORDER BY runs.step) AS step, stage, key,
        any_value(options) AS options, any_value(rows) AS rows, any_value(rejects) AS rejects, any_value(model) AS model
        FROM runs JOIN steps USING (stage, key) WHERE inputs = '{}' OR options LIKE '%"path": %'
        GROUP BY stage, key ORDER BY stage, step, key"""
    rows = []
    for row in query(catalog, sql).to_pylist():
        options = json.loads(row["options"])
        digests = [value[:12] for name, value in _option_texts(options) if name.endswith(".content") and value]
        named = [str(options[name]) for name in ("dataset", "revision") if options.get(name)]
        rows.append({
            "step": row["step"],
            "stage": row["stage"],
            "content": ", ".join([*named, *digests]),
            "model": (row["model"] or "")[:12],
            "rows": row["rows"] or None,
            "rejects": row["rejects"],
        })  # fmt: skip
    return rows


def _differences(catalog: Catalog) -> list[dict[str, Any]]:
    """Return a row per step and option whose values differ between runs or rounds, with a column per run."""
    sql = "SELECT run, runs.step AS step, round, options FROM runs JOIN steps USING (stage, key) ORDER BY ALL"
    values: dict[tuple[str, str], dict[str, str]] = {}
    steps: dict[str, set[str]] = {}
    runs: dict[str, None] = {}
    for row in query(catalog, sql).to_pylist():
        run = row["run"] if row["round"] is None else f"{row['run']}@{row['round']}"
        runs[run] = None
        steps.setdefault(row["step"], set()).add(run)
        for name, value in _option_texts(json.loads(row["options"])):
            values.setdefault((row["step"], name), {})[run] = value
    # An option that a function has and another lacks differs too; a step that a run lacks does not.
    differing = {
        key: by_run
        for key, by_run in values.items()
        if len({by_run.get(run) for run in steps[key[0]]}) > 1 and not key[1].endswith(".version")
    }
    columns = [run for run in runs if any(run in by_run for by_run in differing.values())]
    return [
        {"option": f"{step}.{name.removesuffix('.name')}", **{run: by_run.get(run, "") for run in columns}}
        for (step, name), by_run in sorted(differing.items())
    ]


def _option_texts(options: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each option by its dotted path, as text."""
    if isinstance(options, dict) and options:
        for name, value in options.items():
            yield from _option_texts(value, f"{path}.{name}" if path else name)
    else:
        yield path, options if isinstance(options, str) else json.dumps(options)


def _in_percent(leaderboard: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the leaderboard with win rates in percent, and without what no run was measured by."""
    rows = []
    for row in leaderboard:
        rates = [name for name in row if name.startswith(WIN_RATES) and row[name] is not None]
        rows.append(row | {name: f"{100 * row[name]:.1f}" for name in rates})
    return [{name: row[name] for name in row if any(other[name] is not None for other in rows)} for row in rows]


def _query_rows(catalog: Catalog, name: str) -> list[dict[str, Any]]:
    return query(catalog, queries.text(name)).to_pylist()


def _query_table(catalog: Catalog, name: str) -> dict[str, list[Any]]:
    return page_table(_query_rows(catalog, name))


# Plots.


def _plot_leaderboard(rows: list[dict[str, Any]]) -> str:
    """Plot gold and proxy win rates with their intervals, and a line at one half."""
    if not rows:
        return ""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    figure, axes = new_figure(1.1 + 0.4 * len(runs))
    series = [("gold_win", COLORS[3], -0.12), ("proxy_win", COLORS[0], 0.12)]
    others = sorted({row["metric"] for row in rows} - set(WIN_RATES))  # of the judges of a config
    colors = [color for color in COLORS if color not in (COLORS[0], COLORS[3])]
    series += [(name, colors[n % len(colors)], 0.12 + 0.08 * (n + 1)) for n, name in enumerate(others)]
    for metric, color, shift in series:
        wins = [row for row in rows if row["metric"] == metric]
        rates = [100 * row["value"] for row in wins]
        errors = [[100 * abs(row["value"] - row[end]) for row in wins] for end in ("low", "high")]
        heights = [runs.index(row["run"]) + shift for row in wins]
        axes.errorbar(rates, heights, xerr=errors, fmt="o", color=color, capsize=3, label=metric.replace("_", " "))
    axes.axvline(50, color=INK, alpha=0.4, linewidth=0.8)
    axes.set_yticks(range(len(runs)), [_shortened(run, 22) for run in runs])
    axes.invert_yaxis()
    axes.set_xlabel("win rate against the SFT policy (%)")
    axes.legend(frameon=False, fontsize=8)
    return to_svg(figure, "win rates")


def _plot_win_against_kl(leaderboard: list[dict[str, Any]], colors: dict[str, str]) -> str:
    """Plot the win rate of each policy, by gold where there is one, against its KL from the SFT policy."""
    metric = next((name for name in WIN_RATES if any(row[name] is not None for row in leaderboard)), WIN_RATES[0])
    rows = [row for row in leaderboard if row[metric] is not None and row["kl_nats"] is not None]
    if not rows:
        return ""
    figure, axes = new_figure(3.2)
    for row in rows:
        value = 100 * row[metric]
        error = [[value - 100 * row[f"{metric}_low"]], [100 * row[f"{metric}_high"] - value]]
        axes.errorbar([row["kl_nats"]], [value], yerr=error, fmt="o", color=colors[row["run"]], capsize=3)
        axes.annotate(
            _shortened(row["run"], 18), (row["kl_nats"], value), (5, 4), textcoords="offset points", fontsize=8
        )
    axes.axhline(50, color=INK, alpha=0.4, linewidth=0.8)
    axes.set_xlabel("KL from the SFT policy (nats per response)")
    axes.set_ylabel(f"{metric.replace('_', ' ')} rate (%)")
    axes.margins(x=0.15)
    return to_svg(figure, "win rate against KL")


def _plot_histogram(rows: list[dict[str, Any]]) -> str:
    """Plot the density of rewards before and after selection."""
    if not rows:
        return ""
    figure, axes = new_figure(2.6)
    for name, color in HISTOGRAM_COLORS.items():
        bins = [row for row in rows if row["what"] == name]
        if total := sum(row["n"] for row in bins):  # without rows there is no density
            widths = [row["high"] - row["low"] for row in bins]
            heights = [row["n"] / total / width for row, width in zip(bins, widths, strict=True)]
            title = f"{name} ({total:,})"
            axes.bar([row["low"] for row in bins], heights, widths, align="edge", alpha=0.6, color=color, label=title)
    axes.set_xlabel("reward (logit of P(response beats the prompt's baseline))", fontsize=8)
    axes.set_ylabel("density")
    axes.legend(frameon=False, fontsize=8)
    return to_svg(figure, "rewards before and after selection")


def _plot_two_losses(rows: list[dict[str, Any]]) -> str:
    """Plot both held-out losses: each mix over its weights as one line, and what each objective reaches alone.

    Bars are standard errors over seeds. The ideal point has the lower loss of both objectives alone, in one setting.
    """
    if len(rows) < 2:
        return ""
    figure, axes = new_figure(3.8)
    names = ("ideal_imitation_loss", "ideal_preference_loss")
    ideals = dict.fromkeys(tuple(row[name] for name in names) for row in rows if row[names[0]] and row[names[1]])
    for n, ideal in enumerate(ideals):
        text = "" if n else "ideal point: each objective alone"
        axes.plot(*ideal, "*", color=INK, markersize=11, label=text)
    fronts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        is_alone = row["mix"] == "joint" and row["weight"] in (0, 1)
        fronts.setdefault(("" if is_alone else row["mix"] or "", row["policy" if is_alone else "front"]), []).append(
            row
        )
    for n, ((mix, _), points) in enumerate(sorted(fronts.items())):
        points = sorted(points, key=lambda row: row["weight"] or 0)
        x, y = ([row[f"{name}_loss"] for row in points] for name in ("imitation", "preference"))
        errors = [[row[f"{name}_loss_se"] or 0 for row in points] for name in ("imitation", "preference")]
        color = COLORS[n % len(COLORS)] if mix else INK
        style = "o-" if mix else "s"
        text = mix if len(points) > 1 else ""
        axes.errorbar(
            x, y, yerr=errors[1], xerr=errors[0], fmt=style, color=color, linewidth=1, markersize=4, label=text
        )
        for row in points:
            name = f"{row['weight']:g}" if len(points) > 1 else row["policy"]
            distance = "" if row["distance"] is None else f" ({row['distance']:.3f})"
            at = row["imitation_loss"], row["preference_loss"]
            axes.annotate(label(f"{name}{distance}"), at, xytext=(5, 4), textcoords="offset points", fontsize=8)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("held-out imitation loss (nats per token)")
    axes.set_ylabel("held-out preference loss (nats)")
    axes.margins(x=0.2)
    return to_svg(figure, "held-out losses")


def _plot_curves(
    rows: list[dict[str, Any]], colors: dict[str, str], saved: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """Return the plot over the optimizer steps and the caption of each metric of training, all runs in one plot.

    saved: the step of each run's saved policy, which has a star among its evaluations.
    """
    saved_steps, plots = {row["run"]: row["step"] for row in saved}, []
    for metric, title in CURVES.items():
        curves: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row["metric"] == metric:
                curves.setdefault(row["run"], []).append((row["step"], row["value"]))
        if not curves:
            continue
        figure, axes = new_figure(2.8)
        is_evaluated = metric.startswith(VALIDATION)
        for run, points in curves.items():
            marker = "o" if len(points) == 1 or is_evaluated else None
            axes.plot(*zip(*points, strict=True), color=colors[run], linewidth=1.2, marker=marker, markersize=4)
            if is_evaluated and saved_steps.get(run) in dict(points):
                best = saved_steps[run]
                axes.plot(best, dict(points)[best], "*", color=colors[run], markersize=13, zorder=3)
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel(title)
        caption = "Evaluations during training; a star: the policy that was saved." if is_evaluated else ""
        plots.append((to_svg(figure, f"{title} of each run"), caption))
    return plots


def _shortened(text: str, length: int) -> str:
    return label(text if len(text) <= length else f"{text[: length - 1]}…")

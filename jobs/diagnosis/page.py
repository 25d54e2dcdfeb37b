"""Self-contained HTML page of a diagnosis: findings, and a table and a plot per section."""

from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np

from jobs.diagnosis.sections import Diagnosis, Section
from jobs.page import COLORS, INK, error_bars, new_figure, page_table, render, to_svg
from pipeline.store.storage import replace

REWARD_COLOR, GOLD_COLOR = COLORS[0], COLORS[3]
ENDS = (" low", " high")  # of the columns with a figure's interval


def write_page(diagnosis: Diagnosis, out: Path, date: datetime | None = None) -> None:
    """Write the page: the same diagnosis gives the same bytes, except for the date."""
    sections = []
    for section in diagnosis.sections.values():
        plot, caption = PLOTS[section.id]
        svg = plot(section)
        sections.append(
            {
                "id": section.id,
                "title": section.title,
                "about": section.about,
                "svg": svg,
                "caption": caption,
                "table": page_table(section.rows),
            }
        )
    content = {
        "name": diagnosis.name,
        "date": f"{date or datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "facts": diagnosis.facts,
        "findings": diagnosis.findings,
        "sections": sections,
    }
    replace(out, render("diagnosis/page.html", content).encode(), durable=False)


def _plot_rules(section: Section) -> str:
    """Plot gold of what each rule keeps with its interval and its prediction; the reward where there is no gold."""
    name = "gold" if "gold" in section.rows[0] else "reward"
    rows = [row for row in section.rows if row[name] is not None]
    figure, axes = new_figure(1.1 + 0.42 * len(rows))
    heights, color = np.arange(len(rows)), GOLD_COLOR if name == "gold" else REWARD_COLOR
    axes.errorbar([row[name] for row in rows], heights, xerr=error_bars(rows, name, ends=ENDS), fmt="o", color=color,
                  capsize=3, label=f"{name} of what is kept")  # fmt: skip
    if name == "gold":
        predicted = [row["predicted"] for row in rows]
        axes.plot(predicted, heights, "|", color=INK, markersize=13, label="predicted from other prompts")
    axes.set_yticks(heights, [row["rule"].replace(" ", "\n", 1) for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"{name}, mean over prompts")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return to_svg(figure, f"{name} of what rules keep")


def _plot_tilt(section: Section) -> str:
    """Plot the nats that are asked, and those that Algorithm 1 achieves, against beta; with the most that it can."""
    rows = [row for row in section.rows if row["beta"] > 0]
    figure, axes = new_figure(3.0)
    betas = [row["beta"] for row in rows]
    for name, label, color in (("asked", "asked", COLORS[1]), ("of n", "of the candidates", COLORS[7]),
                               ("kept", "achieved", COLORS[2])):  # fmt: skip
        axes.plot(betas, [row[name] for row in rows], "o-", color=color, linewidth=1.2, markersize=3.5, label=label)
    axes.axhline(section.plot["limit"], color=INK, alpha=0.5, linewidth=0.8, linestyle="--", label="log(n / k)")
    axes.axvline(section.plot["beta"], color=INK, alpha=0.3, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("beta (the line: the recipe's)")
    axes.set_ylabel("tilt (nats)")
    axes.legend(frameon=False, fontsize=8)
    return to_svg(figure, "asked and achieved tilt")


def _plot_best_of(section: Section) -> str:
    """Plot what the best of n gains over one draw by reward and by gold, in deviations within a prompt."""
    figure, axes = new_figure(3.0)
    sizes = [row["n"] for row in section.rows]
    for name, color in (("reward", REWARD_COLOR), ("gold", GOLD_COLOR)):
        if name in section.plot["deviations"]:
            deviation = section.plot["deviations"][name] or 1.0
            gains = [(row[name] - section.rows[0][name]) / deviation for row in section.rows]
            error = error_bars(section.rows, name, 1 / deviation, ENDS)
            axes.errorbar(sizes, gains, yerr=error, fmt="o-", color=color, capsize=3, markersize=3.5, linewidth=1.2,
                          label=name)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("n, candidates of which the best by reward is taken")
    axes.set_ylabel("gain over one draw (deviations)")
    axes.legend(frameon=False, fontsize=8)
    return to_svg(figure, "best of n")


def _plot_agreement(section: Section) -> str:
    """Plot the share of pairs in the same order against the distance of their rewards."""
    edges, curves = section.plot["edges"], section.plot["curves"]
    bounds = [0.0, *edges]
    labels = [f"{low:g}–{high:g}" for low, high in pairwise(bounds)] + [f"{bounds[-1]:g}+"]
    figure, axes = new_figure(3.0)
    for (what, shares), color in zip(curves.items(), COLORS * (1 + len(curves) // len(COLORS)), strict=False):
        axes.plot(range(len(shares)), shares, "o-", color=color, linewidth=1.2, markersize=3.5, label=what)
    axes.axhline(50, color=INK, alpha=0.4, linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels, rotation=30, fontsize=7)
    axes.set_xlabel("distance of the two rewards")
    axes.set_ylabel("pairs in the same order (%)")
    if curves:
        axes.legend(frameon=False, fontsize=8)
    return to_svg(figure, "agreement by distance of the rewards")


def _plot_length(section: Section) -> str:
    """Plot reward and gold, in deviations from their prompt's mean, by tenth of the prompt's lengths."""
    figure, axes = new_figure(2.6)
    for name, color in (("reward", REWARD_COLOR), ("gold", GOLD_COLOR)):
        if name in section.plot["curves"]:
            axes.plot(range(1, 11), section.plot["curves"][name], "o-", color=color, linewidth=1.2, markersize=3.5,
                      label=name)  # fmt: skip
    axes.axhline(0, color=INK, alpha=0.4, linewidth=0.8)
    axes.set_xlabel("tenth of the prompt's responses by length, shortest first")
    axes.set_ylabel("deviations from the mean")
    axes.legend(frameon=False, fontsize=8)
    return to_svg(figure, "reward and gold by length")


PLOTS: dict[str, tuple[Callable[[Section], str], str]] = {
    "rules": (_plot_rules, "Best first. A tick on the point: the prediction is right."),
    "tilt": (_plot_tilt, "Where what is asked leaves what is achieved, the candidates cannot support that beta."),
    "best-of": (_plot_best_of, "Where gold parts from reward, the ranker is exploited."),
    "agreement": (_plot_agreement, "A ranker that knows what it does is surer of pairs that are further apart."),
    "length": (_plot_length, "Where the two part, the ranker likes or dislikes length more than gold does."),
}

"""The paper's own tables (arXiv 2309.06657, tables 1 and 2) on one's own world, beside the paper's figures."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from jobs.recipes import plan_named
from pipeline.config.plan import Plan
from pipeline.sql.catalog import Catalog, open_catalog, query
from pipeline.store.store import Store
from stages.evaluation.evaluate import bootstrap_interval

CELLS = Path(__file__).parent / "paper.yaml"
RESAMPLES = 2000
METRICS = {"gold_win": 1, "proxy_win": 0}  # and the place of the paper's figure for it
Wins = dict[str, dict[str, dict[str, float]]]  # run, metric, prompt: share of wins


@dataclass(frozen=True)
class Cell:
    """One cell of a table: what it is called, how it is made, what the paper saw."""

    table: str
    labels: dict[str, str]
    recipe: str
    sets: tuple[str, ...] = ()
    paper: dict[str, list[float | None]] = field(default_factory=dict)

    @property
    def run(self) -> str:
        return f"paper {' '.join(self.labels.values())}"


def cells() -> list[Cell]:
    """Every cell of paper.yaml, in order."""
    content = _content()
    return [_cell(table, row) for table in ("table 1", "table 2") for row in content[table]]


def _content() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(CELLS.read_text(encoding="utf-8"))
    return content


def _cell(table: str, row: dict[str, Any]) -> Cell:
    labels: dict[str, str] = {name: row[name] for name in ("loss", "pairs", "rank") if name in row}
    figures: dict[str, list[float | None]] = {name: row[name] for name in ("tldr", "hh") if name in row}
    return Cell(table, labels, row["recipe"], tuple(row.get("set", ())), figures)


def paper_plans(worlds: list[Path], sets: list[str], gamma: float = 1.0) -> list[Plan]:
    """One plan a cell; equal cells of the two tables are one key, and run once.

    `gamma` is the paper's: what both reference-normalised losses multiply the log-ratio by (there 0.05; 1 suits the
    demo world). The hinge, which has no reference, keeps its margin 1.
    """
    losses = _losses(gamma)
    return [
        plan_named(cell.recipe, worlds, [losses[cell.labels.get("loss", "sigmoid-norm")], *cell.sets, *sets], cell.run)
        for cell in cells()
    ]


def _losses(gamma: float) -> dict[str, str]:
    """What the paper calls a loss, as an override."""
    objectives = {
        "sigmoid-norm": f"name: sigmoid_norm, beta: {gamma}",
        "hinge": "name: hinge, delta: 1.0",
        "hinge-norm": f"name: hinge_norm, gamma: {gamma}",
    }
    return {loss: f"optimize.objective={{{objective}}}" for loss, objective in objectives.items()}


def tables(store: Store) -> list[tuple[str, pa.Table]]:
    """Both tables with 95 % intervals over prompts, and what the paper concludes against what was measured."""
    catalog, made = open_catalog(store), cells()
    wins = {cell.run: _wins(catalog, cell.run) for cell in made}
    titled = [(f"{name} of arXiv 2309.06657", [_row(cell, wins[cell.run]) for cell in made if cell.table == name])
              for name in ("table 1", "table 2")]  # fmt: skip
    titled.append(("the paper's conclusions: differences in points, ours with 95 % intervals", conclusions(wins)))
    return [(title, pa.Table.from_pylist(rows)) for title, rows in titled]


def _wins(catalog: Catalog, run: str) -> dict[str, dict[str, float]]:
    """Per metric, each held-out prompt's share of wins by the policy that the run ends with: its last round's."""
    name = run.replace("'", "''")
    rows = query(
        catalog,
        "SELECT prompt_id, avg(gold_win) AS gold_win, avg(proxy_win) AS proxy_win FROM outcomes "
        f"JOIN runs USING (stage, key) WHERE run = '{name}' AND round IS NOT DISTINCT FROM "
        f"(SELECT max(round) FROM runs WHERE run = '{name}') GROUP BY prompt_id ORDER BY prompt_id",
    ).to_pylist()
    return {metric: {row["prompt_id"]: row[metric] for row in rows if row[metric] is not None} for metric in METRICS}


def _row(cell: Cell, wins: dict[str, dict[str, float]]) -> dict[str, str]:
    ours = {f"our {metric.partition('_')[0]} %": _interval(list(wins[metric].values())) for metric in METRICS}
    names = {"tldr": "TL;DR", "hh": "HH"}
    theirs = {
        f"paper {names[data]} gold/proxy/AutoSxS": " / ".join(
            "-" if value is None else f"{value:.2f}" for value in (figures[1], figures[0], figures[2])
        )
        for data, figures in cell.paper.items()
    }
    return cell.labels | ours | theirs


def _interval(values: list[float]) -> str:
    """Mean and 95 % percentile bootstrap interval, in percent."""
    if not values:
        return ""
    low, high = bootstrap_interval(np.array(values), RESAMPLES, np.random.default_rng(0))
    return f"{100 * np.mean(values):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def conclusions(wins: Wins) -> list[dict[str, str]]:
    """What the paper concludes, cell by cell, and whether our wins say the same: yes, no, or unclear."""
    made = cells()
    return [row for claim in _content()["claims"] for row in _compared(claim, made, wins)]


def _compared(claim: dict[str, Any], made: list[Cell], wins: Wins) -> list[dict[str, str]]:
    """Each pair of cells that differ in the claim's label alone, on the same prompts."""
    label = next(iter(claim["better"]))
    better = [cell for cell in made if cell.table == claim["table"] and cell.labels[label] == claim["better"][label]]
    rows = []
    for cell in better:
        labels = cell.labels | claim["worse"]
        other = next(each for each in made if each.table == claim["table"] and each.labels == labels)
        rows.append(_difference(claim["claim"], cell, other, label, wins))
    return rows


def _difference(claim: str, cell: Cell, other: Cell, label: str, wins: Wins) -> dict[str, str]:
    what = " ".join(value for name, value in cell.labels.items() if name != label)
    row = {"claim": claim, "for": what}
    for metric, place in METRICS.items():
        ours, theirs = wins[cell.run][metric], wins[other.run][metric]
        gaps = np.array([ours[prompt] - theirs[prompt] for prompt in sorted(ours.keys() & theirs.keys())])
        paper = _gap(cell.paper["tldr"][place], other.paper["tldr"][place])
        row |= _verdict(metric.partition("_")[0], gaps, paper)
    return row


def _gap(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _verdict(name: str, gaps: np.ndarray, paper: float | None) -> dict[str, str]:
    """Ours beside the paper's; a sign is only called one where the interval leaves out zero."""
    if not len(gaps):
        return {name: "", f"paper {name}": "", f"{name} agrees": ""}
    low, high = bootstrap_interval(gaps, RESAMPLES, np.random.default_rng(0))
    clear = low > 0 or high < 0
    agrees = "" if paper is None else "unclear" if not clear else "yes" if (gaps.mean() > 0) == (paper > 0) else "no"
    return {
        name: f"{100 * gaps.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
        f"paper {name}": "-" if paper is None else f"{paper:+.1f}",
        f"{name} agrees": agrees,
    }

"""Tables 1 and 2 of the RSO paper (arXiv 2309.06657) on the user's own configuration, beside the paper's figures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import pyarrow as pa

from jobs.recipes import plan_named
from pipeline.config.plan import Plan, merged_warnings
from pipeline.config.yaml import read_yaml
from pipeline.sql.catalog import open_catalog, query
from pipeline.store.store import Store
from stages.evaluation.evaluate import bootstrap_interval

PAPER_YAML = Path(__file__).parent / "paper.yaml"
AGAINST_TARGETS = Path(__file__).parent / "paper_targets.yaml"
RESAMPLES = 2000
METRICS = {"gold_win": 1, "proxy_win": 0}  # and the index of the paper's figure for it, see paper.yaml
WINS = """
SELECT run, prompt_id, avg(gold_win) AS gold_win, avg(proxy_win) AS proxy_win
FROM outcomes JOIN runs USING (stage, key) JOIN (SELECT run, max(round) AS last FROM runs GROUP BY run) USING (run)
WHERE round IS NOT DISTINCT FROM last
GROUP BY run, prompt_id
ORDER BY prompt_id
"""
# The 8 or 64 of a label are what the paper kept; a config that samples fewer, or rows that are rejected, leave fewer.
# Plain samples are compared without a selection.
SELECTED = """
WITH kept AS (
    SELECT run, stage, key, prompt_id, candidate_id FROM selections JOIN runs USING (stage, key)
    UNION
    SELECT run, stage, key, prompt_id, unnest([left_id, right_id]) FROM comparisons JOIN runs USING (stage, key)
)
SELECT run, max(selected) AS selected
FROM (SELECT run, key, count(*) / count(DISTINCT prompt_id) AS selected FROM kept GROUP BY ALL)
GROUP BY run
"""
Against = Literal["target", "sft"]
Wins = dict[str, dict[str, dict[str, float]]]  # run -> metric -> prompt -> share of wins


@dataclass(frozen=True)
class Cell:
    """Cell of a table: its labels, the recipe that reproduces it, the paper's figures."""

    table: str
    labels: dict[str, str]
    recipe: str
    sets: tuple[str, ...] = ()
    paper: dict[str, list[float | None]] = field(default_factory=dict)  # data set -> proxy, gold, AutoSxS

    @property
    def run(self) -> str:
        """Return the name of the cell's run."""
        return f"paper {' '.join(self.labels.values())}"


def cells() -> list[Cell]:
    """Return every cell of paper.yaml, in order."""
    content = read_yaml(PAPER_YAML, "tables of the paper")
    all_cells = []
    for table in ("table 1", "table 2"):
        for row in content[table]:
            labels = {name: row[name] for name in ("loss", "pairs", "rank") if name in row}
            figures = {name: row[name] for name in ("tldr", "hh") if name in row}
            all_cells.append(Cell(table, labels, row["recipe"], tuple(row.get("set", ())), figures))
    return all_cells


@merged_warnings()
def paper_plans(configs: list[Path], sets: list[str], gamma: float = 1.0, against: Against = "target") -> list[Plan]:
    """Return one plan per cell; equal cells of the two tables have one key, and run once.

    gamma: the paper's factor of the log-ratio in all three pair losses (there 0.05; 1 suits the demo). Without a
    reference, max(0, 1 - gamma h) is gamma times the hinge with the margin 1 / gamma. against: whose responses the win
    rates compare with, the data's target texts as in the paper, or draws of the SFT policy.
    """
    objectives = {
        "sigmoid-norm": f"{{name: sigmoid_norm, beta: {gamma}}}",
        "hinge": f"{{name: hinge, delta: {1 / gamma}}}",
        "hinge-norm": f"{{name: hinge_norm, gamma: {gamma}}}",
    }
    if against == "target":
        configs = [*configs, AGAINST_TARGETS]
    plans = []
    for cell in cells():
        objective = objectives.get(cell.labels.get("loss", "sigmoid-norm"))
        chosen = [f"optimize.objective={objective}"] if objective else []
        # RAFT and ReST have the likelihood as their loss, whatever --set says of that of pairs.
        others = [text for text in sets if objective or not text.startswith("optimize.objective")]
        alone = "evaluations=[]"  # at temperature 1
        plans.append(plan_named(cell.recipe, configs, [*chosen, *cell.sets, alone, *others], cell.run))
    return plans


def tables(store: Store, runs: Mapping[str, str] = MappingProxyType({})) -> list[tuple[str, pa.Table]]:
    """Return both tables with 95 % intervals over prompts, and the paper's conclusions beside what was measured.

    runs: by the names of cells' runs, the runs that are read in their place.
    """
    catalog, all_cells = open_catalog(store), cells()
    cell_runs = {runs.get(cell.run, cell.run): cell.run for cell in all_cells}

    # Each held-out prompt's share of wins by the policy that the run ends with: its last round's.
    wins: Wins = {cell.run: {metric: {} for metric in METRICS} for cell in all_cells}
    for row in query(catalog, WINS).to_pylist():
        for metric in METRICS:
            if row["run"] in cell_runs and row[metric] is not None:
                wins[cell_runs[row["run"]]][metric][row["prompt_id"]] = row[metric]

    selected = {
        cell_runs[row["run"]]: f"{row['selected']:.1f}"
        for row in query(catalog, SELECTED).to_pylist()
        if row["run"] in cell_runs
    }

    rows_by_table: dict[str, list[dict[str, str]]] = {"table 1": [], "table 2": []}
    for cell in all_cells:
        row = cell.labels | {"our selected per prompt": selected.get(cell.run, "")}
        for metric in METRICS:
            values = list(wins[cell.run][metric].values())
            interval = "{:.1f} [{:.1f}, {:.1f}]".format(*_mean_and_interval(values)) if values else ""
            row[f"our {metric.removesuffix('_win')} %"] = interval
        for data, title in (("tldr", "TL;DR"), ("hh", "HH")):
            if data in cell.paper:
                proxy, gold, autosxs = cell.paper[data]
                figures = ("-" if value is None else f"{value:.2f}" for value in (gold, proxy, autosxs))
                row[f"paper {title} gold/proxy/AutoSxS"] = " / ".join(figures)
        rows_by_table[cell.table].append(row)

    titled = [(f"{table} of arXiv 2309.06657", rows) for table, rows in rows_by_table.items()]
    about = "the paper's conclusions: differences in points, ours of one seed with 95 % intervals over prompts"
    titled.append((about, conclusions(wins)))
    return [(title, pa.Table.from_pylist(rows)) for title, rows in titled]


def conclusions(wins: Wins) -> list[dict[str, str]]:
    """Return the paper's conclusions, cell by cell, and whether our wins agree: yes, no, or unclear.

    Each conclusion compares cells that differ in one label alone, on the prompts that both have. A difference is
    unclear where its interval contains zero.
    """
    all_cells = cells()
    rows = []
    for claim in read_yaml(PAPER_YAML, "tables of the paper")["claims"]:
        ((label, value),) = claim["better"].items()
        for cell in all_cells:
            if cell.table != claim["table"] or cell.labels[label] != value:
                continue
            other_labels = cell.labels | claim["worse"]
            other = next(other for other in all_cells if (other.table, other.labels) == (cell.table, other_labels))
            row = {"claim": claim["claim"], "for": " ".join(v for name, v in cell.labels.items() if name != label)}
            for metric, index in METRICS.items():
                name = metric.removesuffix("_win")
                ours, theirs = wins[cell.run][metric], wins[other.run][metric]
                differences = [ours[prompt] - theirs[prompt] for prompt in sorted(ours.keys() & theirs.keys())]
                if not differences:
                    row |= {name: "", f"paper {name}": "", f"{name} agrees": ""}
                    continue
                mean, low, high = _mean_and_interval(differences)
                row[name] = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
                better, worse = cell.paper["tldr"][index], other.paper["tldr"][index]
                if better is None or worse is None:
                    row |= {f"paper {name}": "-", f"{name} agrees": ""}
                    continue
                row[f"paper {name}"] = f"{better - worse:+.1f}"
                same_sign = (mean > 0) == (better > worse)
                row[f"{name} agrees"] = "unclear" if low <= 0 <= high else "yes" if same_sign else "no"
            rows.append(row)
    return rows


def _mean_and_interval(shares: list[float]) -> tuple[float, float, float]:
    """Return the mean in points of a hundred, and the ends of its 95 % interval over prompts."""
    values = np.array(shares)
    low, high = bootstrap_interval(values, RESAMPLES, np.random.default_rng(0))
    return 100 * float(values.mean()), 100 * low, 100 * high

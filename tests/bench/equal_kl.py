"""Compare RSO with plain sampling by gold at equal KL: on the demo, several seeds, one grid for both.

Each policy of RSO is compared at its own KL with the curve of plain sampling through its trainings of several lengths,
seed by seed: between two of them every prompt's value is interpolated linearly in the root of KL. Beyond the ends of a
curve nothing is compared.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.evidence.figures import Point
from jobs.evidence.measure import PlannedPoint, curves_by_seed, mean_and_interval
from jobs.methods import values_by_key
from jobs.recipes import plan_named
from pipeline.config.plan import Plan
from pipeline.execution.executor import LocalExecutor
from pipeline.execution.run import run
from pipeline.execution.schedule import Reporter
from pipeline.sql.catalog import Catalog, open_catalog
from pipeline.store.store import Store
from tests.bench.page import commit, facts, written

SHARED = ("evaluations=[]", "eval_sample.n=2", "eval_baseline.n=2", "examples.imitate=chosen")
RECIPES = {"rso": "rso", "plain": "sft_sample_rank"}
METHOD = """\
Policies of the demo (`winnow demo`) at temperature 1 against the SFT policy's responses to its 205 held-out prompts,
two draws each. `gamma` is optimize.objective.beta, `anchor` optimize.nll_weight with `examples.imitate: chosen`,
`beta` select.rule.beta. A seed is optimize.seed, that of the training: all seeds have the candidates of one `sample`.
Win rates are in percent, intervals of 95 %, over seeds and prompts (jobs/methods.py), of one seed over prompts. At
equal KL: each policy of RSO at its own KL against the curve of plain sampling through its trainings of several
lengths, seed by seed, interpolated linearly in the root of KL between two neighbours and nowhere else; the interval
is of the differences, paired by seed and prompt. Every setting that was tried is in the first table."""


@dataclass(frozen=True)
class Setting:
    """Method with an anchor, gamma and beta; and how many seeds of which number of epochs."""

    method: str
    gamma: float
    anchor: float
    beta: float
    seeds_by_epochs: tuple[tuple[int, int], ...]  # (epochs, seeds)

    @property
    def name(self) -> str:
        beta = f", beta {self.beta:g}" if self.method == "rso" else ""
        return f"{self.method}, gamma {self.gamma:g}, anchor {self.anchor:g}{beta}"


SETTINGS = (
    Setting("rso", 1.0, 1.0, 0.5, ((1, 1), (2, 1))),
    Setting("rso", 0.2, 1.0, 0.5, ((1, 2), (2, 2))),
    Setting("rso", 0.2, 1.0, 2.0, ((2, 1),)),
    Setting("rso", 0.2, 3.0, 0.5, ((1, 5), (2, 5))),
    Setting("plain", 1.0, 1.0, 0.5, ((1, 1), (2, 1), (4, 1))),
    Setting("plain", 0.2, 1.0, 0.5, ((2, 2), (4, 5), (8, 5))),
    Setting("plain", 0.2, 3.0, 0.5, ((4, 1), (8, 1))),
)


def plans_of(setting: Setting, epochs: int, seeds: int, config: Path) -> list[Plan]:
    """Return a plan for each seed of a setting's training of so many epochs."""
    sets = [*SHARED, f"optimize.nll_weight={setting.anchor}", f"optimize.objective.beta={setting.gamma}",
            f"optimize.epochs={epochs}"]  # fmt: skip
    sets += [f"select.rule.beta={setting.beta}"] if setting.method == "rso" else []
    return [
        plan_named(RECIPES[setting.method], [config], [*sets, f"optimize.seed={seed}"],
                   f"equal-kl {setting.name}, {epochs} epochs seed={seed}")
        for seed in range(seeds)
    ]  # fmt: skip


def measure(config: Path, store: Store, reporter: Reporter, finished_only: bool) -> dict[str, pa.Table]:
    """Return the policies, and the differences at equal KL, after running what the store lacks."""
    planned: dict[str, dict[int, list[Plan]]] = {}
    for setting in SETTINGS:
        by_epochs = planned.setdefault(setting.name, {})
        for epochs, seeds in setting.seeds_by_epochs:
            by_epochs[epochs] = plans_of(setting, epochs, seeds, config)
    if not finished_only:
        for plan in (plan for by_epochs in planned.values() for plans in by_epochs.values() for plan in plans):
            run(plan, store, LocalExecutor(), reporter)
    catalog = open_catalog(store)
    return {
        "Policies": _policies(planned, catalog),
        "RSO minus plain sampling at equal KL": _at_equal_kl(planned, catalog),
        "RSO minus plain sampling, policy by policy": _by_policy(planned, catalog),
    }


def _policies(planned: dict[str, dict[int, list[Plan]]], catalog: Catalog) -> pa.Table:
    rows, finished = [], _finished(catalog)
    for name, by_epochs in planned.items():
        for epochs, all_plans in by_epochs.items():
            plans = [plan for plan in all_plans if plan.target.key in finished]
            if not plans:
                continue
            values = values_by_key(catalog, [plan.target.key for plan in plans])
            row: dict[str, Any] = {"setting": name, "epochs": epochs, "seeds": len(plans)}
            for metric, title, factor, digits in (
                ("gold_win", "gold win %", 100, 1), ("proxy_win", "proxy win %", 100, 1),
                ("gold", "gold reward", 1, 2), ("kl", "KL (nats)", 1, 2),
            ):  # fmt: skip
                ends = mean_and_interval(np.stack([values[plan.target.key][metric] for plan in plans]))
                row[title] = "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*(factor * end for end in ends), d=digits)
            rows.append(row)
    return pa.Table.from_pylist(rows)


def _at_equal_kl(planned: dict[str, dict[int, list[Plan]]], catalog: Catalog) -> pa.Table:
    rows, finished = [], _finished(catalog)
    for rso, of_rso in ((name, plans) for name, plans in planned.items() if name.startswith("rso")):
        for plain, of_plain in ((name, plans) for name, plans in planned.items() if name.startswith("plain")):
            points = [PlannedPoint(Point(plain, str(n), n, "sft_sample_rank"), plans) for n, plans in of_plain.items()]
            curves = curves_by_seed(points, catalog)
            for epochs, plans in of_rso.items():
                keys = {
                    n: plan.target.key for n, plan in enumerate(plans) if plan.target.key in finished and n in curves
                }
                values = values_by_key(catalog, list(keys.values())) if keys else {}
                differences: dict[str, list[Any]] = {"gold_win": [], "gold": []}
                kls, outside = [], 0
                for seed, key in keys.items():
                    of_plan, curve = values[key], curves[seed]
                    kl = float(np.nanmean(of_plan["kl"]))
                    if not curve.distances[0] <= kl**0.5 <= curve.distances[-1]:
                        outside += 1
                        continue
                    kls.append(kl)
                    for metric, listed in differences.items():
                        listed.append(of_plan[metric] - curve.at(metric, kl**0.5))
                if not kls:
                    continue
                row: dict[str, Any] = {"RSO": f"{rso}, {epochs} epochs", "plain sampling": plain, "seeds": len(kls)}
                row |= {"KL (nats)": f"{min(kls):.2f} to {max(kls):.2f}", "seeds outside the curve": outside}
                for metric, title, factor, digits in (("gold_win", "gold win, points", 100, 1),
                                                      ("gold", "gold reward", 1, 2)):  # fmt: skip
                    ends = mean_and_interval(np.stack(differences[metric]))
                    row[title] = "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*(factor * end for end in ends), d=digits)
                rows.append(row)
    return pa.Table.from_pylist(rows)


def _by_policy(planned: dict[str, dict[int, list[Plan]]], catalog: Catalog) -> pa.Table:
    """Return the differences in gold and in KL of policies that have two seeds or more in common."""
    rows, finished = [], _finished(catalog)
    policies = [(name, n, plans) for name, by_epochs in planned.items() for n, plans in by_epochs.items()]
    for rso, epochs, of_rso in policies:
        for plain, other_epochs, of_plain in policies:
            pairs = [(a.target.key, b.target.key) for a, b in zip(of_rso, of_plain, strict=False)]
            pairs = [pair for pair in pairs if finished.issuperset(pair)]
            if not rso.startswith("rso") or not plain.startswith("plain") or len(pairs) < 2:
                continue
            values = values_by_key(catalog, [key for pair in pairs for key in pair])
            row: dict[str, Any] = {
                "RSO": f"{rso}, {epochs} epochs",
                "plain sampling": f"{plain}, {other_epochs} epochs",
            }
            row["seeds"] = len(pairs)
            for metric, title, factor, digits in (
                ("gold_win", "gold win, points", 100, 1), ("gold", "gold reward", 1, 2), ("kl", "KL (nats)", 1, 2),
            ):  # fmt: skip
                ends = mean_and_interval(np.stack([values[a][metric] - values[b][metric] for a, b in pairs]))
                row[title] = "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*(factor * end for end in ends), d=digits)
            rows.append(row)
    return pa.Table.from_pylist(rows)


def _finished(catalog: Catalog) -> set[str]:
    return {manifest["key"] for manifest in catalog.manifests}


def page(tables: dict[str, pa.Table]) -> str:
    """Return the tables as a Markdown page."""
    return written("RSO and plain sampling at equal KL", facts(commit(), ["torch"]), METHOD, tables)

"""Room 3, several rankers at once: their rewards in one weighted sum, a scalarised multi-objective reward."""

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline import InputStep, StageContext, stage
from schemas import Rewards
from schemas.tables import REWARDS
from stages.data.rows import Row


def _weights_name_the_inputs(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    weights = options["weights"]
    problems = [f"{name} is wired and has no weight; set `weights.{name}`" for name in wired if name not in weights]
    problems += [f"weights.{name}: no such input is wired; wired: {', '.join(wired)}" for name in weights
                 if name not in wired]  # fmt: skip
    problems += [f"weights.{name}: must be finite (got {value})" for name, value in weights.items()
                 if not math.isfinite(value)]  # fmt: skip
    return problems


@stage(version=1, check=_weights_name_the_inputs)
def combine(
    first: Rewards,
    ctx: StageContext,
    second: Rewards | None = None,
    third: Rewards | None = None,
    fourth: Rewards | None = None,
    *,
    weights: dict[str, float],
) -> Rewards:
    """reward = sum of weights[input] * reward from that input; each addend's reward stays in `components`.

    Rewards come in units of their own ranker, so a weight is also an exchange rate. A candidate that one of
    the inputs lacks, or whose sum is not finite, is left out.
    """
    inputs = dict(first=first, second=second, third=third, fourth=fourth)
    parts = {name: _by_candidate(table) for name, table in inputs.items() if table is not None}
    rows: list[Row] = []
    for prompt, candidate in sorted(set().union(*parts.values())):
        ids = dict(prompt=prompt, candidate=candidate)
        found = {name: part[prompt, candidate] for name, part in parts.items() if (prompt, candidate) in part}
        total = sum(weights[name] * value for name, value in found.items())
        if missing := [name for name in parts if name not in found]:
            ctx.reject("no reward from every ranker", place="rewards", detail=f"none from {', '.join(missing)}", **ids)
        elif not math.isfinite(total):
            ctx.reject("reward is not finite", place="rewards", detail=str(found), **ids)
        else:
            row = dict(prompt_id=prompt, candidate_id=candidate, reward=total)
            rows.append(row | dict(components=list(found.items())))
    return pa.Table.from_pylist(rows, schema=REWARDS)


def _by_candidate(table: pa.Table) -> dict[tuple[str, str], float]:
    columns = (table.column(name).to_pylist() for name in ("prompt_id", "candidate_id", "reward"))
    return {(prompt, candidate): reward for prompt, candidate, reward in zip(*columns, strict=True)}

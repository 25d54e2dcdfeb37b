"""Stage `combine`: rewards of several rankers in one weighted sum, a scalarised multi-objective reward."""

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline import InputStep, StageContext, stage
from schemas import Rewards
from schemas.tables import REWARDS
from stages.data.rows import Row, reject_not_finite


def _check_weights(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return problems at plan time: a weight without its input, or the reverse, would change the reward silently."""
    weights = options["weights"]
    problems = [f"input `{name}` has no weight: set `weights.{name}`" for name in inputs if name not in weights]
    for name, weight in weights.items():
        if name not in inputs:
            problems.append(f"weights.{name}: no such input under `from`, which has {', '.join(inputs)}")
        if not math.isfinite(weight):
            problems.append(f"weights.{name}: must be finite (got {weight})")
    return problems


@stage(version=1, check=_check_weights)
def combine(
    first: Rewards,
    ctx: StageContext,
    second: Rewards | None = None,
    third: Rewards | None = None,
    fourth: Rewards | None = None,
    *,
    weights: dict[str, float],
) -> Rewards:
    """Compute reward = sum of weights[input] * reward from that input, and list the addends in `components`.

    Each ranker has its own unit of reward, so a weight is also an exchange rate. A candidate that one of the inputs
    lacks, or whose sum is not finite, is rejected.
    """
    inputs = {"first": first, "second": second, "third": third, "fourth": fourth}
    rewards_by_input = {
        name: {(row["prompt_id"], row["candidate_id"]): row["reward"] for row in table.to_pylist()}
        for name, table in inputs.items()
        if table is not None
    }
    rows: list[Row] = []
    for key in sorted(set().union(*rewards_by_input.values())):
        addends = {name: rewards[key] for name, rewards in rewards_by_input.items() if key in rewards}
        if missing := [name for name in rewards_by_input if name not in addends]:
            detail = f"none from {', '.join(missing)}"
            ctx.reject("no reward from every ranker", place="rewards", prompt=key[0], candidate=key[1], detail=detail)
            continue
        total = sum(weights[name] * value for name, value in addends.items())
        row = dict(prompt_id=key[0], candidate_id=key[1], reward=total)
        rows.append(row | dict(components=list(addends.items())))
    return reject_not_finite(pa.Table.from_pylist(rows, schema=REWARDS), "reward", ctx, place="rewards")

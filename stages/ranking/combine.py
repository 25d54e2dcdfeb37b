"""Stage `combine`: rewards of several rankers in one weighted sum, a scalarised multi-objective reward."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import Columns, InputStep, StageContext, stage
from schemas import Rewards
from schemas.tables import REWARDS
from stages.data.rows import column_of, numbers_of, positions_of, reject_not_finite

REWARD_COLUMNS = Columns("prompt_id", "candidate_id", "reward")


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


@stage(version=1, check=_check_weights, by_prompt=lambda options: True)
def combine(
    first: Annotated[Rewards, REWARD_COLUMNS],
    ctx: StageContext,
    second: Annotated[Rewards, REWARD_COLUMNS] | None = None,
    third: Annotated[Rewards, REWARD_COLUMNS] | None = None,
    fourth: Annotated[Rewards, REWARD_COLUMNS] | None = None,
    *,
    weights: dict[str, float],
) -> Rewards:
    """Compute reward = sum of weights[input] * reward from that input, and list the addends in `components`.

    Each ranker has its own unit of reward, so a weight is also an exchange rate. A candidate that one of the inputs
    lacks, or whose sum is not finite, is rejected.
    """
    inputs = {
        name: table
        for name, table in (("first", first), ("second", second), ("third", third), ("fourth", fourth))
        if table is not None
    }
    # The key of a row is prompt and candidate in one text: no id has a NUL, so that keys are in the order of both.
    keys = {
        name: pc.binary_join_element_wise(column_of(table, "prompt_id"), column_of(table, "candidate_id"), "\0")
        for name, table in inputs.items()
    }
    all_keys = pc.unique(pa.concat_arrays(list(keys.values())))
    if not pc.all(pc.less(all_keys[:-1], all_keys[1:])).as_py():
        all_keys = all_keys.take(pc.sort_indices(all_keys))
    positions = {name: positions_of(all_keys, pa.chunked_array([key])) for name, key in keys.items()}
    parts = pc.list_flatten(pc.split_pattern(all_keys, "\0"))
    ids = {
        name: parts.take(pa.array(np.arange(n, len(parts), 2))) for n, name in enumerate(("prompt_id", "candidate_id"))
    }

    # Reject candidates that one of the inputs lacks.
    lacking = {name: position < 0 for name, position in positions.items()}
    is_lacking = np.logical_or.reduce(list(lacking.values()))
    rejected = {name: column.filter(pa.array(is_lacking)) for name, column in ids.items()}
    details = [
        f"none from {', '.join(name for name in inputs if lacking[name][n])}" for n in np.flatnonzero(is_lacking)
    ]
    ctx.reject_rows(
        rejected["prompt_id"],
        candidates=rejected["candidate_id"],
        reason="no reward from every ranker",
        place="rewards",
        detail=details,
    )

    # Add up, from the first input on, as components lists the addends.
    is_complete = ~is_lacking
    rewards = {name: numbers_of(inputs[name], "reward")[position[is_complete]] for name, position in positions.items()}
    size = int(is_complete.sum())
    total = np.zeros(size)
    with np.errstate(over="ignore", invalid="ignore"):  # sums that are not finite are rejected
        for name, values in rewards.items():
            total = total + weights[name] * values
    names = pa.array(list(inputs) * size, pa.string())
    addends = pa.array(np.stack(list(rewards.values()), axis=1).ravel())
    columns = {
        **{name: column.filter(pa.array(is_complete)) for name, column in ids.items()},
        "reward": pa.array(total),
        "components": pa.MapArray.from_arrays(np.arange(size + 1, dtype=np.int32) * len(inputs), names, addends),
    }
    arrays = [columns.get(field.name, pa.nulls(size, field.type)) for field in REWARDS]
    return reject_not_finite(pa.Table.from_arrays(arrays, schema=REWARDS), "reward", ctx, place="rewards")

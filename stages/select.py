"""Room 4: which candidates follow the estimated optimal policy."""

from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import Range, Workspace, stage
from schemas import Rewards, Selections, seed_for
from schemas.tables import SELECTIONS


@stage(version=1)
def select(
    rewards: Rewards,
    ws: Workspace,
    *,
    k: Annotated[int, Range(gt=0)] = 8,
    beta: Annotated[float, Range(ge=0)] = 0.5,
    seed: int = 0,
) -> Selections:
    """Keep k candidates a prompt (all, where there are fewer) by statistical rejection sampling.

    beta = 0 keeps the k best (ties at random), beta = infinity any k: the exact limits. A reward that is
    not finite is left out.
    """
    from stages.rejection import rejection_sample, tilt

    rows = _finite(rewards, ws).sort_by([("prompt_id", "ascending"), ("candidate_id", "ascending")])
    prompts, starts = _groups(rows)
    seeds = np.array([seed_for(seed, "select", prompt) for prompt in prompts], dtype=np.uint64)
    values = rows.column("reward").to_numpy()
    chosen, rounds = rejection_sample(values, starts, seeds, k, beta)
    acceptance, ess = tilt(values, starts, beta)
    group, draw = np.nonzero(chosen >= 0)
    index = chosen[group, draw]
    taken = rows.select(["prompt_id", "candidate_id", "reward"]).take(pa.array(index))
    columns = {
        "draw": draw.astype(np.int32),
        "round": rounds[group, draw],
        "acceptance": acceptance[group],
        "ess": ess[group],
    }
    for name, column in columns.items():
        taken = taken.append_column(name, pa.array(column))
    return taken.select(SELECTIONS.names)


def _finite(rewards: pa.Table, ws: Workspace) -> pa.Table:
    good = pc.is_finite(rewards.column("reward"))
    for row in rewards.filter(pc.invert(good)).to_pylist():
        ids = {"prompt": row["prompt_id"], "candidate": row["candidate_id"]}
        ws.reject("reward is not finite", place="rewards", detail=str(row["reward"]), **ids)
    return rewards.filter(good).combine_chunks()


def _groups(rows: pa.Table) -> tuple[list[str], np.ndarray]:
    """Prompt ids in order, and where each one's rows start (one more entry marks the end)."""
    runs = pc.run_end_encode(rows.column("prompt_id").combine_chunks())
    ends = np.asarray(runs.run_ends, dtype=np.int64)
    return runs.values.to_pylist(), np.concatenate([np.zeros(1, dtype=np.int64), ends])

"""Room 3: a reward for every candidate, from n - 1 comparisons a prompt."""

from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline import Workspace, stage
from schemas import Candidates, Model, Prompts, Rewards, seed_for
from schemas.tables import REWARDS
from stages.groups import by_prompt, texts_of

BUDGET = 16_384  # padded tokens a forward pass


@stage(version=1)
def reward(
    prompts: Prompts,
    candidates: Candidates,
    ranker: Model,
    ws: Workspace,
    *,
    orders: Literal["one", "both"] = "both",
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
) -> Rewards:
    """r(y) = logit P(y beats y_b), y_b a random candidate of the same prompt (sec. 3.2.1 of arXiv:2309.06657).

    The baseline is read first, so that prompt and baseline go through the network once for all
    comparisons. `both` also reads each pair the other way round and averages the logits.
    """
    from stages.rankers import PairwiseRanker, both_orders

    judge = ws.hold(PairwiseRanker, ranker, dtype, BUDGET)
    contexts = texts_of(prompts, "prompt_id")
    rows: list[dict[str, Any]] = []
    for prompt, group in by_prompt(candidates):
        base = group[seed_for(seed, "baseline", prompt) % len(group)]
        others = _readable(judge, contexts[prompt], base, group, ws)
        forward, backward = both_orders(judge, contexts[prompt], [(base["text"], y["text"]) for y in others], orders)
        ws.count(ranker_calls=len(others))
        rows += _rows(prompt, base, others, -forward, -backward)
    return pa.Table.from_pylist(rows, schema=REWARDS)


def _readable(judge: Any, context: str, base: Any, group: list[Any], ws: Workspace) -> list[Any]:
    """All but the baseline, less those that make a comparison longer than the ranker takes."""
    fitting = []
    for candidate in group:
        if candidate is base:
            continue
        if judge.fits(context, base["text"], candidate["text"]):
            fitting.append(candidate)
        else:
            name = candidate["candidate_id"]
            ws.reject("comparison too long", place="candidates", prompt=base["prompt_id"], candidate=name)
    return fitting


def _rows(prompt: str, base: Any, others: list[Any], ab: np.ndarray, ba: np.ndarray) -> list[dict[str, Any]]:
    """The baseline has reward 0: it beats itself half of the time."""
    mean = np.where(np.isnan(ba), ab, (ab + ba) / 2)
    names = {"prompt_id": prompt, "baseline_id": base["candidate_id"]}
    rows = [names | {"candidate_id": base["candidate_id"], "reward": 0.0, "logit_ab": None, "logit_ba": None}]
    for n, candidate in enumerate(others):
        scores = {"reward": float(mean[n]), "logit_ab": float(ab[n]), "logit_ba": _number(ba[n])}
        rows.append(names | {"candidate_id": candidate["candidate_id"]} | scores)
    return sorted(rows, key=lambda row: row["candidate_id"])


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)

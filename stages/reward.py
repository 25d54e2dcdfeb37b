"""Room 3: a reward for every candidate, from n - 1 comparisons a prompt."""

from typing import Annotated, Literal

import numpy as np
import pyarrow as pa

from pipeline import Bound, Workspace, stage
from schemas import Candidates, Model, Prompts, Rewards, seed_for
from schemas.tables import REWARDS
from stages.groups import Row, by_prompt, texts_of
from stages.rankers import Ranker, averaged, both_orders, open_ranker, reads_its_model
from stages.rankers import ranker as rankers


@stage(version=1, check=reads_its_model)
def reward(
    prompts: Prompts,
    candidates: Candidates,
    ws: Workspace,
    ranker: Model | None = None,
    *,
    by: Annotated[Bound, rankers] = "pairwise",  # type: ignore[assignment]
    orders: Literal["one", "both"] = "both",
    seed: int = 0,
) -> Rewards:
    """r(y) = logit P(y beats y_b), y_b a random candidate of the same prompt (sec. 3.2.1 of arXiv:2309.06657).

    The baseline is read first, so that prompt and baseline go through the network once for all
    comparisons. `both` also reads each pair the other way round and averages the logits, where the ranker
    has an opinion on positions. A reward that is not finite is left out.
    """
    judge = ws.hold(open_ranker, by, ranker)
    contexts = texts_of(prompts, "prompt_id")
    rows: list[Row] = []
    for prompt, group in by_prompt(candidates):
        base = group[seed_for(seed, "baseline", prompt) % len(group)]
        others = _readable(judge, contexts[prompt], base, group, ws)
        forward, backward = both_orders(judge, contexts[prompt], [(base["text"], y["text"]) for y in others], orders)
        ws.count(ranker_calls=len(others))
        columns = {
            "reward": -averaged(forward, backward),
            "logit_ab": None if judge.symmetric else -forward,
            "logit_ba": None if backward is None else -backward,
        }
        rows += _rows(base, others, columns, ws)
    return pa.Table.from_pylist(rows, schema=REWARDS)


def _readable(judge: Ranker, context: str, base: Row, group: list[Row], ws: Workspace) -> list[Row]:
    """All but the baseline, less those that make a comparison that the ranker cannot read."""
    fitting = []
    for candidate in group:
        if candidate is base:
            continue
        if judge.fits(context, base["text"], candidate["text"]):
            fitting.append(candidate)
        else:
            name = candidate["candidate_id"]
            ws.reject("does not fit the ranker", place="candidates", prompt=base["prompt_id"], candidate=name)
    return fitting


def _rows(base: Row, others: list[Row], columns: dict[str, np.ndarray | None], ws: Workspace) -> list[Row]:
    """The baseline has reward 0: it beats itself half of the time."""
    names = {"prompt_id": base["prompt_id"], "baseline_id": base["candidate_id"]}
    rows: list[Row] = [names | {"candidate_id": base["candidate_id"], "reward": 0.0}]
    for n, candidate in enumerate(others):
        # + 0.0: no -0.0 in a table
        scores = {name: None if column is None else float(column[n]) + 0.0 for name, column in columns.items()}
        row = names | {"candidate_id": candidate["candidate_id"]} | scores
        if np.isfinite(row["reward"]):
            rows.append(row)
        else:
            ids = dict(prompt=base["prompt_id"], candidate=candidate["candidate_id"])
            ws.reject("reward is not finite", place="candidates", detail=str(row["reward"]), **ids)
    return sorted(rows, key=lambda row: str(row["candidate_id"]))

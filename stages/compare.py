"""Room 3 again, for the few that were kept: the ranker on pairs of them."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline import Workspace, stage
from schemas import Candidates, Comparisons, Model, Prompts, Selections
from schemas.tables import COMPARISONS
from stages.groups import by_prompt, texts_of
from stages.reward import BUDGET

Pair = tuple[str, str]
Prefer = Callable[[list[Pair]], list[float]]


@stage(version=1)
def compare(
    prompts: Prompts,
    candidates: Candidates,
    selections: Selections,
    ranker: Model,
    ws: Workspace,
    *,
    rule: Literal["first_round", "tournament"] = "first_round",
    orders: Literal["one", "both"] = "both",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Comparisons:
    """first_round: k/2 comparisons of neighbours in the (random) order of acceptance. tournament: knock-out, k - 1.

    Both from sec. 3.2.2 of arXiv:2309.06657 and from SLiC-HF, arXiv:2305.10425.
    """
    from stages.rankers import PairwiseRanker, both_orders

    judge = ws.hold(PairwiseRanker, ranker, dtype, BUDGET)
    contexts, texts = texts_of(prompts, "prompt_id"), texts_of(candidates, "candidate_id")
    rows: list[dict[str, Any]] = []
    for prompt, group in by_prompt(selections):

        def prefer(pairs: list[Pair], prompt: str = prompt) -> list[float]:
            read = [(texts[left], texts[right]) for left, right in pairs]
            forward, backward = both_orders(judge, contexts[prompt], read, orders)
            ws.count(ranker_calls=len(pairs))
            return list(np.where(np.isnan(backward), forward, (forward + backward) / 2))

        players = [row["candidate_id"] for row in sorted(group, key=lambda row: row["draw"])]
        players = _readable(judge, contexts[prompt], players, texts, prompt, ws)
        rounds = knock_out(players, prefer, most=1 if rule == "first_round" else None)
        rows += [dict(prompt_id=prompt) | match for match in rounds]
    return pa.Table.from_pylist(rows, schema=COMPARISONS)


def _readable(
    judge: Any, context: str, players: list[str], texts: dict[str, str], prompt: str, ws: Workspace
) -> list[str]:
    """Those that the ranker can read beside the longest of them; the others are left out."""
    fitting = list(players)
    while len(fitting) > 1:
        longest, next_one = sorted(fitting, key=lambda name: (-len(texts[name]), name))[:2]
        if judge.fits(context, texts[longest], texts[next_one]):
            break
        fitting.remove(longest)
        ws.reject("comparison too long", place="selections", prompt=prompt, candidate=longest)
    return fitting


def knock_out(players: list[str], prefer: Prefer, most: int | None = None) -> Iterator[dict[str, Any]]:
    """Rounds of neighbours, winners go on, the odd one has a bye; `prefer` gives logit P(left beats right)."""
    turn = 0
    while len(players) > 1 and (most is None or turn < most):
        pairs = list(zip(players[0::2], players[1::2], strict=False))
        scores = prefer(pairs)
        for (left, right), score in zip(pairs, scores, strict=True):
            yield dict(left_id=left, right_id=right, logit=float(score), round=turn)
        winners = [left if score >= 0 else right for (left, right), score in zip(pairs, scores, strict=True)]
        players = winners + players[2 * len(pairs) :]
        turn += 1

"""Room 3 again, for the few that were kept: the ranker on pairs of them."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import combinations
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa

from pipeline import Bound, InputStep, StageContext, stage
from schemas import Candidates, Comparisons, Model, Prompts, Selections
from schemas.tables import COMPARISONS
from stages.data.rows import Row, by_prompt, texts_of
from stages.ranking.rankers import Ranker, averaged, both_orders, open_ranker, reads_its_model
from stages.ranking.rankers import ranker as rankers

Pair = tuple[str, str]
Prefer = Callable[[list[Pair]], list[float]]


def _has_two_to_compare(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    problems = reads_its_model(options, wired)
    rule = wired["selections"].options.get("rule") if "selections" in wired else None
    if isinstance(rule, Bound) and rule.options.get("k") == 1:
        problems.append(f"selections by {rule.name} keep one candidate a prompt, and it takes two; raise its `rule.k`")
    return problems


@stage(version=3, check=_has_two_to_compare)
def compare(
    prompts: Prompts,
    candidates: Candidates,
    ctx: StageContext,
    selections: Selections | None = None,
    ranker: Model | None = None,
    *,
    rule: Literal["first_round", "tournament", "all_pairs"] = "first_round",
    by: Annotated[Bound, rankers] = "pairwise",  # type: ignore[assignment]
    orders: Literal["one", "both"] = "both",
) -> Comparisons:
    """first_round: k/2 comparisons of neighbours in the (random) order of acceptance. tournament: knock-out, k - 1.

    Both from sec. 3.2.2 of arXiv:2309.06657 and from SLiC-HF, arXiv:2305.10425. all_pairs: k (k - 1) / 2, as
    `score` likes them. Without selections, all candidates in the order in which they were drawn. Left out, with
    reason: a prompt that has one candidate, or one alone that the ranker can read.
    """
    judge = ctx.hold(open_ranker, by, ranker)
    contexts, texts = texts_of(prompts, "prompt_id"), texts_of(candidates, "candidate_id")
    table, order = (candidates, "k") if selections is None else (selections, "draw")
    rows: list[Row] = []
    for prompt, group in by_prompt(table):

        def prefer(pairs: list[Pair], prompt: str = prompt) -> list[float]:
            read = [(texts[left], texts[right]) for left, right in pairs]
            ctx.count(ranker_calls=len(pairs))
            return list(averaged(*both_orders(judge, contexts[prompt], read, orders)))

        players = [row["candidate_id"] for row in sorted(group, key=lambda row: row[order])]
        players = _readable(judge, contexts[prompt], players, texts, prompt, ctx)
        if len(players) < 2:
            ctx.reject("one candidate", place=rule, prompt=prompt, detail=f"of {len(group)}")
        rows += _finite(prompt, RULES[rule](players, prefer), ctx)
    return pa.Table.from_pylist(rows, schema=COMPARISONS)


def _readable(
    judge: Ranker, context: str, players: list[str], texts: dict[str, str], prompt: str, ctx: StageContext
) -> list[str]:
    """Those that the ranker can read beside the longest of them; the others are left out."""
    fitting = list(players)
    while len(fitting) > 1:
        longest, next_one = sorted(fitting, key=lambda name: (-len(texts[name]), name))[:2]
        if judge.fits(context, texts[longest], texts[next_one]):
            break
        fitting.remove(longest)
        ctx.reject("does not fit the ranker", place="selections", prompt=prompt, candidate=longest)
    return fitting


def _finite(prompt: str, matches: Iterator[dict[str, Any]], ctx: StageContext) -> Iterator[Row]:
    for match in matches:
        if np.isfinite(match["logit"]):
            yield dict(prompt_id=prompt) | match
        else:
            ids = dict(prompt=prompt, candidate=match["left_id"], detail=match["right_id"])
            ctx.reject("logit is not finite", place=f"round={match['round']}", **ids)


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


def round_robin(players: list[str], prefer: Prefer) -> Iterator[dict[str, Any]]:
    """Everyone against everyone, once."""
    pairs = list(combinations(players, 2))
    for (left, right), score in zip(pairs, prefer(pairs), strict=True):
        yield dict(left_id=left, right_id=right, logit=float(score), round=0)


RULES: dict[str, Callable[[list[str], Prefer], Iterator[dict[str, Any]]]] = {
    "first_round": partial(knock_out, most=1),
    "tournament": knock_out,
    "all_pairs": round_robin,
}

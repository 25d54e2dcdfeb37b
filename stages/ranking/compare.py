"""Stage `compare`: logits of the ranker on pairs of a prompt's candidates, mostly of the few that were selected."""

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from math import inf, isnan, nan
from typing import Annotated, Any, Literal

import pyarrow as pa

from pipeline import Bound, InputStep, StageContext, stage
from pipeline.costs import Cost
from schemas import Candidates, Comparisons, Model, Prompts, Selections
from schemas.tables import COMPARISONS
from stages.data.rows import Row, RowsById, reject_not_finite, rows_by_prompt
from stages.ranking.base import Unreadable, both_orders, fits_or_reject, read_candidates, reads_per_pair
from stages.ranking.memory import less_memory, ranker_device_problem, ranker_need
from stages.ranking.rankers import open_ranker, ranker_for, reads_its_model
from stages.ranking.rankers import ranker as rankers
from stages.work import calls

IdPair = tuple[str, str]
Prefer = Callable[[list[IdPair]], list[float]]


def _check_compare(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    problems = reads_its_model(options, inputs)
    rule = inputs["selections"].options.get("rule") if "selections" in inputs else None
    if isinstance(rule, Bound) and rule.options.get("k") == 1:
        problems.append(
            f"selections by {rule.name} keep one candidate per prompt, and a comparison needs two: raise its `rule.k`"
        )
    return problems


@stage(
    version=6,
    check=_check_compare,
    given_by={"ranker": "by"},
    choose=ranker_for,
    cost=Cost(ranker_need, less_memory, calls, ranker_device_problem),
)
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
    special_tokens: bool = False,
) -> Comparisons:
    """Compare k/2 pairs of neighbours (first_round), k - 1 (tournament: knock-out) or k (k - 1) / 2 (all_pairs).

    Neighbours in the (random) order of acceptance, or of drawing for all candidates if there are no selections.
    The first two are from sec. 3.2.2 of arXiv:2309.06657 and from SLiC-HF, arXiv:2305.10425; all_pairs suits `score`.
    With `special_tokens`, text is read with the special tokens inside it. Rejected are a prompt with one candidate, or
    with only one that the ranker can read, the last of an odd number in first_round, which has no neighbour, and a
    comparison of two that do not fit the ranker together, or on which it has no verdict.
    """
    opened = ctx.open_once(open_ranker, by, ranker)
    prompt_by_id = RowsById((row["prompt_id"], row) for row in prompts.to_pylist())
    candidate_by_id = RowsById((row["candidate_id"], row) for row in candidates.to_pylist())
    table, order = (candidates, "k") if selections is None else (selections, "draw")
    rows: list[Row] = []
    for prompt, group in rows_by_prompt(table):
        context = prompt_by_id[prompt]["text"]
        responses = [candidate_by_id[row["candidate_id"]] for row in group]
        readings = read_candidates(opened, prompt_by_id[prompt], responses, special_tokens)

        # Candidates that fit the ranker: mostly every two do once the two longest do. Unreadable ones go first.
        lengths = {
            row["candidate_id"]: inf if isinstance(readings[row["candidate_id"]], Unreadable) else len(row["text"])
            for row in responses
        }
        players = [row["candidate_id"] for row in sorted(group, key=lambda row: row[order])]
        while len(players) > 1:
            longest, second = sorted(players, key=lambda player: (-lengths[player], player))[:2]
            ids = dict(place="selections", prompt=prompt, candidate=longest)
            if fits_or_reject(opened, context, (readings[longest], readings[second]), ctx, **ids):
                break
            players.remove(longest)
        if len(players) < 2:
            ctx.reject("one candidate", place=rule, prompt=prompt, detail=f"of {len(group)}")
        elif rule == "first_round" and len(players) % 2:
            ctx.reject(
                "no neighbour", place=rule, prompt=prompt, candidate=players[-1], detail=f"last of {len(players)}"
            )

        unfit: set[IdPair] = set()  # texts can have fewer characters than others, and more tokens

        def prefer(
            pairs: list[IdPair],
            context: str = context,
            readings: dict[str, Any] = readings,
            unfit: set[IdPair] = unfit,
        ) -> list[float]:
            unfit |= {pair for pair in pairs if not opened.fits(context, *(readings[name] for name in pair))}
            fitting = [pair for pair in pairs if pair not in unfit]
            ctx.count(ranker_calls=len(fitting) * reads_per_pair(opened, orders))
            mean, *_ = both_orders(
                opened, context, [(readings[left], readings[right]) for left, right in fitting], orders
            )
            logits = dict(zip(fitting, mean.tolist(), strict=True))
            return [logits.get(pair, nan) for pair in pairs]

        for match in matches_of(rule, players, prefer):
            if (match["left_id"], match["right_id"]) in unfit:
                ids = dict(place=rule, prompt=prompt, candidate=match["left_id"])
                ctx.reject(Unreadable.reason, detail=match["right_id"], **ids)
            elif opened.abstains and isnan(match["logit"]):
                ids = dict(place=rule, prompt=prompt, candidate=match["left_id"])
                ctx.reject("no verdict", detail=match["right_id"], **ids)
            else:
                rows.append(dict(prompt_id=prompt) | match)
    opened.finish_part(ctx)
    table = pa.Table.from_pylist(rows, schema=COMPARISONS)
    return reject_not_finite(table, "logit", ctx, place="comparisons", candidate="left_id")


def matches_of(rule: str, players: list[str], prefer: Prefer) -> Iterator[Row]:
    """Yield the matches of one prompt's candidates, without `prompt_id`.

    In a tournament winners advance (without a verdict, nan, the left one), and an odd last player has a bye, after
    which it is the first: at the end, it would have another in the next round, and be in the final of five by byes
    alone. first_round is its first round.
    prefer: logits P(left beats right) of the pairs of a tournament round.
    """
    tournament_round = 0
    while len(players) > 1:
        neighbours = zip(players[0::2], players[1::2], strict=False)
        pairs = list(combinations(players, 2) if rule == "all_pairs" else neighbours)
        logits = prefer(pairs)
        for (left, right), logit in zip(pairs, logits, strict=True):
            yield dict(left_id=left, right_id=right, logit=logit, round=tournament_round)
        if rule != "tournament":
            break
        winners = [right if logit < 0 else left for (left, right), logit in zip(pairs, logits, strict=True)]
        players = players[2 * len(pairs) :] + winners
        tournament_round += 1

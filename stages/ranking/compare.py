"""Stage `compare`: logits of the ranker on pairs of a prompt's candidates, mostly of the few that were selected."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from math import inf, isnan, nan
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import Bound, InputStep, StageContext, stage
from schemas import Candidates, Comparisons, Model, Prompts, Selections
from schemas.tables import COMPARISONS
from stages.data.rows import Row, RowsById, reject_not_finite, rows_by_prompt
from stages.ranking.base import (
    NO_VERDICT,
    Ranker,
    Reading,
    ReadingPair,
    Unreadable,
    both_orders,
    prepared_batches,
    read_candidates,
    reading_problem,
    reads_per_pair,
    warn_of_part,
)
from stages.ranking.memory import ranker_cost
from stages.ranking.rankers import open_ranker, ranker_for, reads_its_model
from stages.ranking.rankers import ranker as rankers
from stages.work import calls

IdPair = tuple[str, str]
Rounds = Generator[list[IdPair], list[float], list[Row]]  # pairs of a round, their logits, all matches


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
    cost=ranker_cost(calls),
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

    def prepare(item: tuple[str, list[Row]]) -> Bracket:
        """Return the players of a prompt, and the matches of their first round."""
        prompt, group = item
        context = prompt_by_id[prompt]["text"]
        responses = [candidate_by_id[row["candidate_id"]] for row in group]
        readings = read_candidates(opened, prompt_by_id[prompt], responses, special_tokens)

        # Candidates that fit the ranker: mostly every two do once the two longest do. Unreadable ones go first.
        lengths = {
            row["candidate_id"]: inf if isinstance(readings[row["candidate_id"]], Unreadable) else len(row["text"])
            for row in responses
        }
        players = [row["candidate_id"] for row in sorted(group, key=lambda row: row[order])]
        rejects = []
        while len(players) > 1:
            longest, second = sorted(players, key=lambda player: (-lengths[player], player))[:2]
            problem = reading_problem(opened, context, (readings[longest], readings[second]))
            if problem is None:
                break
            detail = problem.detail if isinstance(readings[longest], Unreadable) else f"together with {second}"
            rejects.append(dict(reason=problem.reason, place="selections", candidate=longest, detail=detail))
            players.remove(longest)
        if len(players) < 2:
            rejects.append(dict(reason="one candidate", place=rule, detail=f"of {len(group)}"))
        elif rule == "first_round" and len(players) % 2:
            detail = f"last of {len(players)}"
            rejects.append(dict(reason="no neighbour", place=rule, candidate=players[-1], detail=detail))
        bracket = Bracket(prompt, context, readings, rejects, matches_of(rule, players))
        bracket.advance(opened, None)
        return bracket

    rows: list[Row] = []
    n_matches = 0
    for batch in prepared_batches(opened, rows_by_prompt(table), prepare):
        # A round of each prompt's matches at a time.
        while running := [bracket for bracket in batch if bracket.pairs is not None]:
            questions = [(bracket.context, bracket.fitting_readings()) for bracket in running]
            ctx.count(ranker_calls=sum(len(pairs) for _, pairs in questions) * reads_per_pair(opened, orders))
            for bracket, (mean, *_) in zip(running, both_orders(opened, questions, orders), strict=True):
                bracket.advance(opened, mean.tolist())

        for bracket in batch:
            for reject in bracket.rejects:
                ctx.reject(prompt=bracket.prompt, **reject)
            n_matches += len(bracket.matches)
            for match in bracket.matches:
                ids = dict(place=rule, prompt=bracket.prompt, candidate=match["left_id"], detail=match["right_id"])
                if problem := bracket.unfit.get((match["left_id"], match["right_id"])):
                    ctx.reject(problem.reason, **ids)
                elif opened.abstains and isnan(match["logit"]):
                    ctx.reject(NO_VERDICT, **ids)
                else:
                    rows.append(dict(prompt_id=bracket.prompt) | match)
    opened.finish_part(ctx)
    comparisons = pa.Table.from_pylist(rows, schema=COMPARISONS)
    comparisons = reject_not_finite(comparisons, "logit", ctx, place="comparisons", candidate="left_id")
    players = candidates.filter(pc.is_in(candidates["candidate_id"], table["candidate_id"].combine_chunks()))
    warn_of_part("compare", ctx, opened, players, n_matches)
    return comparisons


@dataclass
class Bracket:
    """Matches of a prompt's candidates: those of one round are asked about, and their logits give the next."""

    prompt: str
    context: str
    readings: dict[str, Reading | Unreadable]
    rejects: list[dict[str, str]]
    rounds: Rounds
    pairs: list[IdPair] | None = None  # of this round; None after the last
    # Texts can have fewer characters than others, and more tokens.
    unfit: dict[IdPair, Unreadable] = field(default_factory=dict)
    matches: list[Row] = field(default_factory=list)  # of all rounds, once there is none left

    def fitting_readings(self) -> list[ReadingPair]:
        """Return the readings of this round's pairs that fit the ranker."""
        pairs = [pair for pair in self.pairs or [] if pair not in self.unfit]
        return [(self.readings[first], self.readings[second]) for first, second in pairs]

    def advance(self, ranker: Ranker, logits: list[float] | None) -> None:
        """Go to the next round, from the logits of this round's pairs that fit; None: to the first."""
        try:
            if logits is None:
                self.pairs = next(self.rounds)
            else:
                fitting = iter(logits)
                by_pair = [nan if pair in self.unfit else next(fitting) for pair in self.pairs or []]
                self.pairs = self.rounds.send(by_pair)
        except StopIteration as end:
            self.pairs, self.matches = None, end.value
            return
        for first, second in self.pairs:
            if problem := reading_problem(ranker, self.context, (self.readings[first], self.readings[second])):
                self.unfit[first, second] = problem


def matches_of(rule: str, players: list[str]) -> Rounds:
    """Yield the pairs of a round of one prompt's candidates, and take their logits P(left beats right); return rows.

    These are the matches, without `prompt_id`. In a tournament winners advance (without a verdict, nan, the left one),
    and an odd last player has a bye, after which it is the first: at the end, it would have another in the next round,
    and be in the final of five by byes alone. first_round is its first round.
    """
    matches: list[Row] = []
    tournament_round = 0
    while len(players) > 1:
        neighbours = zip(players[0::2], players[1::2], strict=False)
        pairs = list(combinations(players, 2) if rule == "all_pairs" else neighbours)
        logits = yield pairs
        for (first, second), logit in zip(pairs, logits, strict=True):
            matches.append(dict(left_id=first, right_id=second, logit=logit, round=tournament_round))
        if rule != "tournament":
            break
        winners = [second if logit < 0 else first for (first, second), logit in zip(pairs, logits, strict=True)]
        players = players[2 * len(pairs) :] + winners
        tournament_round += 1
    return matches

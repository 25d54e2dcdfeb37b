"""Stage `judge`: a policy's held-out responses against the baseline policy's, by the proxy ranker."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from math import isnan
from typing import Annotated, Literal

import pyarrow as pa

from pipeline import Bound, StageContext, stage
from schemas import Candidates, Judgements, Model, Prompts
from schemas.tables import JUDGEMENTS
from stages.data.rows import Row, RowsById, reject_not_finite, rows_by_prompt
from stages.ranking.base import (
    TOO_LONG,
    Ranker,
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
from stages.work import judging_work

Matches = Literal["all", "same_k", "other_k"]
Unread = dict[str, tuple[str, str, str]]  # by candidate id: whose response it is, the reason and a detail
Met = tuple[Row, ReadingPair]  # a judgement whose logit is the ranker's on the pair
UNREAD_WINS = {"candidate": 0.0, "baseline": 1.0, "both": None}  # by whose response the ranker could not read


@stage(
    version=7,
    check=reads_its_model,
    given_by={"ranker": "by"},
    choose=ranker_for,
    cost=ranker_cost(judging_work),
)
def judge(
    prompts: Prompts,
    candidates: Candidates,
    baseline: Candidates,
    ctx: StageContext,
    ranker: Model | None = None,
    *,
    by: Annotated[Bound, rankers] = "pairwise",  # type: ignore[assignment]
    matches: Matches = "all",
    special_tokens: bool = False,
) -> Judgements:
    """Compute logit P(candidate beats a baseline response to the same prompt), both orders averaged.

    matches: every response against every one of the baseline, a U-statistic of both samples, with the smallest standard
    error that unbiased use of the draws has (Hoeffding 1948), or only against the one with the same k, which asks the
    ranker less often by the number of draws, or against all but that one (other_k), for draws of two policies with the
    same seeds, which are no independent draws where k is the same. With `special_tokens`, text is read with the special
    tokens inside it. The logit is null where the ranker has no verdict, which is neither a win nor a tie, and where it
    cannot read a response: `unread` then says whose; of two that do not fit its context together, the longer, or both
    if their lengths are equal or there is another reason. A reward model reads each response alone, and both are unread
    where neither fits, which is no verdict. The table `rejects` has each such response once, with the reason.
    """
    opened = ctx.open_once(open_ranker, by, ranker)
    rows = [
        row
        for *_, judgements in judged_prompts(opened, prompts, candidates, baseline, ctx, matches, special_tokens)
        for row in judgements
    ]
    return finished_judgements("judge", opened, rows, (candidates, baseline), ctx)


def judged_prompts(
    ranker: Ranker,
    prompts: pa.Table,
    candidates: pa.Table,
    baseline: pa.Table,
    ctx: StageContext,
    matches: Matches,
    special_tokens: bool,
) -> Iterator[tuple[list[Row], list[Row], list[Row]]]:
    """Yield the candidates, the baseline responses and the rows of `judgements` of each prompt; reject and count."""
    prompt_by_id = RowsById((row["prompt_id"], row) for row in prompts.to_pylist())
    baseline_by_prompt = dict(rows_by_prompt(baseline))
    groups = [(prompt, group, baseline_by_prompt.get(prompt, [])) for prompt, group in rows_by_prompt(candidates)]
    matched = [(prompt_by_id[prompt], group, opponents) for prompt, group, opponents in groups]
    judged = judge_prompts(ranker, matched, matches, special_tokens)
    for (prompt, group, opponents), (judgements, calls, unread) in zip(groups, judged, strict=True):
        if not opponents:
            ctx.reject("no baseline response", place="baseline", prompt=prompt, detail=f"{len(group)} responses")
        ctx.count(ranker_calls=calls)
        for name, (table, reason, detail) in unread.items():
            ctx.reject(reason, place=table, prompt=prompt, candidate=name, detail=detail)
        yield group, opponents, judgements


def finished_judgements(
    stage: str, ranker: Ranker, rows: list[Row], sides: tuple[pa.Table, pa.Table], ctx: StageContext
) -> pa.Table:
    """Return the table of a part's judgements, without those that are not finite, once the ranker has ended it.

    sides: the part's candidates, and their baseline.
    """
    ctx.count(unread_responses=sum(row["unread"] is not None for row in rows))
    ranker.finish_part(ctx)
    judgements = reject_not_finite(pa.Table.from_pylist(rows, schema=JUDGEMENTS), "logit", ctx, place="judgements")
    responses = pa.concat_tables([side.select(["candidate_id", "finish_reason"]) for side in sides])
    warn_of_part(stage, ctx, ranker, responses, len(rows))
    return judgements


def judge_prompts(
    ranker: Ranker,
    prompts: Iterable[tuple[Row, Sequence[Row], Sequence[Row]]],
    matches: Matches = "all",
    special_tokens: bool = False,
) -> Iterator[tuple[list[Row], int, Unread]]:
    """Judge each match of a prompt's candidates with its baseline; the ranker is asked about many prompts in one call.

    prompts: each with its candidates and its baseline. Yields, of each, the rows of `judgements`, how often the ranker
    read, and the responses that it could not read.
    """

    def prepare(item: tuple[Row, Sequence[Row], Sequence[Row]]) -> tuple[str, list[Row], list[Met], Unread]:
        """Return the text of a prompt, its judgements, those that the ranker can read, and what it cannot read."""
        prompt, candidates, baseline = item
        readings, opponent_readings = (
            read_candidates(ranker, prompt, side, special_tokens) for side in (candidates, baseline)
        )
        unread = {
            name: (table, reading.reason, reading.detail)
            for table, side in (("candidates", readings), ("baseline", opponent_readings))
            for name, reading in side.items()
            if isinstance(reading, Unreadable)
        }
        rows: list[Row] = []
        met: list[Met] = []
        for row, opponent in product(candidates, baseline):
            if matches != "all" and (row["k"] == opponent["k"]) != (matches == "same_k"):
                continue
            pair = (readings[row["candidate_id"]], opponent_readings[opponent["candidate_id"]])
            judgement = dict(prompt_id=prompt["prompt_id"], k=row["k"], candidate_id=row["candidate_id"])
            judgement |= dict(baseline_id=opponent["candidate_id"], logit=None, unread=None)
            rows.append(judgement)
            are_unread = [isinstance(reading, Unreadable) for reading in pair]
            if any(are_unread):
                judgement["unread"] = "both" if all(are_unread) else "baseline" if are_unread[1] else "candidate"
            elif problem := reading_problem(ranker, prompt["text"], pair):
                # Of two that are too long together, the longer; what the template refuses is the fault of neither.
                length, other = (row["n_tokens"], opponent["n_tokens"]) if problem.reason == TOO_LONG else (0, 0)
                judgement["unread"] = "both" if length == other else "baseline" if other > length else "candidate"
                ids = row["candidate_id"], opponent["candidate_id"]
                if length >= other:  # once, however many it does not fit with
                    unread.setdefault(ids[0], ("candidates", problem.reason, f"together with {ids[1]}"))
                if other >= length:
                    unread.setdefault(ids[1], ("baseline", problem.reason, f"together with {ids[0]}"))
            else:
                met.append((judgement, pair))
        return prompt["text"], rows, met, unread

    for batch in prepared_batches(ranker, prompts, prepare):
        answers = both_orders(ranker, [(context, [pair for _, pair in met]) for context, _, met, _ in batch], "both")
        for (_, rows, met, unread), (logits, *_) in zip(batch, answers, strict=True):
            for (judgement, _), logit in zip(met, logits.tolist(), strict=True):
                judgement["logit"] = None if ranker.abstains and isnan(logit) else logit
            yield rows, len(met) * reads_per_pair(ranker, "both"), unread


def win_of(judgement: Row) -> float | None:
    """Return 1 for a win, 0 for a loss, 1/2 for a tie; None without a verdict.

    A response that the ranker could not read loses to one that it could; of two, there is no verdict.
    """
    if judgement["unread"]:
        return UNREAD_WINS[judgement["unread"]]
    return None if judgement["logit"] is None else win_score(judgement["logit"])


def win_score(margin: float) -> float:
    """Return 1 for a margin above 0, 0 for one below, 1/2 for a tie."""
    return 0.5 if margin == 0 else float(margin > 0)

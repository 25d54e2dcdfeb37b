"""Stage `reward`: a reward for every candidate, from n - 1 comparisons per prompt, or from a score of its own."""

import warnings
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa

from pipeline import Bound, StageContext, stage
from schemas import Candidates, Model, Prompts, Rewards, WinnowWarning, seed_for
from schemas.tables import REWARDS
from stages.data.rows import Row, RowsById, label_threshold, reject_not_finite, rows_by_prompt
from stages.options import Seed
from stages.ranking.base import (
    NO_VERDICT,
    ReadingPair,
    Scorer,
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
from stages.work import ranking_work


@dataclass
class Compared:
    """Candidates of a prompt as the ranker is asked about them: a pair of readings for each of `rows`.

    A pair is of the baseline and the candidate; without a baseline, of the candidate twice. `unfit` are those that the
    ranker cannot read, each with the reason.
    """

    prompt: str
    context: str
    baseline: Row | None
    rows: list[Row] = field(default_factory=list)
    pairs: list[ReadingPair] = field(default_factory=list)
    unfit: list[tuple[Row, Unreadable]] = field(default_factory=list)


@stage(
    version=4,
    check=reads_its_model,
    given_by={"ranker": "by"},
    choose=ranker_for,
    cost=ranker_cost(ranking_work),
)
def reward(
    prompts: Prompts,
    candidates: Candidates,
    ctx: StageContext,
    ranker: Model | None = None,
    *,
    by: Annotated[Bound, rankers] = "pairwise",  # type: ignore[assignment]
    orders: Literal["one", "both"] = "both",
    special_tokens: bool = False,
    seed: Seed = 0,
) -> Rewards:
    """Compute r(y) = logit P(y beats y_b), y_b a random candidate of the prompt (sec. 3.2.1 of arXiv:2309.06657).

    The baseline y_b is one that the ranker can read, and is read first, so that prompt and baseline go through the
    network once for all comparisons.
    `both` also reads each pair in the other order and averages the logits, if the ranker can have a position bias.
    A reward model or a program scores each candidate alone: that score is the reward, and there is no baseline.
    Scores of a program of yours that are all 0 or 1 (-1 or 1) are warned of if it has no `label_threshold`, which says
    that they are labels.
    With `special_tokens`, text is read with the special tokens inside it (`</think>`, where it is one), without the
    one that ends it. Rejected are a reward that is not finite, a response that the ranker cannot read, and a comparison
    on which it has no verdict; more than 5 % of a part's responses are warned of, with the reason and its cure.
    """
    opened = ctx.open_once(open_ranker, by, ranker)
    prompt_by_id = RowsById((row["prompt_id"], row) for row in prompts.to_pylist())

    def prepare(item: tuple[str, list[Row]]) -> Compared:
        """Return what the ranker is asked about a prompt's candidates."""
        prompt, group = item
        context = prompt_by_id[prompt]["text"]
        readings = read_candidates(opened, prompt_by_id[prompt], group, special_tokens)
        # By hash, so that neither the other prompts of the shard nor their order move the baseline.
        readable = [row for row in group if not isinstance(readings[row["candidate_id"]], Unreadable)]
        baseline = None
        if readable and not isinstance(opened, Scorer):
            baseline = readable[seed_for(seed, "baseline", prompt) % len(readable)]
        compared = Compared(prompt, context, baseline)
        for row in group:
            pair = (readings[(baseline or row)["candidate_id"]], readings[row["candidate_id"]])
            if row is baseline:
                continue
            if problem := reading_problem(opened, context, pair):
                if baseline is not None and not isinstance(pair[1], Unreadable):
                    problem = replace(problem, detail=f"together with {baseline['candidate_id']}")
                compared.unfit.append((row, problem))
            else:
                compared.rows.append(row)
                compared.pairs.append(pair)
        return compared

    rows: list[Row] = []
    for batch in prepared_batches(opened, rows_by_prompt(candidates), prepare):
        # Of each prompt, columns of numbers, one per row of `compared.rows`.
        if isinstance(opened, Scorer):
            scored = opened.scores([(item.context, [reading for _, reading in item.pairs]) for item in batch])
            ctx.count(ranker_calls=sum(map(len, scored)))  # equal texts, or ids if it reads these, are one call
            columns_by_prompt = [
                {"reward": np.array([scores[reading] for _, reading in item.pairs])}
                for item, scores in zip(batch, scored, strict=True)
            ]
        else:
            answers = both_orders(opened, [(item.context, item.pairs) for item in batch], orders)
            ctx.count(ranker_calls=sum(len(item.pairs) for item in batch) * reads_per_pair(opened, orders))
            columns_by_prompt = []
            for mean, forward, backward in answers:
                columns = {"reward": -mean}
                if not opened.symmetric:
                    columns["logit_ab"] = -forward
                if backward is not None:
                    columns["logit_ba"] = -backward
                columns_by_prompt.append(columns)

        for item, columns in zip(batch, columns_by_prompt, strict=True):
            for row, problem in item.unfit:
                ids = dict(place="candidates", prompt=item.prompt, candidate=row["candidate_id"])
                ctx.reject(problem.reason, detail=problem.detail, **ids)
            rewarded: list[Row] = []
            if item.baseline is not None:  # it beats itself half of the time
                rewarded.append(dict(candidate_id=item.baseline["candidate_id"], reward=0.0))
            for n, row in enumerate(item.rows):
                if opened.abstains and np.isnan(columns["reward"][n]):
                    ctx.reject(NO_VERDICT, place="candidates", prompt=item.prompt, candidate=row["candidate_id"])
                    continue
                # + 0.0: no -0.0 in a table
                numbers = {name: float(column[n]) + 0.0 for name, column in columns.items()}
                rewarded.append(dict(candidate_id=row["candidate_id"]) | numbers)
            ids = dict(
                prompt_id=item.prompt,
                label_threshold=by.metadata.get("label_threshold"),
                baseline_id=None if item.baseline is None else item.baseline["candidate_id"],
            )
            rows += [ids | row for row in sorted(rewarded, key=lambda row: row["candidate_id"])]
    opened.finish_part(ctx)
    rewards = reject_not_finite(pa.Table.from_pylist(rows, schema=REWARDS), "reward", ctx, place="candidates")
    warn_of_part("reward", ctx, opened, candidates)
    if by.metadata.get("program") and by.entry.plugin_file and "label_threshold" not in by.metadata:
        # Ours declare it; of a user's program nothing but its scores shows that they are labels.
        threshold = label_threshold(rewards["reward"].to_pylist())
        if threshold is not None:
            where = "beside `file` and `function`" if by.entry.from_file else "as an argument of its decorator"
            warnings.warn(
                f"reward: all scores that {by.name} gave in a part are {'0 or 1' if threshold else '-1 or 1'}. If they "
                f"are labels, wrong and right, set label_threshold to {threshold:g} {where}: without it, a rule that "
                "keeps a prompt's best responses keeps wrong ones of a prompt that has no right one",
                WinnowWarning,
                stacklevel=2,
            )
    return rewards

"""Stage `evaluate`: win rates with intervals, KL and length; and the gold reward, which no other stage may read."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NotRequired

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import Bound, Registry, StageContext, stage
from pipeline.registry import entry_of
from schemas import (
    Candidates,
    Evaluations,
    Judgements,
    Outcomes,
    Prompts,
    Reference,
    WinnowError,
    WinnowWarning,
)
from schemas.tables import EVALUATIONS, OUTCOMES
from stages.data.rows import Row, column_by_id, fields_of, rows_by_prompt, text_by_id
from stages.evaluation.length_control import Match, length_controlled
from stages.options import Seed, SmallCount
from stages.ranking.base import candidate_text
from stages.ranking.judge import win_of, win_score
from stages.ranking.rankers import FIELDS, PROGRAM, check_fields, fields_problems, plain_arguments
from stages.ranking.verifiers import code_tests, instruction_share, instructions, json_schema, math_answer
from stages.results import number


def plain_gold(fn: Callable[..., Any], options: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return arguments and metadata of a function in a user's file, which is a gold reward as it is."""
    arguments = plain_arguments(fn)
    return arguments, {"reads_fields": arguments == FIELDS}


gold_reward = Registry(
    "gold reward",
    *PROGRAM,
    plain=plain_gold,
    reads_fields=NotRequired[bool],
    columns=NotRequired[tuple[str, ...]],
    check=NotRequired[Callable[..., Any]],
    requires=NotRequired[str],
)
for program in (code_tests, instruction_share, instructions, json_schema, math_answer):
    entry = entry_of(program, "ranker")
    shared = {name: entry.metadata[name] for name in ("columns", "check", "requires") if name in entry.metadata}
    gold_reward(arguments=FIELDS, reads_fields=True, version=entry.version, **shared)(program)

WIDE = 0.1  # half of a 95 % interval of a win rate: wider, it tells few methods apart
ENOUGH = math.ceil((1.96 * 0.5 / WIDE) ** 2)  # prompts, each won or lost, of which a rate of one half has that interval
RESAMPLED_VALUES = 1 << 20  # drawn at once for a bootstrap interval: 8 MiB
MANY_UNREAD = 0.2  # share of comparisons that have a response that the ranker cannot read
METRICS = (
    "proxy_win",
    "gold_win",
    "gold",
    "gold_baseline",
    "kl",
    "n_tokens",
    "proxy_verdicts",
    "proxy_unread",
    "gold_gain",
)


@stage(
    version=5,
    unsharded=True,
    check=lambda options, inputs: fields_problems(options["gold"], inputs, "gold") if options["gold"] else [],
)
def evaluate(
    prompts: Prompts,
    candidates: Candidates,
    baseline: Candidates,
    judgements: Judgements,
    ctx: StageContext,
    policy_logp: Reference | None = None,
    baseline_logp: Reference | None = None,
    *,
    gold: Annotated[Bound, gold_reward] | None = None,
    special_tokens: bool = False,
    resamples: SmallCount = 2000,
    seed: Seed = 0,
) -> tuple[Outcomes, Evaluations]:
    """Compare a policy with the baseline: wins of every response against every one of the baseline, log-ratio, length.

    All responses count, whether or not the ranker was asked about them. A tie counts one half. A response that the
    ranker could not read loses to one that it could; `proxy_unread` is the share of comparisons with such a response,
    of which more than 20 % are warned of. A comparison without a verdict, as one of two that it could not read, does
    not count in `proxy_win`; `proxy_verdicts` is the share of comparisons in which the ranker has one. With
    `special_tokens`, the gold reward reads those inside a response.
    Per policy: means over prompts with 95 % percentile bootstrap intervals over prompts. `proxy_win_lc` and
    `gold_win_lc` are win rates at equal length, by the logistic model of AlpacaEval 2; `gold_gain` is the difference of
    the gold rewards of policy and baseline, paired by prompt. Fewer than 97 prompts are warned of.
    The mean of log p - log p_baseline estimates KL without bias only where p is the distribution of the draws: that
    of the policy, as `policy_logp` scored it (logp_kind exact), or of the policy with a head, recorded at the draw
    (steered, for which `policy_logp` is not read). It is null otherwise; of responses cut at max_tokens, it is of the
    cut ones. A gold reward that is no finite number ends the stage. Prompts by whose columns it can score no response
    are rejected, and count in all but gold.
    """
    prompt_texts = text_by_id(prompts, "prompt_id")
    fields = {row["prompt_id"]: fields_of(row) for row in prompts.to_pylist()}
    logp_kinds = candidates.column("logp_kind").unique().to_pylist()
    draw_logp = {"exact": policy_logp, "steered": candidates}.get(logp_kinds[0]) if len(logp_kinds) == 1 else None
    policy_scores, baseline_scores = (
        {} if table is None else column_by_id(table, "candidate_id", "logp") for table in (draw_logp, baseline_logp)
    )

    def gold_of(gold: Bound, row: Row) -> float:
        return score_by_gold(gold, prompt_texts[row["prompt_id"]], fields[row["prompt_id"]], row, special_tokens)

    # Prompts that the gold reward can score by the columns that were kept.
    scorable = set(prompt_texts)
    for name in sorted(set(candidates.column("prompt_id").to_pylist())):
        try:
            if gold is not None:
                check_fields(gold, fields[name])
        except ValueError as error:
            ctx.reject(f"no gold: {error}", place="prompts", prompt=name)
            scorable.discard(name)

    judgements_by_candidate = group_by_candidate("evaluate", judgements, candidates, baseline)
    baseline_by_prompt = dict(rows_by_prompt(baseline))
    baseline_length = column_by_id(baseline, "candidate_id", "n_tokens")
    baseline_gold = {
        row["candidate_id"]: gold_of(gold, row)
        for row in baseline.to_pylist()
        if gold is not None and row["prompt_id"] in scorable
    }
    outcomes = []
    matches: dict[str, list[Match]] = {"proxy_win": [], "gold_win": []}
    for row in (row for _, group in rows_by_prompt(candidates) for row in group):
        name, judged = row["candidate_id"], judgements_by_candidate.get(row["candidate_id"], [])
        wins = {match["baseline_id"]: win for match in judged if (win := win_of(match)) is not None}
        outcome = dict(prompt_id=row["prompt_id"], k=row["k"], candidate_id=name, n_tokens=row["n_tokens"])
        outcome["proxy_verdicts"] = _mean(match["logit"] is not None for match in judged)
        outcome["proxy_unread"] = _mean(match["unread"] is not None for match in judged)
        gold_wins = {}
        if gold is not None and row["prompt_id"] in scorable:
            outcome["gold"] = gold_of(gold, row)
            golds = {
                opponent["candidate_id"]: baseline_gold[opponent["candidate_id"]]
                for opponent in baseline_by_prompt.get(row["prompt_id"], [])
            }
            outcome["gold_baseline"] = _mean(golds.values())
            outcome["gold_gain"] = outcome["gold"] - outcome["gold_baseline"] if golds else None
            gold_wins = {opponent: win_score(outcome["gold"] - value) for opponent, value in golds.items()}
        for metric, by_opponent in (("proxy_win", wins), ("gold_win", gold_wins)):
            outcome[metric] = _mean(by_opponent.values())
            matches[metric] += [
                Match(row["prompt_id"], win, row["n_tokens"] - baseline_length[opponent])
                for opponent, win in by_opponent.items()
            ]
        if name in policy_scores and name in baseline_scores:
            outcome["kl"] = float(policy_scores[name] - baseline_scores[name])
        outcomes.append(outcome)

    # Average per prompt first, so that prompts with more responses do not weigh more. In one thread and in the order of
    # prompt ids: the bits of a mean depend on the order of its sum, and the bootstrap on that of the prompts.
    measured = pa.schema([(name, pa.float64()) for name in ("proxy_verdicts", "proxy_unread", "gold_gain")])
    table = pa.Table.from_pylist(outcomes, pa.schema([*OUTCOMES, *measured]))
    by_prompt = table.group_by("prompt_id", use_threads=False).aggregate([(metric, "mean") for metric in METRICS])
    by_prompt, rng = by_prompt.sort_by("prompt_id"), np.random.default_rng(seed)
    if 0 < (n := by_prompt.num_rows) < ENOUGH:
        warnings.warn(
            f"evaluate: {n} held-out prompts are few: the 95 % interval of a win rate may reach "
            f"±{98 / math.sqrt(n):.0f} points; {ENOUGH} make it ±{100 * WIDE:.0f}: raise `heldout` of `prompts`, or "
            "bring more prompts",
            WinnowWarning,
            stacklevel=2,
        )
    unread = _mean(value for value in by_prompt.column("proxy_unread_mean").to_pylist() if value is not None)
    if unread is not None and unread > MANY_UNREAD:
        warnings.warn(
            f"evaluate: {100 * unread:.0f} % of the comparisons have a response that the ranker cannot read, and say "
            "more of that than of which is better (`proxy_unread`): `winnow sql rejects` has the reasons that "
            "`judge` gave, such as a context that is too short (lower `max_tokens` of `sample`) or a special token in "
            "the text",
            WinnowWarning,
            stacklevel=2,
        )
    evaluations = []
    for metric in METRICS:
        means = by_prompt.column(f"{metric}_mean").drop_null().to_numpy()
        if len(means):
            low, high = bootstrap_interval(means, resamples, rng)
            row = {"metric": metric, "value": float(means.mean()), "low": low, "high": high, "n": len(means)}
            evaluations.append(row)
    for metric, met in matches.items():
        if met:
            value, (low, high) = length_controlled(met, resamples, rng)
            n = len({match.prompt for match in met})
            evaluations.append({"metric": f"{metric}_lc", "value": value, "low": low, "high": high, "n": n})
    return table.select(OUTCOMES.names), pa.Table.from_pylist(evaluations, EVALUATIONS)


def group_by_candidate(
    stage: str, judgements: pa.Table, candidates: pa.Table, baseline: pa.Table
) -> dict[str, list[Row]]:
    """Return the judgements of each candidate by its id; raise WinnowError if a table lacks a response of theirs."""
    groups: dict[str, list[Row]] = {}
    for row in judgements.to_pylist():
        groups.setdefault(row["candidate_id"], []).append(row)
    opponents = dict.fromkeys(row["baseline_id"] for rows in groups.values() for row in rows)
    for name, table, judged in (("candidates", candidates, groups), ("baseline", baseline, opponents)):
        available = set(table.column("candidate_id").to_pylist())
        if lacking := [response for response in judged if response not in available]:
            raise WinnowError(
                f"{stage}: judgements of {len(lacking):,} responses that `{name}` lacks, such as {lacking[0]}; give it "
                f"the step of `{name}` that the judge had"
            )
    return groups


def score_by_gold(gold: Bound, prompt: str, fields: Mapping[str, str], candidate: Row, special_tokens: bool) -> float:
    """Return the gold reward of a candidate of the prompt; raise WinnowError if it is no finite number."""
    arguments = (fields,) if gold.metadata.get("reads_fields") else ()
    score = gold(prompt, candidate_text(candidate, special_tokens), *arguments)
    return number(gold, score, of=f"prompt {candidate['prompt_id']}, candidate {candidate['candidate_id']}")


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None


def bootstrap_interval(values: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of values [N], N > 0."""
    count = max(1, RESAMPLED_VALUES // len(values))
    blocks = [min(count, resamples - start) for start in range(0, resamples, count)]
    means = np.concatenate([rng.choice(values, (block, len(values))).mean(axis=1) for block in blocks])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)

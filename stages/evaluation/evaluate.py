"""Stage `evaluate`: win rates with intervals, KL and length; and the gold reward, which no other stage may read."""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NotRequired

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import Bound, InputStep, Registry, stage
from pipeline.registry import entry_of
from schemas import Candidates, Evaluations, Judgements, Outcomes, Prompts, Reference, WinnowError
from schemas.tables import EVALUATIONS, OUTCOMES
from stages.data.rows import Row, column_by_id, fields_of, rows_by_prompt, text_by_id
from stages.options import Seed, SmallCount
from stages.ranking.rankers import FIELDS, PROGRAM, fields_problems, plain_program
from stages.ranking.verifiers import code_tests, json_schema, math_answer
from stages.results import number


def plain_gold(fn: Callable[..., Any], options: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return arguments and metadata of a function in a user's file, which is a gold reward as it is."""
    arguments, metadata = plain_program(fn, options)
    return arguments, {"reads_fields": metadata["reads_fields"]}


gold_reward = Registry(
    "gold reward",
    *PROGRAM,
    plain=plain_gold,
    reads_fields=NotRequired[bool],
    columns=NotRequired[tuple[str, ...]],
    requires=NotRequired[str],
)
for program in (code_tests, json_schema, math_answer):
    entry = entry_of(program, "ranker")
    shared = {name: entry.metadata[name] for name in ("columns", "requires") if name in entry.metadata}
    gold_reward(arguments=FIELDS, reads_fields=True, version=entry.version, **shared)(program)

METRICS = ("proxy_win", "gold_win", "gold", "gold_baseline", "kl", "n_tokens", "proxy_verdicts", "proxy_unread")
UNREAD_WINS = {"candidate": 0.0, "baseline": 1.0, "both": 0.5}  # by whose response the ranker could not read


def _check_gold(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    return fields_problems(options["gold"], inputs, "gold") if options["gold"] else []


@stage(version=4, unsharded=True, check=_check_gold)
def evaluate(
    prompts: Prompts,
    candidates: Candidates,
    baseline: Candidates,
    judgements: Judgements,
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
    ranker could not read loses to one that it could; `proxy_unread` is the share of comparisons decided so. A
    comparison without a verdict counts in `proxy_verdicts`, the share of comparisons that have one, and not in
    `proxy_win`. With `special_tokens`, the gold reward reads those inside a response.
    Per policy: means over prompts with 95 % percentile bootstrap intervals over prompts.
    The mean of log p - log p_baseline estimates KL without bias only where p is the distribution of the draws: that
    of the policy, as `policy_logp` scored it (logp_kind exact), or of the policy with a head, recorded at the draw
    (steered, for which `policy_logp` is not read). It is null otherwise. A gold reward that is no finite number ends
    the stage.
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

    judgements_by_candidate: dict[str, list[Row]] = {}
    for row in judgements.to_pylist():
        judgements_by_candidate.setdefault(row["candidate_id"], []).append(row)
    golds_by_prompt: dict[str, list[float]] = {}
    if gold is not None:
        for row in baseline.to_pylist():
            golds_by_prompt.setdefault(row["prompt_id"], []).append(gold_of(gold, row))
    outcomes = []
    for row in (row for _, group in rows_by_prompt(candidates) for row in group):
        name, judged = row["candidate_id"], judgements_by_candidate.pop(row["candidate_id"], [])
        wins = [
            UNREAD_WINS[match["unread"]] if match["unread"] else _win_score(match["logit"])
            for match in judged
            if match["unread"] or match["logit"] is not None
        ]
        outcome = dict(prompt_id=row["prompt_id"], k=row["k"], candidate_id=name, n_tokens=row["n_tokens"])
        outcome["proxy_win"] = _mean(wins)
        outcome["proxy_verdicts"] = _mean(match["logit"] is not None for match in judged)
        outcome["proxy_unread"] = _mean(match["unread"] is not None for match in judged)
        if gold is not None:
            outcome["gold"], opponents = gold_of(gold, row), golds_by_prompt.get(row["prompt_id"], [])
            outcome["gold_baseline"] = _mean(opponents)
            outcome["gold_win"] = _mean(_win_score(outcome["gold"] - opponent) for opponent in opponents)
        if name in policy_scores and name in baseline_scores:
            outcome["kl"] = float(policy_scores[name] - baseline_scores[name])
        outcomes.append(outcome)
    if judgements_by_candidate:
        raise WinnowError(
            f"evaluate: judgements of {len(judgements_by_candidate):,} responses that `candidates` lacks, such as "
            f"{next(iter(judgements_by_candidate))}; give it the candidates that were judged"
        )

    # Average per prompt first, so that prompts with more responses do not weigh more. In one thread and in the order of
    # prompt ids: the bits of a mean depend on the order of its sum, and the bootstrap on that of the prompts.
    asked = pa.schema([(name, pa.float64()) for name in ("proxy_verdicts", "proxy_unread")])
    table = pa.Table.from_pylist(outcomes, pa.schema([*OUTCOMES, *asked]))
    by_prompt = table.group_by("prompt_id", use_threads=False).aggregate([(metric, "mean") for metric in METRICS])
    by_prompt, rng = by_prompt.sort_by("prompt_id"), np.random.default_rng(seed)
    evaluations = []
    for metric in METRICS:
        means = by_prompt.column(f"{metric}_mean").drop_null().to_numpy()
        if len(means):
            low, high = bootstrap_interval(means, resamples, rng)
            row = {"metric": metric, "value": float(means.mean()), "low": low, "high": high, "n": len(means)}
            evaluations.append(row)
    return table.select(OUTCOMES.names), pa.Table.from_pylist(evaluations, EVALUATIONS)


def score_by_gold(
    gold: Bound, prompt: str, fields: Mapping[str, str], candidate: Mapping[str, Any], special_tokens: bool
) -> float:
    """Return the gold reward of a candidate of the prompt; raise WinnowError if it is no finite number."""
    use_raw = special_tokens and candidate["raw_text"] is not None
    known = (fields,) if gold.metadata.get("reads_fields") else ()
    score = gold(prompt, candidate["raw_text"] if use_raw else candidate["text"], *known)
    return number(gold, score, of=f"prompt {candidate['prompt_id']}, candidate {candidate['candidate_id']}")


def _win_score(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None


def bootstrap_interval(values: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of values [N], N > 0."""
    means = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)

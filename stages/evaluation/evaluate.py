"""Stage `evaluate`: win rates with intervals, KL and length; and the gold reward, which no other stage may read."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NotRequired

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import Bound, InputStep, Registry, stage
from pipeline.registry import entry_of
from schemas import Candidates, Evaluations, Judgements, Outcomes, Prompts, Reference
from schemas.tables import EVALUATIONS, OUTCOMES
from stages.data.rows import column_by_id, fields_of, text_by_id
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

METRICS = ("proxy_win", "gold_win", "gold", "gold_baseline", "kl", "n_tokens", "proxy_verdicts", "gold_gain")


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
    """Compare a policy with the baseline: per response, whether it wins by proxy and gold, log-ratio and length.

    A tie counts one half. A comparison without a verdict counts in `proxy_verdicts`, the share of comparisons that
    have one, and not in `proxy_win`. With `special_tokens`, the gold reward reads those inside a response.
    Per policy: means over prompts with 95 % percentile bootstrap intervals over prompts; `gold_gain` is the difference
    of the gold rewards of policy and baseline, paired by prompt.
    The mean of log p - log p_baseline estimates KL without bias only where p is the distribution of the draws: that
    of the policy, as `policy_logp` scored it (logp_kind exact), or of the policy with a head, recorded at the draw
    (steered, for which `policy_logp` is not read). It is null otherwise. A gold reward that is no finite number ends
    the stage.
    """
    prompt_texts = text_by_id(prompts, "prompt_id")
    fields = {row["prompt_id"]: fields_of(row) for row in prompts.to_pylist()}
    responses = pa.concat_tables([baseline, candidates])
    response_texts = text_by_id(responses, "candidate_id")
    if special_tokens:
        raw_texts = column_by_id(responses, "candidate_id", "raw_text")
        response_texts |= {name: text for name, text in raw_texts.items() if text is not None}
    lengths = column_by_id(candidates, "candidate_id", "n_tokens")
    logp_kinds = candidates.column("logp_kind").unique().to_pylist()
    draw_logp = {"exact": policy_logp, "steered": candidates}.get(logp_kinds[0]) if len(logp_kinds) == 1 else None
    policy_scores, baseline_scores = (
        {} if table is None else column_by_id(table, "candidate_id", "logp") for table in (draw_logp, baseline_logp)
    )

    outcomes = []
    for row in judgements.to_pylist():
        ours, theirs = row["candidate_id"], row["baseline_id"]
        outcome = {name: row[name] for name in ("prompt_id", "k", "candidate_id", "baseline_id")}
        verdict = None if row["logit"] is None else _win_score(row["logit"])
        outcome |= {"proxy_win": verdict, "n_tokens": lengths[ours]}
        if ours in policy_scores and ours in baseline_scores:
            outcome["kl"] = float(policy_scores[ours] - baseline_scores[ours])
        if gold is not None:
            prompt = prompt_texts[row["prompt_id"]]
            known = (fields[row["prompt_id"]],) if gold.metadata.get("reads_fields") else ()
            of = f"prompt {row['prompt_id']}, candidate "
            outcome["gold"] = number(gold, gold(prompt, response_texts[ours], *known), of=of + ours)
            outcome["gold_baseline"] = number(gold, gold(prompt, response_texts[theirs], *known), of=of + theirs)
            outcome["gold_win"] = _win_score(outcome["gold"] - outcome["gold_baseline"])
        outcomes.append(outcome)

    # Average per prompt first, so that prompts with more responses do not weigh more. In one thread and in the order of
    # prompt ids: the bits of a mean depend on the order of its sum, and the bootstrap on that of the prompts.
    table = pa.Table.from_pylist(outcomes, OUTCOMES)
    has_verdict = pc.is_valid(table.column("proxy_win")).cast(pa.float64())
    gain = pc.subtract(table.column("gold"), table.column("gold_baseline"))
    by_prompt = table.append_column("proxy_verdicts", has_verdict).append_column("gold_gain", gain)
    by_prompt = by_prompt.group_by("prompt_id", use_threads=False).aggregate([(metric, "mean") for metric in METRICS])
    by_prompt, rng = by_prompt.sort_by("prompt_id"), np.random.default_rng(seed)
    evaluations = []
    for metric in METRICS:
        means = by_prompt.column(f"{metric}_mean").drop_null().to_numpy()
        if len(means):
            low, high = bootstrap_interval(means, resamples, rng)
            row = {"metric": metric, "value": float(means.mean()), "low": low, "high": high, "n": len(means)}
            evaluations.append(row)
    return table, pa.Table.from_pylist(evaluations, EVALUATIONS)


def _win_score(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def bootstrap_interval(values: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of values [N], N > 0."""
    means = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)

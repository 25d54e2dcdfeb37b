"""Stage `pair`: which candidate is preferred to which. To add a rule, add a function here.

A rule gets one prompt's rows of the table that its metadata `reads` names, and yields preferences. Rows of
selections carry the columns of their candidates too (`logp`, `n_tokens`, `finish_reason`, ...). Metadata `source`
maps the step of the candidates to what must change for the rule to read them, None if nothing; `weighs` says that it
passes the selection's weights on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations, product
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

import numpy as np
import pyarrow as pa

from pipeline import Bound, Finite, InputStep, Registry, StageContext, stage
from schemas import Candidates, Comparisons, Pairs, Selections, WinnowError
from schemas.tables import PAIRS
from stages.data.rows import SMALLEST_WEIGHT, Row, RowsById, cutoff, equal_rewards, rows_by_prompt
from stages.options import NotNegative
from stages.results import number


def _plain_rule(fn: Callable[..., Any], options: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return arguments and metadata of a function in a user's file; its option `reads` names the table of its rows."""
    reads = options.pop("reads", "selections")
    if reads not in (tables := ("candidates", "comparisons", "selections")):
        raise WinnowError(f"reads: must be one of {', '.join(tables)}, got {reads!r}")
    return ("rows",), {"reads": reads}


pair_rule = Registry(
    "pair rule",
    "rows",
    plain=_plain_rule,
    reads=Literal["candidates", "comparisons", "selections"],
    source=NotRequired[Callable[[InputStep], str | None]],
    weighs=NotRequired[bool],
)


class Preference(NamedTuple):
    """Candidate ids; the logit or reward difference behind them (0 is a tie, None unknown); the pair's weight."""

    chosen: str
    rejected: str
    gap: float | None
    weight: float = 1.0


def require_sampled(step: InputStep) -> str | None:
    """Return the remedy unless an engine draws the candidates, which records their log-probs; also through a `pool`."""
    if step.stage == "pool" and (candidates := step.inputs.get("candidates")):
        return require_sampled(candidates)
    is_sampled = step.stage not in ("own_candidates", "preferences", "mismatch")
    return None if is_sampled else "the rule reads their log-probs: use candidates of a `sample` step"


def require_pooled_prompts(step: InputStep) -> str | None:
    """Return the remedy unless a `pool` adds the demonstrations of `prompts` to the candidates."""
    is_pooled = step.stage == "pool" and "prompts" in step.inputs
    return None if is_pooled else "use a `pool` step that has `prompts` under `from`"


def _prefer_higher_reward(a: Row, b: Row, weight: float = 1.0) -> Preference:
    winner, loser = (a, b) if a["reward"] >= b["reward"] else (b, a)
    return Preference(winner["candidate_id"], loser["candidate_id"], winner["reward"] - loser["reward"], weight)


@pair_rule(reads="comparisons")
def matches(rows: list[Row]) -> Iterator[Preference]:
    """Yield winner and loser of every comparison that the ranker made."""
    for row in rows:
        winner, loser = row["left_id"], row["right_id"]
        if row["logit"] < 0:
            winner, loser = loser, winner
        yield Preference(winner, loser, abs(row["logit"]))


@pair_rule(reads="selections", version=2)
def neighbours(rows: list[Row]) -> Iterator[Preference]:
    """Yield neighbours in the random order of acceptance: first-round ranking by the rewards themselves.

    Those that tie, as labels often do, are paired anew with others that differ, so that no prompt with two different
    rewards is lost.
    """
    in_order = sorted(rows, key=lambda row: row["draw"])
    left_by_reward: dict[float, list[Row]] = {}
    for n in range(0, len(in_order), 2):
        first, *others = in_order[n : n + 2]
        if others and others[0]["reward"] != first["reward"]:
            yield _prefer_higher_reward(first, others[0])
        else:
            left_by_reward.setdefault(first["reward"], []).extend([first, *others])

    # One of each of the two most frequent rewards, until all that are left are equal: ties, to be rejected.
    while len(left_by_reward) > 1:
        most, next_most = sorted(left_by_reward, key=lambda reward: (-len(left_by_reward[reward]), reward))[:2]
        yield _prefer_higher_reward(left_by_reward[most].pop(0), left_by_reward[next_most].pop(0))
        left_by_reward = {reward: left for reward, left in left_by_reward.items() if left}
    for ties in left_by_reward.values():
        for a, b in zip(ties[0::2], ties[1::2], strict=False):
            yield _prefer_higher_reward(a, b)


@pair_rule(reads="selections")
def best_vs_worst(rows: list[Row]) -> Iterator[Preference]:
    """Yield the highest selected reward against the lowest."""
    if len(rows) > 1:
        ranked = sorted(rows, key=lambda row: -row["reward"])
        yield _prefer_higher_reward(ranked[0], ranked[-1])


@pair_rule(reads="selections")
def mu_minus_2_sigma(rows: list[Row], *, sigmas: NotNegative = 2.0) -> Iterator[Preference]:
    """Yield the highest reward against the one nearest to mean - 2 sd, not the very worst (arXiv:2502.16825)."""
    rewards = np.array([row["reward"] for row in rows])
    if len(rows) > 1:
        target = rewards.mean() - sigmas * rewards.std()
        yield _prefer_higher_reward(rows[int(rewards.argmax())], rows[int(np.abs(rewards - target).argmin())])


@pair_rule(reads="selections", weighs=True, version=2)
def all_pairs(rows: list[Row]) -> Iterator[Preference]:
    """Yield every preference that the rewards imply, with weight w_i w_j from the selection's weights.

    Weights 1: RRHF (arXiv:2304.05302). Weights exp(r / beta) / Z: the expectation over two draws from the
    estimated optimal policy, without rejecting any.
    """
    for a, b in combinations(rows, 2):
        if a["reward"] != b["reward"]:
            yield _prefer_higher_reward(a, b, a["weight"] * b["weight"])


@pair_rule(reads="selections", source=require_sampled)
def next_likelier_loser(rows: list[Row], *, threshold: Finite | None = None) -> Iterator[Preference]:
    """Yield each bad response against the likeliest good one that is less likely than it: CLICK (arXiv:2306.03350).

    Good and bad: reward above and below `threshold`, that of labels, or else the prompt's mean (the sign of a reward
    says only whether it beats one random draw). Such pairs are those that the policy has the wrong way round by least;
    the rule is rebuilt from the paper's words, for its code for it is not public.
    """
    if any(row["logp"] is None or row["logp_kind"] == "steered" for row in rows):
        raise WinnowError(
            "next_likelier_loser reads the policy's own candidates.logp, and these candidates have none; sample them "
            "with an engine, and without a head"
        )
    level = cutoff(rows, threshold)
    good = [row for row in rows if row["reward"] > level]
    for bad in rows:
        less_likely = [row for row in good if row["logp"] < bad["logp"]]
        if bad["reward"] < level and less_likely:
            yield _prefer_higher_reward(max(less_likely, key=lambda row: row["logp"]), bad)


@pair_rule(reads="candidates", source=require_pooled_prompts)
def demonstration_vs_sample(rows: list[Row]) -> Iterator[Preference]:
    """Yield the pooled demonstration against each of the policy's own candidates: SPIN (arXiv:2401.01335)."""
    demonstrations = [row for row in rows if row["finish_reason"] == "given"]
    samples = [row for row in rows if row["finish_reason"] != "given"]
    for demonstration, sample in product(demonstrations, samples):
        yield Preference(demonstration["candidate_id"], sample["candidate_id"], None)


def check_preferences(rule: Bound, result: Any, prompt: str, candidate_by_id: RowsById) -> list[Preference]:
    """Return what a rule yields for a prompt; raise WinnowError for what are no preferences between its candidates."""
    of = f"prompt {prompt}"
    if not isinstance(result, Iterable):
        raise rule.wrong_result(result, "an iterator of Preferences", of)
    preferences = []
    for item in result:
        if not isinstance(item, Preference):
            raise rule.wrong_result(item, "Preferences", of)
        for name in item[:2]:
            if name not in candidate_by_id or candidate_by_id[name]["prompt_id"] != prompt:
                raise rule.wrong_result(name, "ids of the prompt's candidates", of)
        gap = None if item.gap is None else number(rule, item.gap, low=0, of=f"the gap of {of}")
        weight = number(rule, item.weight, low=0, of=f"the weight of {of}")
        preferences.append(Preference(item.chosen, item.rejected, gap, weight))
    return preferences


def _check_inputs(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    rule: Bound = options["rule"]
    table, source = rule.metadata["reads"], rule.metadata.get("source")
    problems = []
    if table not in inputs:
        problems.append(f"rule {rule.name} reads {table}, which is required: add `{table}` under `from`")
    for name in ("selections", "comparisons"):
        if name in inputs and name != table:
            problems.append(f"rule {rule.name} does not read {name}: remove it (`{name}: null` under `from`)")
    step = inputs.get("candidates")
    if source and step and step.stage:  # an unknown stage is already a problem of the plan
        with rule.entry.failures():
            remedy = source(step)
        if remedy:
            problems.append(f"rule {rule.name} cannot read candidates of {step.stage}; {remedy}")
    return problems


@stage(version=3, check=_check_inputs)
def pair(
    candidates: Candidates,
    ctx: StageContext,
    selections: Selections | None = None,
    comparisons: Comparisons | None = None,
    *,
    rule: Annotated[Bound, pair_rule] = "matches",  # type: ignore[assignment]
    finished: bool = False,
) -> Pairs:
    """Pair candidate ids as chosen and rejected.

    Rejected, with reason, because nothing can be learnt from them: ties, pairs of identical tokens, prompts without
    a pair, or whose selected rewards are all equal (all labelled right, or wrong); and with `finished` pairs with a
    truncated response, whose missing end may be what tells them apart.
    """
    candidate_by_id = RowsById((row["candidate_id"], row) for row in candidates.to_pylist())
    table = rule.metadata["reads"]
    source = {"selections": selections, "comparisons": comparisons, "candidates": candidates}[table]
    pairs = []
    for prompt, rows in rows_by_prompt(source):
        if table == "selections":
            rows = [candidate_by_id[row["candidate_id"]] | row for row in rows]
            if reason := equal_rewards(rows):
                ctx.reject(reason, place=rule.name, prompt=prompt, detail=f"{len(rows)} {table}")
                continue
        preferences = check_preferences(rule, rule(rows), prompt, candidate_by_id)
        if not preferences:
            ctx.reject("no pair", place=rule.name, prompt=prompt, detail=f"{len(rows)} {table}")
        paired: set[tuple[str, str]] = set()
        for chosen_id, rejected_id, gap, weight in preferences:
            responses = candidate_by_id[chosen_id], candidate_by_id[rejected_id]
            reason = None
            if gap == 0:
                reason = "tie"
            elif responses[0]["token_ids"] == responses[1]["token_ids"]:
                reason = "identical responses"
            elif not all(response["token_ids"] for response in responses):
                reason = "empty response"
            elif finished and any(response["finish_reason"] == "length" for response in responses):
                reason = "cut at max_tokens"
            elif weight <= SMALLEST_WEIGHT:  # 0 in float32
                reason = "weight 0"
            elif (chosen_id, rejected_id) in paired:
                reason = "the same pair again"
            if reason:
                ctx.reject(reason, place=rule.name, prompt=prompt, candidate=chosen_id, detail=rejected_id)
                continue
            paired.add((chosen_id, rejected_id))
            row = {"prompt_id": prompt, "chosen_id": chosen_id, "rejected_id": rejected_id, "rule": rule.name}
            pairs.append(row | {"gap": gap, "weight": weight})
    return pa.Table.from_pylist(pairs, schema=PAIRS)

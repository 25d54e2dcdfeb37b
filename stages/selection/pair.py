"""Room 5: which candidate beats which. To add a rule, add a function here.

A rule reads one prompt's rows, of the table that its fact `reads` names, and yields preferences. Rows of
selections come with `logp`, `n_tokens` and `finish_reason` of their candidates. A fact `source` says which
candidates it can read; `weighs`, that it passes the selection's weights on.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations, product
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import Bound, Finite, InputStep, Range, Registry, StageContext, stage
from schemas import Candidates, Comparisons, Pairs, Selections, WinnowError
from schemas.tables import PAIRS
from stages.data.rows import LEAST, ById, Row, by_prompt, cutoff

pair_rule = Registry("pair rule", "reads")


class Preference(NamedTuple):
    """Candidate ids; the logit or reward difference behind it (0 is a tie, None unknown); how much it counts."""

    chosen: str
    rejected: str
    gap: float | None
    weight: float = 1.0


class Source(NamedTuple):
    """Which steps make candidates that a rule can read, as a plan sees it, and what to wire if this one does not."""

    met: Callable[[InputStep], bool]
    cure: str


def _drawn(step: InputStep) -> bool:
    """By an engine, which tells their log-probs; also through a `pool`."""
    own = step.inputs.get("candidates") if step.stage == "pool" else None
    return _drawn(own) if own else step.stage not in ("own_candidates", "preferences", "mismatch")


DRAWN = Source(_drawn, "`sample` them, for it reads their log-probs")
POOLED = Source(lambda step: step.stage == "pool" and "prompts" in step.inputs, "wire a `pool` that has `prompts`")


def _ordered(a: Row, b: Row, weight: float = 1.0) -> Preference:
    """The two by reward."""
    winner, loser = (a, b) if a["reward"] >= b["reward"] else (b, a)
    return Preference(winner["candidate_id"], loser["candidate_id"], winner["reward"] - loser["reward"], weight)


@pair_rule(reads="comparisons")
def matches(group: list[Row]) -> Iterator[Preference]:
    """The winner and the loser of every comparison that the ranker made."""
    for match in group:
        winner, loser = match["left_id"], match["right_id"]
        if match["logit"] < 0:
            winner, loser = loser, winner
        yield Preference(winner, loser, abs(match["logit"]))


@pair_rule(reads="selections")
def neighbours(group: list[Row]) -> Iterator[Preference]:
    """First-round ranking by the rewards themselves: neighbours in the random order of acceptance."""
    kept = sorted(group, key=lambda row: row["draw"])
    for a, b in zip(kept[0::2], kept[1::2], strict=False):
        yield _ordered(a, b)


@pair_rule(reads="selections")
def best_vs_worst(group: list[Row]) -> Iterator[Preference]:
    """The highest reward among the kept against the lowest."""
    if len(group) > 1:
        ranked = sorted(group, key=lambda row: -row["reward"])
        yield _ordered(ranked[0], ranked[-1])


@pair_rule(reads="selections")
def mu_minus_2_sigma(group: list[Row], *, sigmas: Annotated[float, Range(ge=0)] = 2.0) -> Iterator[Preference]:
    """The highest reward against the one nearest to mean - 2 sd, not the very worst (arXiv:2502.16825)."""
    rewards = np.array([row["reward"] for row in group])
    if len(group) > 1:
        target = rewards.mean() - sigmas * rewards.std()
        yield _ordered(group[int(rewards.argmax())], group[int(np.abs(rewards - target).argmin())])


@pair_rule(reads="selections", weighs=True, version=2)
def all_pairs(group: list[Row]) -> Iterator[Preference]:
    """Every preference that the rewards imply, with weight w_i w_j from the selection's weights.

    Weights 1: RRHF (arXiv:2304.05302). Weights exp(r / beta) / Z: the expectation over two draws from the
    estimated optimal policy, without rejecting any.
    """
    for a, b in combinations(group, 2):
        if a["reward"] != b["reward"]:
            yield _ordered(a, b, a["weight"] * b["weight"])


@pair_rule(reads="selections", source=DRAWN)
def next_likelier_loser(group: list[Row], *, threshold: Finite | None = None) -> Iterator[Preference]:
    """CLICK (arXiv:2306.03350): each bad response against the likeliest good one that is less likely than itself.

    Good and bad: reward above and below `threshold`, or the prompt's mean (the sign of a reward says only whether
    it beats one random draw). Such pairs are those that the policy has the wrong way round by least; the rule is
    rebuilt from the paper's words, for its code for it is not public.
    """
    if any(row["logp"] is None or row["logp_kind"] == "steered" for row in group):
        raise WinnowError(
            "next_likelier_loser reads the policy's own candidates.logp, and these have none; sample them with an "
            "engine, and without a head"
        )
    level = cutoff(group, threshold)
    good = [row for row in group if row["reward"] > level]
    for bad in group:
        below = [row for row in good if row["logp"] < bad["logp"]]
        if bad["reward"] < level and below:
            yield _ordered(max(below, key=lambda row: row["logp"]), bad)


@pair_rule(reads="candidates", source=POOLED)
def demonstration_vs_sample(group: list[Row]) -> Iterator[Preference]:
    """SPIN (arXiv:2401.01335): the demonstration, pooled with the candidates, against each of the policy's own."""
    shown = [row for row in group if row["finish_reason"] == "given"]
    for demonstration, own in product(shown, (row for row in group if row["finish_reason"] != "given")):
        yield Preference(demonstration["candidate_id"], own["candidate_id"], None)


def _rule_has_what_it_reads(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    rule: Bound = options["rule"]
    table = rule.metadata["reads"]
    problems = [] if table in wired else [f"rule {rule.name} reads {table}; wire `{table}` in `from`"]
    unread = [name for name in ("selections", "comparisons") if name in wired and name != table]
    problems += [f"rule {rule.name} does not read {name}; unwire it (`{name}: null`)" for name in unread]
    source, step = rule.metadata.get("source"), wired.get("candidates")
    if source and step and step.stage and not source.met(step):
        problems.append(f"rule {rule.name} cannot read candidates of {step.stage}; {source.cure}")
    return problems


@stage(version=2, check=_rule_has_what_it_reads)
def pair(
    candidates: Candidates,
    ctx: StageContext,
    selections: Selections | None = None,
    comparisons: Comparisons | None = None,
    *,
    rule: Annotated[Bound, pair_rule] = "matches",  # type: ignore[assignment]
    finished: bool = False,
) -> Pairs:
    """Ids of chosen and rejected.

    What teaches nothing is left out, with reason: ties, pairs of identical tokens, prompts without a pair;
    and with `finished` pairs of which one was cut, whose missing end would be what tells them apart.
    """
    by_id = ById((row["candidate_id"], row) for row in candidates.to_pylist())
    reads = rule.metadata["reads"]
    source = {"selections": selections, "comparisons": comparisons, "candidates": candidates}[reads]
    rows = []
    for prompt, group in by_prompt(source):
        whole = [by_id[row["candidate_id"]] | row for row in group] if reads == "selections" else group
        found = list(rule(whole))
        if not found:
            ctx.reject("no pair", place=rule.name, prompt=prompt, detail=f"{len(group)} {reads}")
        for preference in found:
            reason = _useless(preference, by_id, finished)
            if reason:
                ids = dict(prompt=prompt, candidate=preference.chosen)
                ctx.reject(reason, place=rule.name, detail=preference.rejected, **ids)
            else:
                rows.append(_row(prompt, preference, rule.name))
    return pa.Table.from_pylist(rows, schema=PAIRS)


def _useless(found: Preference, by_id: ById, finished: bool) -> str | None:
    sides = [by_id[found.chosen], by_id[found.rejected]]
    if found.gap == 0:
        return "tie"
    if sides[0]["token_ids"] == sides[1]["token_ids"]:
        return "identical responses"
    if not all(side["token_ids"] for side in sides):
        return "empty response"
    if finished and any(side["finish_reason"] == "length" for side in sides):
        return "cut at max_tokens"
    return None if found.weight > LEAST else "weight 0"


def _row(prompt: str, found: Preference, rule: str) -> Row:
    gap = None if found.gap is None else float(found.gap)
    ids = dict(prompt_id=prompt, chosen_id=found.chosen, rejected_id=found.rejected)
    return ids | dict(gap=gap, weight=float(found.weight), rule=rule)

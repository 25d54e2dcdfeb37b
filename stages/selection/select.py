"""Room 4: which candidates follow the estimated optimal policy."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import Bound, InputStep, StageContext, stage
from schemas import Rewards, Selections, seed_for
from schemas.tables import SELECTIONS
from stages.selection.groups import Flags, Floats, Ints, RewardGroups
from stages.selection.rules import Selection, selection_rule
from stages.selection.scales import reward_scale

LARGEST = 1e100  # squares and sums of rewards stay finite below it
Prompts = NDArray[np.object_]


def _rule_agrees(options: dict[str, Any], wired: Mapping[str, InputStep]) -> list[str]:
    rule: Bound = options["rule"]
    problems: list[str] = rule.metadata.get("check", lambda options: [])(rule.options)
    return problems


@stage(version=2, check=_rule_agrees)
def select(
    rewards: Rewards,
    ctx: StageContext,
    *,
    rule: Annotated[Bound, selection_rule],
    scale: Annotated[Bound, reward_scale] = "raw",  # type: ignore[assignment]
    seed: int = 0,
) -> Selections:
    """Mirror some of each prompt's candidates, or all, with weights, by a rule that reads the rewards on a scale.

    Left out, with reason: a reward that is not finite, and a prompt that the scale or the rule can do nothing with.
    """
    rows = _in_order(_usable(rewards, ctx))
    prompts, groups = _groups(rows, seed)
    for part in (scale, rule):
        good = _good(part, groups)
        if good.all():
            continue
        for prompt in prompts[~good]:
            ctx.reject(part.metadata["needs"].reason, place=part.name, prompt=prompt)
        rows, prompts, groups = rows.filter(pa.array(groups.each(good))), prompts[good], groups.only(good)
    if not len(prompts):
        return SELECTIONS.empty_table()
    kept: Selection = rule(replace(groups, values=scale(groups)))
    for prompt in np.delete(prompts, _prompt_of(kept, groups)):
        ctx.reject(kept.empty, place=rule.name, prompt=prompt)
    return _table(rows, groups, kept)


def _usable(rewards: pa.Table, ctx: StageContext) -> pa.Table:
    """The columns that are read, without rewards that cannot be reckoned with."""
    rewards = rewards.select(["prompt_id", "candidate_id", "reward"]).combine_chunks()
    column = rewards.column("reward")
    good = pc.and_(pc.is_finite(column), pc.less(pc.abs(column), LARGEST))
    if pc.all(good).as_py():
        return rewards
    for row in rewards.filter(pc.invert(good)).to_pylist():
        ids = {"prompt": row["prompt_id"], "candidate": row["candidate_id"]}
        reason = "reward is too large" if np.isfinite(row["reward"]) else "reward is not finite"
        ctx.reject(reason, place="rewards", detail=str(row["reward"]), **ids)
    return rewards.filter(good).combine_chunks()


def _in_order(rows: pa.Table) -> pa.Table:
    """By prompt and candidate: as `reward` leaves them, so that to look is nearly always enough."""
    if rows.num_rows < 2:
        return rows
    prompt, candidate = (_pairs(rows.column(name).chunk(0)) for name in ("prompt_id", "candidate_id"))
    same, rising = pc.equal(*prompt), pc.less(*prompt)
    if pc.all(pc.or_(rising, pc.and_(same, pc.less_equal(*candidate)))).as_py():
        return rows
    return rows.sort_by([("prompt_id", "ascending"), ("candidate_id", "ascending")])


def _pairs(column: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Each value but the last, and the one after it."""
    return column.slice(0, len(column) - 1), column.slice(1)


def _groups(rows: pa.Table, seed: int) -> tuple[Prompts, RewardGroups]:
    """Prompt ids in order, and their rewards."""
    runs = pc.run_end_encode(rows.column("prompt_id").combine_chunks())
    prompts = runs.values.to_pylist()
    starts = np.concatenate([np.zeros(1, np.int64), np.asarray(runs.run_ends, dtype=np.int64)])
    seeds = np.array([seed_for(seed, "select", prompt) for prompt in prompts], dtype=np.uint64)
    return np.array(prompts, dtype=object), RewardGroups(rows.column("reward").to_numpy(), starts, seeds)


def _good(part: Bound, groups: RewardGroups) -> Flags:
    """Which prompts have what a scale or a rule needs."""
    good: Flags = part.metadata["needs"].met(groups) if "needs" in part.metadata else groups.sizes > 0
    return good


def _prompt_of(kept: Selection, groups: RewardGroups) -> Ints:
    """The prompt's number of each kept row."""
    return groups.each(np.arange(len(groups.sizes)))[kept.index]


def _table(rows: pa.Table, groups: RewardGroups, kept: Selection) -> pa.Table:
    prompt, size = _prompt_of(kept, groups), len(kept.index)

    def stated(facts: Floats | None) -> pa.Array:
        return pa.nulls(size, pa.float64()) if facts is None else pa.array(facts[prompt])

    columns = {name: rows.column(name).take(pa.array(kept.index)) for name in ("prompt_id", "candidate_id", "reward")}
    columns |= {
        "draw": pa.array(kept.draw.astype(np.int32)),
        "round": pa.array(np.broadcast_to(kept.round, size).astype(np.int32)),
        "weight": pa.array(np.broadcast_to(kept.weight, size).astype(np.float64)),
        "beta": stated(kept.beta),
        "acceptance": stated(kept.acceptance),
        "ess": stated(kept.ess),
    }
    return pa.table([columns[name] for name in SELECTIONS.names], names=SELECTIONS.names)

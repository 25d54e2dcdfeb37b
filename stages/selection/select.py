"""Stage `select`: keep the candidates that follow the estimated optimal policy, or weight them by it."""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import Bound, InputStep, StageContext, stage
from schemas import Rewards, Selections, seed_for
from schemas.tables import SELECTIONS
from stages.selection.groups import RewardGroups
from stages.selection.rules import check_selection, selection_rule
from stages.selection.scales import reward_scale, scaled

MAX_REWARD = 1e100  # squares and sums of smaller rewards stay finite


def _check_rule(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    rule: Bound = options["rule"]
    with rule.entry.failures():
        return rule.metadata["check"](rule.options) if "check" in rule.metadata else []


@stage(version=2, check=_check_rule)
def select(
    rewards: Rewards,
    ctx: StageContext,
    *,
    rule: Annotated[Bound, selection_rule],
    scale: Annotated[Bound, reward_scale] = "raw",  # type: ignore[assignment]
    seed: int = 0,
) -> Selections:
    """Select some of each prompt's candidates, or all with weights, by a rule that reads the rewards on a scale.

    Rejected, with reason: rewards that are not finite, and prompts that the scale or the rule cannot use.
    """
    # Reject rewards that are not finite.
    rows = rewards.select(["prompt_id", "candidate_id", "reward"]).combine_chunks()
    finite = pc.and_(pc.is_finite(rows.column("reward")), pc.less(pc.abs(rows.column("reward")), MAX_REWARD))
    if not pc.all(finite).as_py():
        for row in rows.filter(pc.invert(finite)).to_pylist():
            reason = "reward is too large" if np.isfinite(row["reward"]) else "reward is not finite"
            ids = {"prompt": row["prompt_id"], "candidate": row["candidate_id"]}
            ctx.reject(reason, place="rewards", detail=str(row["reward"]), **ids)
        rows = rows.filter(finite).combine_chunks()

    # Order by prompt and candidate, as `reward` leaves its rows: a check of neighbours nearly always saves the sort.
    if rows.num_rows > 1:
        prompt, candidate = (rows.column(name).chunk(0) for name in ("prompt_id", "candidate_id"))
        same_prompt, next_prompt = pc.equal(prompt[:-1], prompt[1:]), pc.less(prompt[:-1], prompt[1:])
        ordered = pc.or_(next_prompt, pc.and_(same_prompt, pc.less_equal(candidate[:-1], candidate[1:])))
        if not pc.all(ordered).as_py():
            rows = rows.sort_by([("prompt_id", "ascending"), ("candidate_id", "ascending")])

    # Group by prompt. Each has its own seed, so that its draw does not depend on the shard's other prompts.
    runs = pc.run_end_encode(rows.column("prompt_id").combine_chunks())
    prompts = np.array(runs.values.to_pylist(), dtype=object)
    starts = np.concatenate([np.zeros(1, np.int64), np.asarray(runs.run_ends, dtype=np.int64)])
    seeds = np.array([seed_for(seed, "select", prompt) for prompt in prompts], dtype=np.uint64)
    groups = RewardGroups(rows.column("reward").to_numpy(), starts, seeds)

    # Reject prompts without two different rewards, if the scale or the rule needs them; the first one is the place.
    needy = [function.name for function in (scale, rule) if function.metadata.get("needs_spread")]
    usable = groups.range > 0
    if needy and not usable.all():
        for prompt in prompts[~usable]:
            ctx.reject("one candidate, or all rewards equal", place=needy[0], prompt=prompt)
        keep = groups.broadcast(usable)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(groups.sizes[usable])])
        rows, prompts = rows.filter(pa.array(keep)), prompts[usable]
        groups = RewardGroups(groups.values[keep], starts, groups.seeds[usable])
    if not len(prompts):
        return SELECTIONS.empty_table()

    # Apply the rule to the scaled rewards; reject prompts of which it selects nothing.
    groups = scaled(scale, groups)
    selection = check_selection(rule, rule(groups), groups)
    prompt_of_row = groups.broadcast(np.arange(len(prompts)))[selection.index]
    for prompt in np.delete(prompts, prompt_of_row):
        ctx.reject(selection.empty_reason, place=rule.name, prompt=prompt)

    # Build the table: the reward column keeps the reward before scaling.
    size = len(selection.index)
    columns = {name: rows.column(name).take(pa.array(selection.index)) for name in rows.column_names}
    columns["draw"] = pa.array(selection.draw.astype(np.int32))
    columns["round"] = pa.array(np.broadcast_to(selection.round, size).astype(np.int32))
    columns["weight"] = pa.array(np.broadcast_to(selection.weight, size).astype(np.float64))
    for name in ("beta", "acceptance", "ess"):
        per_prompt = getattr(selection, name)
        columns[name] = pa.nulls(size, pa.float64()) if per_prompt is None else pa.array(per_prompt[prompt_of_row])
    return pa.table([columns[name] for name in SELECTIONS.names], names=SELECTIONS.names)

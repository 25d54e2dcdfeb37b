"""Stage `select`: keep the candidates that follow the estimated optimal policy, or weight them by it."""

import warnings
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import Bound, Columns, InputStep, StageContext, stage
from pipeline.context import Column
from pipeline.costs import Amount, Cost, Work
from schemas import Candidates, Partitions, Rewards, Selections, WinnowError, WinnowWarning, seeds_for
from schemas.tables import SELECTIONS
from stages.data.rows import ALL_WRONG, column_of
from stages.options import Seed
from stages.selection.groups import RewardGroups
from stages.selection.rules import check_selection, selection_rule
from stages.selection.scales import reward_scale, scaled

REWARD_COLUMNS = Columns("prompt_id", "candidate_id", "reward", "label_threshold")
CANDIDATE_COLUMNS = Columns("prompt_id", "candidate_id", "finish_reason")
LARGE_IDS = pa.schema(
    [(name, pa.large_string()) for name in ("prompt_id", "candidate_id")]
    + [(name, pa.float64()) for name in ("reward", "label_threshold")]
)
MAX_BYTES = 1 << 30  # of ids with offsets of 32 bits
MAX_REWARD = 1e100  # squares and sums of smaller rewards stay finite


def _check_rule(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return problems of the rule and of `finished`; warn of a rule that would keep every candidate."""
    rule: Bound = options["rule"]
    k, draws = rule.options.get("k"), _draws_per_prompt(inputs.get("rewards"))
    if rule.name != "plain" and k is not None and draws is not None and k >= draws:  # plain reads no rewards
        warnings.warn(
            f"rule {rule.name} keeps k = {k} responses, and `sample` draws n = {draws} per prompt: it keeps "
            "all of them, whatever their rewards; set `rule.k` lower or `sample.n` higher",
            WinnowWarning,
            stacklevel=2,
        )
    with rule.entry.failures():
        problems = rule.metadata["check"](rule.options) if "check" in rule.metadata else []
    if options["finished"] and "candidates" not in inputs:
        problems.append("finished reads candidates; add `candidates` under `from`, the step that `rewards` scored")
    if not options["finished"] and "candidates" in inputs:
        problems.append("nothing reads candidates; set `finished: true`, or set `candidates: null` under `from`")
    return problems + _partition_problems(options, inputs)


def _partition_problems(options: dict[str, Any], inputs: Mapping[str, InputStep]) -> list[str]:
    """Return why a learned partition function is not that of these rewards on this scale at this temperature."""
    estimate, step = options["rule"].options.get("normaliser"), inputs.get("partition")
    if not (isinstance(estimate, Bound) and estimate.metadata.get("learned")):
        cure = "set `rule.normaliser: learned`, or set `partition: null` under `from`"
        return [f"nothing reads partition; {cure}"] if step else []
    if step is None:
        return ["rule.normaliser: learned reads partition; add `partition` under `from`, a step of stage partition"]
    problems, beta = [], options["rule"].options.get("beta")
    if options["scale"].name != "raw":
        problems.append(
            f"scale: {options['scale'].name}, and a partition function is that of raw rewards; set it to raw"
        )
    if step.stage == "partition":
        if beta != step.options["beta"]:
            problems.append(
                f"rule.beta: {beta}, and the partition function was learned at beta {step.options['beta']}; set both "
                "to the same"
            )
        if step.inputs.get("rewards") != inputs.get("rewards"):
            problems.append("partition: it was learned from the rewards of another step; give both the same `rewards`")
    return problems


def _draws_per_prompt(step: InputStep | None) -> int | None:
    """Return n of the `sample` that rewards are of; None if they are of other candidates."""
    while step is not None and step.stage != "sample":
        step = step.inputs.get("candidates") or step.inputs.get("first")
    return step.options.get("n") if step else None


def _select_work(options: Mapping[str, Any], inputs: Mapping[str, InputStep], work: Mapping[str, Work]) -> Work:
    """Return at most k of the n draws of each prompt, where the rule keeps k."""
    k, n = options["rule"].options.get("k"), _draws_per_prompt(inputs.get("rewards"))
    share = min(1.0, k / n) if k and n else 1.0
    return Work({"selections": work["rewards"].of("rewards").times(Amount(share, "at most"))})


def _is_by_prompt(options: Mapping[str, Any]) -> bool:
    """Return whether no prompt's selection depends on others: a user's rule or scale gets them all, and may read them.

    So does a normaliser that pools all prompts.
    """
    rule, scale = options["rule"], options["scale"]
    normaliser = rule.options.get("normaliser")
    is_ours = all(function.entry.fn.__module__.startswith("stages.selection.") for function in (rule, scale))
    return is_ours and not (isinstance(normaliser, Bound) and normaliser.metadata["pooled"])


@stage(version=4, check=_check_rule, cost=Cost(work=_select_work), by_prompt=_is_by_prompt)
def select(
    rewards: Annotated[Rewards, REWARD_COLUMNS],
    ctx: StageContext,
    candidates: Annotated[Candidates, CANDIDATE_COLUMNS] | None = None,
    partition: Partitions | None = None,
    *,
    rule: Annotated[Bound, selection_rule],
    scale: Annotated[Bound, reward_scale] = "raw",  # type: ignore[assignment]
    finished: bool = False,
    seed: Seed = 0,
) -> Selections:
    """Select some of each prompt's candidates, or all with weights, by a rule that reads the rewards on a scale.

    Rejected, with reason: rewards that are not finite, and prompts that the scale or the rule cannot use. A rule that
    keeps k selects nothing where a prompt has no more candidates: these prompts are counted. With `finished`, responses
    that were cut at max_tokens are rejected before, so that no rule compares with a reward of what has no end.
    """
    rows = rewards.select(LARGE_IDS.names)
    if rows.nbytes >= MAX_BYTES:  # ids of a hundred million candidates are 2 GiB of text, which string cannot sort
        rows = rows.cast(LARGE_IDS)
    rows = rows.combine_chunks()

    # Reject rewards that are not finite.
    finite = pc.and_(pc.is_finite(rows.column("reward")), pc.less(pc.abs(rows.column("reward")), MAX_REWARD))
    if not pc.all(finite).as_py():
        refused = rows.filter(pc.invert(finite)).combine_chunks()
        is_large = pc.is_finite(refused.column("reward"))
        reasons = pc.if_else(is_large, "reward is too large", "reward is not finite")
        details = [str(reward) for reward in refused.column("reward").to_pylist()]
        _reject(ctx, refused, reasons.combine_chunks(), details, phase=0)
        rows = rows.filter(finite).combine_chunks()

    # Reject responses that were cut.
    if finished and candidates is not None:
        names = rows.column("candidate_id")
        if not pc.all(pc.is_in(names, candidates.column("candidate_id"))).as_py():
            raise WinnowError("select: rewards of candidates that `candidates` lacks; give it the step that was scored")
        is_cut = pc.equal(candidates.column("finish_reason"), "length")
        cut = pc.is_in(names, candidates.filter(is_cut).column("candidate_id"))
        _reject(ctx, rows.filter(cut).combine_chunks(), "cut at max_tokens", phase=1)
        rows = rows.filter(pc.invert(cut)).combine_chunks()

    # Reject prompts that the partition function was not learned for.
    if partition is not None:
        ids = rows.column("prompt_id")
        is_learned = pc.is_in(ids, column_of(partition, "prompt_id").cast(ids.type))
        lacking = pc.unique(rows.filter(pc.invert(is_learned)).column("prompt_id"))
        ctx.reject_rows(pc.cast(lacking, pa.string()), reason="no partition function", place="partition", phase=1)
        rows = rows.filter(is_learned).combine_chunks()

    # Order by prompt and candidate, as `reward` leaves its rows: a check of neighbours nearly always saves the sort.
    if rows.num_rows > 1:
        prompt, candidate = (rows.column(name).chunk(0) for name in ("prompt_id", "candidate_id"))
        same_prompt, next_prompt = pc.equal(prompt[:-1], prompt[1:]), pc.less(prompt[:-1], prompt[1:])
        ordered = pc.or_(next_prompt, pc.and_(same_prompt, pc.less_equal(candidate[:-1], candidate[1:])))
        if not pc.all(ordered).as_py():
            rows = rows.sort_by([("prompt_id", "ascending"), ("candidate_id", "ascending")])

    # Group by prompt. Each has its own seed, so that its draw does not depend on the shard's other prompts.
    runs = pc.run_end_encode(rows.column("prompt_id").combine_chunks(), run_end_type=pa.int64())
    prompts = runs.values
    starts = np.append(0, runs.run_ends.to_numpy())
    log_z = None
    if partition is not None:
        positions = pc.index_in(prompts, value_set=column_of(partition, "prompt_id").cast(prompts.type))
        log_z = partition.column("log_z").take(positions).to_numpy()
    groups = RewardGroups(rows.column("reward").to_numpy(), starts, seeds_for(seed, "select", prompts), log_z)

    # Reject prompts without two different rewards, if the scale or the rule needs them; the first one is the place.
    # Labels need no other to compare with: where all are right, all are kept. A rule that is for the right ones alone
    # gets no other.
    needy = [function.name for function in (scale, rule) if function.metadata.get("needs_spread")]
    right_only = rule.metadata.get("right_only", False)
    thresholds = rows.column("label_threshold").to_numpy()  # nan without labels, above and below which nothing lies
    is_right, is_wrong = groups.values > thresholds, groups.values <= thresholds
    all_right, all_wrong = (np.logical_and.reduceat(mask, groups.starts[:-1]) for mask in (is_right, is_wrong))
    unusable = (groups.range == 0) & ~all_right if needy else all_wrong if right_only else np.zeros_like(all_wrong)
    if unusable.any():
        reasons = pc.if_else(pa.array(all_wrong[unusable]), ALL_WRONG, "one candidate, or all rewards equal")
        ctx.reject_rows(
            prompts.filter(pa.array(unusable)), reason=reasons, place=needy[0] if needy else rule.name, phase=2
        )
    keep = ~groups.broadcast(unusable) & ~(is_wrong & right_only)
    all_sizes = groups.sizes[~unusable]
    if not keep.all():
        sizes = groups.sum(keep.astype(np.float64)).astype(np.int64)[~unusable]
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        rows, prompts = rows.filter(pa.array(keep)), prompts.filter(pa.array(~unusable))
        log_z = None if log_z is None else log_z[~unusable]
        groups = RewardGroups(groups.values[keep], starts, groups.seeds[~unusable], log_z)
    if not len(prompts):
        return SELECTIONS.empty_table()

    if k := rule.options.get("k"):
        ctx.count(prompts_with_all_candidates_kept=int(((all_sizes <= k) & (groups.sizes == all_sizes)).sum()))

    # Apply the rule to the scaled rewards; reject prompts of which it selects nothing.
    groups = scaled(scale, groups)
    selection = check_selection(rule, rule(groups), groups)
    prompt_of_row = groups.broadcast(np.arange(len(prompts)))[selection.index]
    is_empty = np.ones(len(prompts), dtype=bool)
    is_empty[prompt_of_row] = False
    if is_empty.any():
        ctx.reject_rows(prompts.filter(pa.array(is_empty)), reason=selection.empty_reason, place=rule.name, phase=3)

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


def _reject(ctx: StageContext, rows: pa.Table, reason: Column, detail: Column = "", *, phase: int) -> None:
    """Reject rows of `rewards`."""
    prompts, candidates = (pc.cast(rows[name].combine_chunks(), pa.string()) for name in ("prompt_id", "candidate_id"))
    ctx.reject_rows(prompts, candidates=candidates, place="rewards", reason=reason, detail=detail, phase=phase)

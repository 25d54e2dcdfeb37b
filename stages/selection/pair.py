"""Stage `pair`: which candidate is preferred to which. To add a rule, add a function here.

A rule gets one prompt's rows of the table that its metadata `reads` names, and yields preferences. Rows of
selections carry the columns of their candidates too (`logp`, `n_tokens`, `finish_reason`, ...). Metadata `source`
maps the step of the candidates to what must change for the rule to read them, None if nothing; `weighs` says that it
passes the selection's weights on. `batch` is the same rule for many prompts at once (pair_batches.py), and
`candidate_columns` are the columns of candidates that this reads: with these two, a rule is not called per prompt.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations, product
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import Bound, Columns, Finite, InputStep, Registry, StageContext, stage
from schemas import Candidates, Comparisons, Pairs, Selections, WinnowError
from schemas.tables import PAIRS
from stages.data.rows import (
    SMALLEST_WEIGHT,
    Ints,
    RejectedRows,
    Row,
    RowsById,
    column_of,
    cutoff,
    equal_rewards_by_prompt,
    in_order_of_prompts,
    positions_of,
    require_ids,
    starts_of_prompts,
)
from stages.options import NotNegative
from stages.results import number
from stages.selection import pair_batches
from stages.selection.pair_batches import PairBatch, PairRows


def _plain_rule(fn: Callable[..., Any], options: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return arguments and metadata of a function in a user's file; its option `reads` names the table of its rows."""
    table = options.pop("reads", "selections")
    if table not in (tables := ("candidates", "comparisons", "selections")):
        raise WinnowError(f"reads: must be one of {', '.join(tables)}, got {table!r}")
    return ("rows",), {"reads": table}


pair_rule = Registry(
    "pair rule",
    "rows",
    plain=_plain_rule,
    reads=Literal["candidates", "comparisons", "selections"],
    source=NotRequired[Callable[[InputStep], str | None]],
    weighs=NotRequired[bool],
    batch=NotRequired[Callable[..., PairBatch]],
    candidate_columns=NotRequired[tuple[str, ...]],
)


IDS = ["prompt_id", "candidate_id"]
OF_PROMPT = "ids of the prompt's candidates"


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


@pair_rule(reads="comparisons", batch=pair_batches.matches)
def matches(rows: list[Row]) -> Iterator[Preference]:
    """Yield winner and loser of every comparison that the ranker made."""
    for row in rows:
        winner, loser = row["left_id"], row["right_id"]
        if row["logit"] < 0:
            winner, loser = loser, winner
        yield Preference(winner, loser, abs(row["logit"]))


@pair_rule(reads="selections", version=2, batch=pair_batches.neighbours)
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
        left_by_reward = {reward: group for reward, group in left_by_reward.items() if group}
    for ties in left_by_reward.values():
        for a, b in zip(ties[0::2], ties[1::2], strict=False):
            yield _prefer_higher_reward(a, b)


@pair_rule(reads="selections", batch=pair_batches.best_vs_worst)
def best_vs_worst(rows: list[Row]) -> Iterator[Preference]:
    """Yield the highest selected reward against the lowest."""
    if len(rows) > 1:
        ranked = sorted(rows, key=lambda row: -row["reward"])
        yield _prefer_higher_reward(ranked[0], ranked[-1])


@pair_rule(reads="selections", batch=pair_batches.mu_minus_2_sigma)
def mu_minus_2_sigma(rows: list[Row], *, sigmas: NotNegative = 2.0) -> Iterator[Preference]:
    """Yield the highest reward against the one nearest to mean - 2 sd, not the very worst (arXiv:2502.16825)."""
    rewards = np.array([row["reward"] for row in rows])
    if len(rows) > 1:
        target = rewards.mean() - sigmas * rewards.std()
        yield _prefer_higher_reward(rows[int(rewards.argmax())], rows[int(np.abs(rewards - target).argmin())])


@pair_rule(reads="selections", weighs=True, version=2, batch=pair_batches.all_pairs)
def all_pairs(rows: list[Row]) -> Iterator[Preference]:
    """Yield every preference that the rewards imply, with weight w_i w_j from the selection's weights.

    Weights 1: RRHF (arXiv:2304.05302). Weights exp(r / beta) / Z: the expectation over two draws from the
    estimated optimal policy, without rejecting any.
    """
    for a, b in combinations(rows, 2):
        if a["reward"] != b["reward"]:
            yield _prefer_higher_reward(a, b, a["weight"] * b["weight"])


@pair_rule(
    reads="selections",
    source=require_sampled,
    batch=pair_batches.next_likelier_loser,
    candidate_columns=("logp", "logp_kind"),
)
def next_likelier_loser(rows: list[Row], *, threshold: Finite | None = None) -> Iterator[Preference]:
    """Yield each bad response against the likeliest good one that is less likely than it: CLICK (arXiv:2306.03350).

    Good and bad: reward above and below `threshold`, that of labels, or else the prompt's mean (the sign of a reward
    says only whether it beats one random draw). Such pairs are those that the policy has the wrong way round by least;
    the rule is rebuilt from the paper's words, for its code for it is not public.
    """
    if any(row["logp"] is None or row["logp_kind"] == "steered" for row in rows):
        raise WinnowError(pair_batches.NO_LOGP)
    level = cutoff(rows, threshold)
    good = [row for row in rows if row["reward"] > level]
    for bad in rows:
        less_likely = [row for row in good if row["logp"] < bad["logp"]]
        if bad["reward"] < level and less_likely:
            yield _prefer_higher_reward(max(less_likely, key=lambda row: row["logp"]), bad)


@pair_rule(
    reads="candidates",
    source=require_pooled_prompts,
    batch=pair_batches.demonstration_vs_sample,
    candidate_columns=("finish_reason",),
)
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
                raise rule.wrong_result(name, OF_PROMPT, of)
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


def _candidate_columns(options: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the columns of candidates that the step reads: all where a rule gets them as rows."""
    rule: Bound = options["rule"]
    if "batch" not in rule.metadata:
        return None
    finish_reason = ("finish_reason",) if options["finished"] else ()
    return ("prompt_id", "candidate_id", "token_ids", *finish_reason, *rule.metadata.get("candidate_columns", ()))


@stage(version=3, check=_check_inputs, by_prompt=lambda options: True)
def pair(
    candidates: Annotated[Candidates, Columns(by=_candidate_columns)],
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
    table, names = rule.metadata["reads"], candidates["candidate_id"]
    # Of candidates only the ids are put in order, which may be 64 for a pair, and not their tokens.
    source = {"selections": selections, "comparisons": comparisons, "candidates": candidates.select(IDS)}[table]
    rows = in_order_of_prompts(source)
    prompts, starts = starts_of_prompts(column_of(rows, "prompt_id"))
    numbers = np.arange(len(prompts))  # of the prompts that are left
    rejects = RejectedRows()

    # Ids become rows of `candidates`: a join with those that the rule reads, and not with all of them.
    id_columns = ("left_id", "right_id") if table == "comparisons" else ("candidate_id",)
    positions = {name: positions_of(column_of(rows, name), names) for name in id_columns}
    if table == "selections":
        require_ids(column_of(rows, "candidate_id"), positions["candidate_id"])
        sizes, reasons = np.diff(starts), equal_rewards_by_prompt(rows, starts)
        is_equal = reasons != ""
        details = [f"{size} {table}" for size in sizes[is_equal]]
        rejects.add(numbers[is_equal], place=rule.name, reason=reasons[is_equal], detail=details)
        keep = np.repeat(~is_equal, sizes)
        rows, positions["candidate_id"] = rows.filter(pa.array(keep)), positions["candidate_id"][keep]
        numbers, starts = numbers[~is_equal], np.append(0, np.cumsum(sizes[~is_equal]))

    pairs = _pairs_of(rule, rows, prompts.take(pa.array(numbers)), starts, positions, candidates)
    has_no_pair = np.bincount(pairs.prompt, minlength=len(numbers)) == 0
    details = [f"{size} {table}" for size in np.diff(starts)[has_no_pair]]
    rejects.add(numbers[has_no_pair], place=rule.name, reason="no pair", detail=details)

    # Reject pairs; of several reasons the first one counts.
    lengths = pc.list_value_length(candidates["token_ids"]).to_numpy()
    is_tie = np.zeros(len(pairs.prompt), dtype=bool) if pairs.gap is None else pairs.gap == 0
    is_rejected = {
        "tie": is_tie,
        "identical responses": _are_identical(candidates["token_ids"], lengths, pairs.chosen, pairs.rejected),
        "empty response": (lengths[pairs.chosen] == 0) | (lengths[pairs.rejected] == 0),
    }
    if finished:
        is_cut = pc.equal(candidates["finish_reason"], "length").to_numpy()
        is_rejected["cut at max_tokens"] = is_cut[pairs.chosen] | is_cut[pairs.rejected]
    is_rejected["weight 0"] = pairs.weight <= SMALLEST_WEIGHT  # 0 in float32
    remaining = np.flatnonzero(~np.logical_or.reduce(list(is_rejected.values())))
    _, firsts = np.unique(pairs.chosen[remaining] * len(lengths) + pairs.rejected[remaining], return_index=True)
    is_repeated = is_rejected["the same pair again"] = np.zeros_like(is_tie)
    is_repeated[np.delete(remaining, firsts)] = True
    reasons = np.select(list(is_rejected.values()), list(is_rejected), "")
    is_dropped = reasons != ""
    ids = {"chosen_id": pairs.chosen, "rejected_id": pairs.rejected}
    chosen, rejected = (names.take(pa.array(rows[is_dropped])).combine_chunks() for rows in ids.values())
    of_prompt = numbers[pairs.prompt]
    rejects.add(of_prompt[is_dropped], place=rule.name, reason=reasons[is_dropped], candidates=chosen, detail=rejected)
    rejects.record(ctx, prompts)

    is_kept = ~is_dropped
    size = int(is_kept.sum())
    gap = pairs.gap[is_kept] if pairs.gap is not None else np.full(size, np.nan)
    columns = {name: names.take(pa.array(rows[is_kept])) for name, rows in ids.items()}
    columns |= {"prompt_id": prompts.take(pa.array(of_prompt[is_kept])), "rule": pa.repeat(rule.name, size)}
    columns |= {"gap": pa.array(gap, mask=np.isnan(gap)), "weight": pa.array(pairs.weight[is_kept])}
    return pa.table([columns[name] for name in PAIRS.names], names=PAIRS.names)


def _pairs_of(
    rule: Bound, rows: pa.Table, prompts: pa.Array, starts: Ints, positions: dict[str, Ints], candidates: pa.Table
) -> PairBatch:
    """Return what a rule yields of all prompts; raise WinnowError for what are no pairs of a prompt's candidates."""
    if not len(prompts):
        empty = np.zeros(0, dtype=np.int64)
        return PairBatch(empty, empty, empty, None, np.zeros(0))
    if "batch" not in rule.metadata:
        return _pairs_by_prompt(rule, rows, prompts, starts, candidates)
    for name, position in positions.items():
        of_row = candidates["prompt_id"].take(pa.array(np.maximum(position, 0)))
        is_foreign = (position < 0) | pc.not_equal(of_row, rows["prompt_id"]).to_numpy()
        if is_foreign.any():
            n = int(is_foreign.argmax())
            raise rule.wrong_result(rows[name][n].as_py(), OF_PROMPT, f"prompt {rows['prompt_id'][n]}")
    if names := rule.metadata.get("candidate_columns", ()):
        for name, column in zip(names, candidates.select(names).take(pa.array(positions["candidate_id"])), strict=True):
            rows = rows.append_column(name, column)
    pairs: PairBatch = rule.metadata["batch"](PairRows(starts, rows, positions), **rule.options)
    for what, values in (("gap", pairs.gap), ("weight", pairs.weight)):
        if values is not None and not (is_sound := (values >= 0) & np.isfinite(values)).all():
            n = int(is_sound.argmin())
            number(rule, values[n], low=0, of=f"the {what} of prompt {prompts[pairs.prompt[n]]}")
    return pairs


def _pairs_by_prompt(rule: Bound, rows: pa.Table, prompts: pa.Array, starts: Ints, candidates: pa.Table) -> PairBatch:
    """Call a rule once per prompt, with its rows."""
    row_by_id = RowsById((row["candidate_id"], row) for row in candidates.to_pylist())
    position_by_id = {name: n for n, name in enumerate(candidates["candidate_id"].to_pylist())}
    items = rows.to_pylist()
    if rule.metadata["reads"] != "comparisons":
        items = [row_by_id[item["candidate_id"]] | item for item in items]
    numbers: list[int] = []
    preferences: list[Preference] = []
    for n, prompt in enumerate(prompts.to_pylist()):
        result = rule(items[starts[n] : starts[n + 1]])
        preferences += check_preferences(rule, result, prompt, row_by_id)
        numbers += [n] * (len(preferences) - len(numbers))
    chosen, rejected = (
        np.array([position_by_id[preference[side]] for preference in preferences], np.int64) for side in (0, 1)
    )
    gap = np.array([np.nan if preference.gap is None else preference.gap for preference in preferences])
    weight = np.array([preference.weight for preference in preferences])
    return PairBatch(np.array(numbers, np.int64), chosen, rejected, gap, weight)


def _are_identical(lists: pa.ChunkedArray, lengths: Ints, a: Ints, b: Ints) -> NDArray[np.bool_]:
    """Return for each pair of rows whether their lists have the same values, [P]; lengths: those of all lists."""
    are_identical = lengths[a] == lengths[b]
    rows = np.flatnonzero(are_identical & (lengths[a] > 0))
    if len(rows):
        values_of_a, values_of_b = (pc.list_flatten(lists.take(pa.array(side[rows]))).to_numpy() for side in (a, b))
        begins = np.cumsum(lengths[a][rows]) - lengths[a][rows]
        are_identical[rows] = np.logical_and.reduceat(values_of_a == values_of_b, begins)
    return are_identical

"""Candidates and rewards of a plan that a store has, as arrays: what `winnow diagnose` reads."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.resume import hint
from pipeline.config.plan import Plan, Step
from pipeline.config.rounds import split_round
from pipeline.registry import Bound
from pipeline.sql.catalog import Catalog, open_catalog
from pipeline.store.store import Store
from schemas import WinnowError, seed_for, table_name
from schemas.tables import CANDIDATES, COMPARISONS, PROMPTS, REWARDS
from stages.data.rows import fields_of
from stages.evaluation.evaluate import score_by_gold
from stages.ranking.rankers import check_fields
from stages.selection.groups import Floats, Ints, RewardGroups

ROWS = """
SELECT rewards.*, candidates.n_tokens, candidates.finish_reason, hash(candidates.token_ids) AS ids
FROM rewards JOIN candidates USING (prompt_id, candidate_id)
ORDER BY prompt_id, candidate_id
"""
ANOTHER_BASELINE = "another baseline"
TEXTS = "SELECT prompt_id, candidate_id, text, raw_text FROM candidates"


@dataclass
class CachedCandidates:
    """Candidates of G prompts with their rewards, N in total, in order of prompt and candidate id.

    gold: nan where there is none. other_order: reward by each order of reading alone. repeats: rewards of the same
    ranker against other baselines, by what they are. comparisons: indices of left and right, and the logit.
    """

    select: Step
    rewards: pa.Table
    groups: RewardGroups
    tokens: Floats
    distinct: Floats  # different responses per prompt, [G]
    catalog: Catalog  # of the steps of the plan that are finished
    gold: Floats | None = None
    gold_name: str = ""
    orders: tuple[Floats, Floats] | None = None
    repeats: dict[str, Floats] = field(default_factory=dict)
    comparisons: tuple[Ints, Ints, Floats] | None = None

    def index(self, names: pa.ChunkedArray) -> NDArray[np.int64]:
        """Return the position of candidates by their ids; -1 for those that have no reward."""
        positions = pc.index_in(names.combine_chunks(), value_set=self.rewards.column("candidate_id").combine_chunks())
        return np.asarray(pc.fill_null(positions, -1), dtype=np.int64)


def read_cached(
    plan: Plan, store: Store, gold: tuple[Bound, bool] | None, round: int | None, limit: int | None
) -> CachedCandidates:
    """Return the candidates and rewards that the plan's selection would read; raise WinnowError if one is missing.

    gold: the gold reward and whether it reads special tokens. round: of a plan with rounds; the first by default.
    limit: as many prompts are read, by hash of their ids.
    """
    select = _selection(plan, round)
    rewards_step = select.inputs["rewards"]
    candidates_step = source_of(rewards_step, CANDIDATES)
    for step in (candidates_step, rewards_step):
        if store.folder(step).manifest is None:
            raise WinnowError(
                f"{plan.name}: step {step.name} ({step.key}) has not run in {store.root}, and diagnose reads its "
                f"result; `{hint('run', '...', '--until', split_round(rewards_step.name)[0])}` with the same recipe, "
                "config, --set and --store computes it"
            )
    # The plan's finished steps, as if they were one run, whether or not a run has linked them.
    links = {step.name: {"stage": step.stage, "key": step.key} for step in plan.steps}
    catalog = replace(_only(open_catalog(store), {step.key for step in plan.steps}), runs={plan.name: links})
    read = _only(catalog, {candidates_step.key, rewards_step.key})
    rows = read.sql(ROWS).arrow()
    expected = store.folder(rewards_step).manifest["rows"]["rewards"]  # type: ignore[index]
    if rows.num_rows != expected:
        raise WinnowError(f"{rewards_step.name}: {expected:,} rewards, of which {rows.num_rows:,} are of candidates of "
                          f"{candidates_step.name}; the steps are of different origin")  # fmt: skip
    rows = rows.filter(pc.and_(pc.is_finite(rows["reward"]), pc.less(pc.abs(rows["reward"]), 1e100)))
    if select.options["finished"]:  # as `select` itself does before any rule
        rows = rows.filter(pc.not_equal(rows["finish_reason"], "length"))
    if limit is not None:
        names = sorted(set(rows["prompt_id"].to_pylist()), key=lambda name: seed_for(0, "diagnose", name))[:limit]
        rows = rows.filter(pc.is_in(rows["prompt_id"], pa.array(names)))
    if not rows.num_rows:
        raise WinnowError(f"{plan.name}: {rewards_step.name} has no reward that a rule could read")
    rows = rows.combine_chunks()

    runs = pc.run_end_encode(rows["prompt_id"].combine_chunks())
    starts = np.concatenate([np.zeros(1, np.int64), np.asarray(runs.run_ends, dtype=np.int64)])
    seeds = np.zeros(len(starts) - 1, dtype=np.uint64)  # `select` makes its own
    groups = RewardGroups(rows["reward"].to_numpy(), starts, seeds)
    ids = rows["ids"].to_numpy()
    order = np.lexsort((ids, groups.broadcast(np.arange(len(groups.sizes)))))
    is_new = (groups.position == 0) | (ids[order] != np.roll(ids[order], 1))
    cached = CachedCandidates(
        select=select,
        rewards=rows.select(REWARDS.names),
        groups=groups,
        tokens=rows["n_tokens"].to_numpy().astype(np.float64),
        distinct=groups.sum(is_new.astype(np.float64)),
        catalog=catalog,
    )
    if rows["logit_ab"].null_count < rows.num_rows and rows["logit_ba"].null_count < rows.num_rows:
        # The baseline itself has neither: it beats itself half of the time.
        ab, ba = (rows[name].fill_null(0.0).to_numpy() for name in ("logit_ab", "logit_ba"))
        cached.orders = (ab, ba)
    cached.repeats = _repeats(cached, rewards_step, store)
    cached.comparisons = _comparisons(cached, plan, store)
    if gold is not None:
        prompts_step = source_of(rewards_step, PROMPTS)
        prompts = store.folder(prompts_step).read(PROMPTS).to_pylist()
        by_prompt = {row["prompt_id"]: (row["text"], fields_of(row)) for row in prompts}
        cached.gold = _gold_scores(cached, gold[0], gold[1], by_prompt, _only(catalog, {candidates_step.key}))
        cached.gold_name = gold[0].name
    return cached


def _selection(plan: Plan, round: int | None) -> Step:
    steps = [step for step in plan.steps if step.stage == "select" and "rewards" in step.inputs]
    if not steps:
        raise WinnowError(f"{plan.name}: no step selects candidates by their rewards; diagnose is about recipes that "
                          "do, such as rso, raft or own_candidates")  # fmt: skip
    rounds = [split_round(step.name)[1] for step in steps]
    if round is None:
        return steps[0]
    if round not in rounds:
        numbers = ", ".join(str(number) for number in rounds if number) or "no rounds"
        raise WinnowError(f"--round {round}: {plan.name} has {numbers}")
    return steps[rounds.index(round)]


def source_of(step: Step, schema: pa.Schema) -> Step:
    """Return the step, or the nearest one that it was computed from, that has this table."""
    queue, names = [step], {table_name(schema)}
    while queue:
        step, *queue = queue
        if names & {table_name(output) for output in step.signature.outputs}:
            return step
        queue += [step.inputs[name] for name in sorted(step.inputs)]
    raise WinnowError(f"no step behind the rewards has the table {names.pop()}")


def _only(catalog: Catalog, keys: set[str]) -> Catalog:
    manifests = [manifest for manifest in catalog.manifests if manifest["key"] in keys]
    return replace(catalog, manifests=manifests, is_part=True)


def _repeats(cached: CachedCandidates, step: Step, store: Store) -> dict[str, Floats]:
    """Return rewards of the same candidates and ranker against other baselines, from other steps of the store."""

    def without_seed(identity: Mapping[str, Any]) -> str:
        options = {name: value for name, value in identity["options"].items() if name != "seed"}
        return json.dumps({**identity, "options": options}, sort_keys=True)

    result = {}
    if step.stage == "reward":
        for manifest in store.sealed():
            same = manifest["stage"] == "reward" and without_seed(manifest["identity"]) == without_seed(step.identity)
            if same and manifest["key"] != step.key:
                table = store.at("reward", manifest["key"]).read(REWARDS)
                values, index = np.full(cached.rewards.num_rows, np.nan), cached.index(table["candidate_id"])
                values[index[index >= 0]] = table["reward"].to_numpy()[index >= 0]
                if table["baseline_id"].null_count < table.num_rows:
                    result[f"{ANOTHER_BASELINE} (reward.seed={manifest['identity']['options']['seed']})"] = values
    return dict(sorted(result.items()))


def _comparisons(cached: CachedCandidates, plan: Plan, store: Store) -> tuple[Ints, Ints, Floats] | None:
    """Return the plan's direct comparisons of selected candidates, if they are finished."""
    for step in plan.steps:
        if step.stage == "compare" and step.inputs.get("selections") is cached.select and store.folder(step).manifest:
            table = store.folder(step).read(COMPARISONS)
            left, right = (cached.index(table[name]) for name in ("left_id", "right_id"))
            rewarded = (left >= 0) & (right >= 0)
            return left[rewarded], right[rewarded], table["logit"].to_numpy()[rewarded]
    return None


def _gold_scores(
    cached: CachedCandidates, gold: Bound, special_tokens: bool, by_prompt: dict[str, Any], catalog: Catalog
) -> Floats:
    """Return the gold reward of every candidate; equal texts of a prompt are scored once."""
    if gold.metadata.get("reads_fields") and not any(fields for _, fields in by_prompt.values()):
        raise WinnowError(f"evaluate.gold: {gold.name} reads columns of the data file, which the prompts do not keep")
    values = np.full(cached.rewards.num_rows, np.nan)
    scores: dict[tuple[str, str | None, str], float] = {}
    for batch in catalog.sql(TEXTS).batches():
        index = cached.index(pa.chunked_array([batch.column("candidate_id")]))
        for position, row in zip(index.tolist(), batch.to_pylist(), strict=True):
            if position < 0:
                continue
            key = (row["prompt_id"], row["raw_text"], row["text"])
            if key not in scores:
                prompt, fields = by_prompt[row["prompt_id"]]
                try:
                    check_fields(gold, fields)
                except ValueError as error:
                    raise WinnowError(f"evaluate.gold: {gold.name}: prompt {row['prompt_id']}: {error}") from None
                scores[key] = score_by_gold(gold, prompt, fields, row, special_tokens)
            values[position] = scores[key]
    return values

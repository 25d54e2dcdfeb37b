"""A part that a stage reads in pieces has the same bytes as one that it reads at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config.plan import Step
from pipeline.context import WarmCache
from pipeline.execution.tasks import Task, _pieces, execute, step_spec
from pipeline.registry import Bound
from pipeline.resources import Resources
from pipeline.store.store import Store
from schemas.tables import CANDIDATES, PAIRS
from stages.selection.groups import RewardGroups
from stages.selection.rules import Selection, selection_rule
from tests.bench.store.model import Part, make_step, seal_step

PART = Part(60, 16, 0)
SMALL = Resources(piece_memory=2e-5)


def rewards_with_rejects() -> pa.Table:
    """Rewards of which some are not finite, and some prompts have equal ones."""
    rewards = PART.rewards()
    values = rewards["reward"].to_numpy().copy()
    values[::17], values[5 * 16 : 9 * 16], values[40 * 16 : 41 * 16] = np.nan, 1.0, np.inf
    return rewards.set_column(rewards.column_names.index("reward"), rewards.schema.field("reward"), pa.array(values))


def steps(store: Store, order: np.ndarray) -> list[Step]:
    """Return select, pair and examples, whose inputs are in the store, the candidates in this order."""
    prompts, candidates = make_step("prompts", 1), make_step("sample", 1)
    rewards = make_step("reward", 1, by={"name": "brevity", "words": 1})
    seal_step(store, prompts, lambda n: {"prompts": PART.prompt_table()})
    seal_step(store, candidates, lambda n: {"candidates": PART.candidates().take(pa.array(order))})
    seal_step(store, rewards, lambda n: {"rewards": rewards_with_rejects()})
    rule = {"name": "everything"}
    inputs = {"rewards": rewards, "candidates": candidates}
    select = make_step("select", 1, inputs=inputs, rule=rule, finished=True)
    pair = make_step("pair", 1, inputs={"candidates": candidates, "selections": select}, rule="all_pairs")
    inputs = {"prompts": prompts, "candidates": candidates, "pairs": pair, "selections": select}
    return [select, pair, make_step("examples", 1, inputs=inputs, imitate="selected")]


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "in any order"])
def test_pieces_of_a_part_leave_its_bytes(tmp_path: Path, shuffled: bool):
    """Tables, rejects and counters; a table in any order is read once per piece, and read the same."""
    order = np.random.default_rng(0).permutation(960) if shuffled else np.arange(960)
    records = []
    for name, resources in (("whole", Resources()), ("pieces", SMALL)):
        store = Store(tmp_path / name)
        for step in steps(store, order):
            spec = step_spec(step, store)
            count = len(_pieces(spec, Task(0), resources))
            assert count > 2 if name == "pieces" else count == 1
            execute(spec, Task(0), WarmCache(), lambda *report: None, resources)
            record = store.folder(step).sidecar(0) or {}
            records.append([step.name, record["files"], record["counters"], record["rejects"]])
    assert records[:3] == records[3:]
    assert all(sum(rejects.values()) > 2 for _, _, _, rejects in records[:2])


def user_rule(groups: RewardGroups) -> Selection:
    """Stand for a rule in a user's file, which gets all prompts of the part."""
    raise NotImplementedError


def test_a_rule_that_reads_all_prompts_has_its_part_at_once(tmp_path: Path):
    """A pooled normaliser, and a rule of a user's, which may pool them as well."""
    store = Store(tmp_path)
    select, *_ = steps(store, np.arange(960))
    rewards = {"rewards": select.inputs["rewards"]}
    rule = {"name": "softmax_weights", "beta": 0.5, "normaliser": "gumbel"}
    pooled = make_step("select", 1, inputs=rewards, rule=rule)
    of_user = make_step(
        "select", 1, inputs=rewards, rule=Bound(replace(selection_rule.entries["plain"], fn=user_rule), {})
    )
    for step in (pooled, of_user):
        assert _pieces(step_spec(step, store), Task(0), SMALL) == [None]
    assert len(_pieces(step_spec(select, store), Task(0), SMALL)) > 2


def test_a_stage_gets_the_columns_that_it_declares(tmp_path: Path):
    """By its options: a rule for all prompts reads few columns of candidates, and a user's gets whole rows."""
    store = Store(tmp_path)
    columns: list[list[str]] = []
    _, pair, _ = steps(store, np.arange(960))

    def record(candidates: pa.Table, **inputs: Any) -> pa.Table:
        columns.append(candidates.column_names)
        return PAIRS.empty_table()

    rule = pair.options["rule"]
    plain = Bound(replace(rule.entry, metadata={"reads": "selections"}), {})
    for shard_rule, finished in ((rule, False), (rule, True), (plain, False)):
        step = replace(pair, inputs={"candidates": pair.inputs["candidates"]})
        spec = step_spec(step, store)
        options = pair.options | {"rule": shard_rule, "finished": finished}
        entry = replace(spec.entry, fn=record, metadata={"signature": spec.signature})
        execute(replace(spec, entry=entry, options=options), Task(0), WarmCache(), lambda *report: None)
    few = ["prompt_id", "candidate_id", "token_ids"]
    assert columns == [few, [*few, "finish_reason"], CANDIDATES.names]

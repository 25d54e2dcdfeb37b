"""Pair rules over many prompts at once pair as they do prompt by prompt: the same tables, rejects included."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.registry import Bound
from schemas import WinnowError, conform
from schemas.tables import CANDIDATES, COMPARISONS, PAIRS, SELECTIONS
from stages.data.rows import cutoff, cutoffs
from stages.selection.pair import pair, pair_rule
from tests.stages.selection.test_pairs import space
from tests.stages.test_stages import candidate

RULES: list[dict[str, Any]] = [{"name": name} for name, entry in pair_rule.entries.items() if "batch" in entry.metadata]
RULES += [{"name": "mu_minus_2_sigma", "sigmas": 1.0}, {"name": "next_likelier_loser", "threshold": 0.0}]
REWARDS = st.sampled_from([-0.0, 0.0, 0.1, 0.2, 0.3, 1.0, 1e-300, -1e9])
ROWS = st.tuples(
    REWARDS,
    st.sampled_from([0.0, 2.0**-160, 0.5, 1.25]),  # weight
    st.sampled_from([[], [5], [5, 1], [6, 1]]),  # tokens
    st.sampled_from([-2.0, -1.5, -1.0]),  # logp
    st.sampled_from(["stop", "length", "given"]),
    st.booleans(),  # whether it is selected
)
GROUPS = st.lists(st.tuples(st.sampled_from([None, 0.5]), st.lists(ROWS, min_size=1, max_size=9)), max_size=5)


def tables_of(groups, order):
    """Candidates, selections and comparisons of prompts a, b, ...; the rows of the last two in any order."""
    candidates, selections, comparisons = [], [], []
    for prompt, (threshold, rows) in zip("abcde", groups, strict=False):
        for k, (reward, weight, tokens, logp, end, selected) in enumerate(rows):
            row = candidate(prompt, k, ids=tokens)
            candidates.append(row | {"logp": logp, "logp_kind": "exact", "finish_reason": end})
            ids = {"prompt_id": prompt, "candidate_id": row["candidate_id"]}
            numbers = {"reward": reward, "weight": weight, "label_threshold": threshold, "draw": k * 5 % 9, "round": 0}
            selections += [ids | numbers] * selected
            other = {"right_id": f"{prompt}-{(k * 7 + 1) % len(rows)}", "logit": reward, "round": 0}
            comparisons.append({"prompt_id": prompt, "left_id": row["candidate_id"]} | other)
    for rows in (selections, comparisons):
        order.shuffle(rows)
    return (
        pa.Table.from_pylist(candidates, schema=CANDIDATES),
        pa.Table.from_pylist(selections, schema=SELECTIONS),
        pa.Table.from_pylist(comparisons, schema=COMPARISONS),
    )


@settings(deadline=None)  # the first call compiles
@given(st.sampled_from(RULES), GROUPS, st.booleans(), st.randoms(use_true_random=False))
def test_a_batch_is_what_the_rule_yields_prompt_by_prompt(options, groups, finished, order):
    """Ties, equal tokens, the same comparison twice, one candidate or none, no label: all as in the plain rule."""
    bound = pair_rule.bind(options)
    plain = Bound(replace(bound.entry, metadata={"reads": bound.metadata["reads"]}), bound.options)
    candidates, selections, comparisons = tables_of(groups, order)
    results = []
    for rule in (bound, plain):
        ctx, reads = space(), rule.metadata["reads"]
        inputs = {"selections": selections, "comparisons": comparisons}
        source = {reads: inputs[reads]} if reads in inputs else {}
        results.append((conform(pair(candidates, ctx, **source, rule=rule, finished=finished), PAIRS), ctx.rejects))
    assert results[0] == results[1]


@given(st.lists(st.lists(st.floats(-1e6, 1e6) | REWARDS, min_size=1, max_size=9), min_size=1, max_size=6))
def test_cutoffs_separate_as_the_exact_mean_does(groups):
    """On which side of its prompt's cutoff a reward is, and whether it meets it."""
    starts = np.cumsum([0, *map(len, groups)])
    rewards = np.concatenate(groups)
    levels = np.repeat(cutoffs(rewards, starts, np.full(len(rewards), np.nan), None), np.diff(starts))
    exact = np.repeat([cutoff([{"reward": reward} for reward in group], None) for group in groups], np.diff(starts))
    assert (np.sign(rewards - levels) == np.sign(rewards - exact)).all()
    met = rewards == exact
    assert (levels[met] == exact[met]).all()


def test_a_comparison_of_another_prompts_candidate_is_refused():
    candidates = pa.Table.from_pylist([candidate("a", 0), candidate("b", 0)], schema=CANDIDATES)
    row = {"prompt_id": "a", "left_id": "a-0", "right_id": "b-0", "logit": 1.0, "round": 0}
    with pytest.raises(
        WinnowError, match="matches: must return ids of the prompt's candidates; got 'b-0' for prompt a"
    ):
        pair(candidates, space(), None, pa.Table.from_pylist([row], schema=COMPARISONS), rule=pair_rule.bind("matches"))

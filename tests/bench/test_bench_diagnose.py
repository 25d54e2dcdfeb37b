"""The claim of `winnow diagnose`: it orders selection rules by the gold of what they keep. Figures: diagnose.md."""

import os
from itertools import pairwise
from pathlib import Path

import pytest

from tests.bench.diagnose import RULES, demo_world, measure, real_worlds, tau
from tests.runs import Silent

REAL = os.environ.get("WINNOW_REAL_CANDIDATES", "")  # Parquet with prompt, response, p_beats_baseline


def assert_predicted(rows, found):
    """The order that is diagnosed is that of the gold that a run's `select` keeps, of seven rules.

    Nearly so is the order that is predicted without the prompt's own gold. Rules that are told apart are the right way
    round.
    """
    assert len(rows) == len(RULES) >= 4
    assert tau(rows, "gold") > 0.9
    assert tau(rows, "predicted") > 0.7
    golds = {row["rule"]: row["gold kept"] for row in rows}
    order = [row["rule"] for row in found.sections["rules"].rows]
    for (first, second), apart in zip(pairwise(order), found.apart, strict=True):
        if first in golds and second in golds and apart.low > 0:
            assert golds[first] > golds[second], (first, second)


@pytest.mark.timeout(1200)
def test_the_order_is_predicted_on_the_demo(tmp_path):
    rows, found = measure(demo_world(tmp_path), Silent())
    assert_predicted(rows, found)


@pytest.mark.skipif(not REAL, reason="WINNOW_REAL_CANDIDATES names no file")
@pytest.mark.timeout(1200)
def test_the_order_is_predicted_on_real_candidates(tmp_path):
    """By a reward that was fitted, and by length alone."""
    for world in real_worlds(tmp_path, Path(REAL)):
        rows, found = measure(world, Silent())
        assert_predicted(rows, found)

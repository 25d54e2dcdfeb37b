"""`mixes` measures what it states; speeds are for a quiet machine, and no claim here."""

import re
import shutil

import pytest

from pipeline.store.store import Store
from tests.bench.mixes import MIXES, measure
from tests.runs import Silent


@pytest.fixture(scope="module")
def rows(data_dir, finished, tmp_path_factory):
    root = tmp_path_factory.mktemp("bench") / "store"
    shutil.copytree(finished, root)
    table = measure(Store(root), [data_dir / "demo.yaml"], Silent(), 40, 2, lambda line: None)
    return {row["mix"]: row for row in table.to_pylist()}


def test_every_mix_is_a_row_with_its_spread(rows):
    assert tuple(rows) == MIXES
    for row in rows.values():
        median, least, most = map(float, re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", row["seconds_a_step"]).groups())
        assert 0 < least <= median <= most
        assert row["against_alone"] > 0
    assert [rows[name]["against_alone"] for name in ("joint 1", "joint 0")] == [1.0, 1.0]


def test_a_step_takes_one_side_or_in_the_mixture_both(rows):
    """40 groups of one pair by 4 are 10 steps, of which the first is not timed; alright's and maxright's add up."""
    turns = {name: (row["preference_steps"], row["imitation_steps"]) for name, row in rows.items()}
    assert [turns[name] for name in ("joint 1", "joint 0", "joint 0.5")] == [(9, 0), (0, 9), (9, 9)]
    for name in ("sequence 0.5", "alright 0.5", "maxright 0.5"):
        assert sum(turns[name]) == 9, name
    assert min(turns["alright 0.5"]) > 0

"""What a plan says of memory is within 20 % of what a fresh process takes.

`pytest -m bench tests/bench/test_bench_memory.py` takes half an hour on one core.

stages/training/README.md has the table that `python -m tests.bench.memory` printed.
"""

import pytest

from tests.bench.memory import CASES, estimate, measure, write_network


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.size}-{case.name}")
def test_an_estimate_is_near_the_measured_peak(case, tmp_path):
    network = write_network(case.size, tmp_path)
    assert estimate(case, network) == pytest.approx(measure(case, network), rel=0.2)

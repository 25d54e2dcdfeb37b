"""What a plan says of memory is within 20 % of what a fresh process takes.

`pytest -m bench tests/bench/test_bench_memory.py` takes five minutes on one free core: two sizes. `python -m
tests.bench.memory` measures a third, and stages/training/README.md has what it printed.
"""

import pytest

from tests.bench.memory import CASES, estimate, measure, write_network

TWO_SIZES = [case for case in CASES if case.size in ("30M", "135M")]


@pytest.mark.parametrize("case", TWO_SIZES, ids=lambda case: f"{case.size}-{case.name}")
def test_an_estimate_is_near_the_measured_peak(case, tmp_path):
    network = write_network(case.size, tmp_path)
    assert estimate(case, network) == pytest.approx(measure(case, network), rel=0.2)

"""Sizes up to which the parts of a table become one file, as fixture `small_table` sets them."""

import pytest

SMALL, LARGE = 8 << 20, 0
both_sizes = pytest.mark.parametrize("small_table", [SMALL, LARGE], indirect=True, ids=["small", "large"])

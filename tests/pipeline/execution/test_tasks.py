"""Results of tasks that are refused."""

import pytest

from pipeline.execution.tasks import check_not_empty
from schemas import WinnowError


@pytest.mark.parametrize(
    ("split", "share"), [("heldout", "heldout"), ("train", "heldout"), ("validation", "validation")]
)
def test_a_table_without_rows_names_the_share_of_its_split(split, share):
    manifest = {"rows": {"candidates": 0}, "model": None, "rejects": {}}
    with pytest.raises(WinnowError, match=f"no rows of split {split}: see `{share}` of the data"):
        check_not_empty("sample", {"split": split}, manifest)
